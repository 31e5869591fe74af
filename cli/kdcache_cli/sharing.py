"""`kdcache publish`, `kdcache pull` and `kdcache pack`: stores between places."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from kdcache.errors import ConfigError
from kdcache.progress import Advance
from kdcache_cli.dumped import names
from kdcache_cli.options import AT_LEAST_ONE, NOT_NEGATIVE
from kdcache_cli.progress import bars
from kdcache_cli.tables import size

F = TypeVar("F", bound=Callable[..., Any])

JOBS = click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    help="Files at once.",
)
PART = (
    click.option(
        "--teachers", help="Teachers to take along, by comma; '' for none (default: all)."
    ),
    click.option("--fields", help="Fields of the teachers to take along, by comma (default: all)."),
    click.option(
        "--where",
        "condition",
        help="Structures for which this holds: 'origin == \"dft\" and n_atoms < 50'.",
    ),
)


def _part(command: F) -> F:
    for option in reversed(PART):
        command = option(command)
    return command


@click.command("publish")
@click.argument("store")
@click.argument("target")
@_part
@JOBS
@click.option(
    "--without-structures",
    is_flag=True,
    help="Leave out structures and labels; who has them puts them back (kdcache join).",
)
@click.option("--replace", is_flag=True, help="Another store at TARGET gives way.")
@click.option(
    "--scratch",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where the store of --where is written first (default: beside STORE, or here).",
)
def publish_command(store: str, target: str, condition: str | None, **values: Any) -> None:
    """Copy STORE to TARGET: a directory, s3://, gs:// or az://; checked on the way, manifest last.

    \b
    kdcache publish features.zarr s3://bucket/features.zarr
    kdcache publish features.zarr /mnt/share/features.zarr --fields node,energy
    """
    from kdcache.sharing import publish_rows, publish_store, select_rows

    kept: dict[str, Any] = {
        "teachers": names(values["teachers"]),
        "fields": names(values["fields"]),
    }
    options: dict[str, Any] = {
        "jobs": values["jobs"],
        "replace": values["replace"],
        "progress": _moving,
    }
    if condition is None:
        options["without_structures"] = values["without_structures"]
        _report(target, publish_store(store, target, **kept, **options))
        return
    if values["without_structures"]:
        raise ConfigError(
            "--where and --without-structures do not go together: write the chosen structures to a "
            "store first (kdcache pull STORE -o PART --where …), then publish that."
        )
    selection = select_rows(store, condition=condition, **kept)
    click.echo(_cost(selection))
    scratch = values["scratch"] or (Path(store).parent if Path(store).exists() else Path())
    _report(target, publish_rows(selection, target, scratch, **options))


@click.command("pull")
@click.argument("source")
@click.option("-o", "--output", required=True, help="New store.")
@_part
@click.option(
    "--sample",
    type=AT_LEAST_ONE,
    help="The first so many in the store's random order: the same for everybody, for as little "
    "traffic.",
)
@click.option(
    "--seed",
    type=NOT_NEGATIVE,
    help="Draw the sample, as subset --seed does; costs more traffic.",
)
@JOBS
def pull_command(
    source: str,
    output: str,
    condition: str | None,
    sample: int | None,
    seed: int | None,
    jobs: int,
    **values: Any,
) -> None:
    """Fetch the store at SOURCE, an address, a directory or a packed store, and check every file.

    \b
    kdcache pull https://host/features.zarr -o features.zarr
    kdcache pull s3://bucket/features.zarr -o small.zarr --sample 10000 --fields node
    """
    from kdcache.sharing import pull_store, select_rows
    from kdcache.store.location import local_path, without_file_scheme

    kept: dict[str, Any] = {
        "teachers": names(values["teachers"]),
        "fields": names(values["fields"]),
    }
    if condition is None and sample is None and seed is None:
        _report(output, pull_store(source, output, jobs=jobs, progress=_moving, **kept))
        return
    _without_cache(click.get_current_context())
    target = local_path(without_file_scheme(output), "what is pulled")
    selection = select_rows(source, condition=condition, sample=sample, seed=seed, **kept)
    click.echo(_cost(selection))
    report = selection.write(target, jobs, bars)
    for note in report.notes:
        click.echo(note)
    click.echo(
        f"{output}: {report.manifest.dataset.n_structures} structures, {size(report.n_bytes)}, "
        f"digest {report.manifest.root_digest[:12]}…; {report.seconds:.1f} s"
    )


@click.command("pack")
@click.argument("store")
@click.option("-o", "--output", required=True, help="New zip file.")
def pack_command(store: str, output: str) -> None:
    """Write STORE into one zip file, uncompressed, that any Zarr reader opens.

    \b
    kdcache pack features.zarr -o features.zip
    kdcache pull features.zip -o copy.zarr
    """
    from kdcache.sharing import pack_store

    _report(output, pack_store(store, output, _moving))


def _report(target: str, report: Any) -> None:
    for note in report.notes:
        click.echo(note)
    digest = f"digest {report.manifest.root_digest[:12]}…"
    if report.was_there:
        click.echo(f"{target}: {size(report.n_bytes)} were there already, {digest}")
        return
    rate = size(int(report.bytes_moved / max(report.seconds, 1e-3)))
    before = report.n_files - report.n_moved
    there = f" ({before} were there)" if before else ""
    click.echo(
        f"{target}: {report.n_files} files{there}, {size(report.n_bytes)}, {digest}; "
        f"{report.seconds:.1f} s ({rate}/s)"
    )


def _cost(selection: Any) -> str:
    cost = selection.cost
    return (
        f"{cost.n_rows} of {cost.of_rows} structures: {selection.description}; "
        f"{size(cost.n_bytes)} are read, {cost.n_blocks} of {cost.of_blocks} blocks"
    )


def _without_cache(ctx: click.Context) -> None:
    """A cache keeps whole files, of which only parts are wanted here."""
    kept = os.environ.pop("KDCACHE_STORE_CACHE", None)
    if kept is not None:
        ctx.call_on_close(lambda: os.environ.__setitem__("KDCACHE_STORE_CACHE", kept))


@contextmanager
def _moving(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    """`bars`, which say the time left on a terminal; in a log, it is added here."""
    with bars(label, total, unit) as advance:
        if sys.stderr.isatty() or not total:
            yield advance
            return
        started, done = time.monotonic(), 0

        def moved(n: int = 1, /, note: str = "") -> None:
            nonlocal done
            done += n
            rate = done / max(time.monotonic() - started, 1e-3)
            left = f"{(total - done) / rate / 60:.0f} min left" if rate else ""
            advance(n, note=note or left)

        yield moved
