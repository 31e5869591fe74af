"""`kdcache subset`, `kdcache merge` and `kdcache convert`: new stores out of finished ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from kdcache.errors import ConfigError, did_you_mean
from kdcache_cli.dumped import names
from kdcache_cli.options import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    cluster_of,
    cluster_options,
    store_cache_options,
    store_or_address,
)
from kdcache_cli.progress import bars
from kdcache_cli.tables import size

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path, dir_okay=False)

OUTPUT = (
    click.option(
        "-o", "--output", type=click.Path(path_type=Path), required=True, help="New store."
    ),
    click.option("--block-atoms", type=AT_LEAST_ONE, help="Atoms in a block."),
    click.option("--shard-blocks", type=AT_LEAST_ONE, help="Blocks in a file."),
)
KEPT = (
    click.option("--teachers", help="Teachers to keep, by comma; '' for none (default: all)."),
    click.option("--fields", help="Fields of the teachers to keep, by comma (default: all)."),
)


def _with(options: tuple[Callable[[Any], Any], ...]) -> Callable[[F], F]:
    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command("subset")
@click.argument("store", type=store_or_address)
@_with(OUTPUT)
@click.option("--split", help="Of these splits, by comma: train, val, test or unnamed.")
@click.option("--origin", help="Of these origins, by comma: data, rattled, …")
@click.option("--ids", type=FILE, help="File of structure ids, one a line.")
@click.option("--rows", type=FILE, help="File of rows of the index, counted from 0, one a line.")
@click.option("--max-atoms", type=AT_LEAST_ONE, help="Structures of at most so many atoms.")
@click.option("--elements", help="Structures of these elements only: H,C,O.")
@click.option("--sample", type=AT_LEAST_ONE, help="So many of what is left, at random.")
@click.option("--seed", type=NOT_NEGATIVE, default=0, show_default=True, help="Of --sample.")
@_with(KEPT)
@cluster_options
@store_cache_options
def subset_command(store: Path | str, output: Path, **values: Any) -> None:
    """Write the structures of STORE that satisfy every option to a new store, in its order.

    \b
    kdcache subset features.zarr -o train.zarr --split train --fields node,energy
    kdcache subset features.zarr -o small.zarr --sample 10000 --max-atoms 50 --elements H,C,N,O
    """
    from kdcache.cluster import open_cluster
    from kdcache.store import open_store
    from kdcache.store.choosing import Choice, choose_rows
    from kdcache.store.combining import plan_subset
    from kdcache.store.rewrite import refuse_existing, write_rewrite

    choice = Choice(
        splits=names(values["split"]),
        origins=names(values["origin"]),
        ids=None if values["ids"] is None else _lines(values["ids"]),
        rows=None if values["rows"] is None else _numbers(values["rows"]),
        max_atoms=values["max_atoms"],
        elements=_elements(values["elements"]),
        sample=values["sample"],
        seed=values["seed"],
    )
    refuse_existing(output)
    opened = open_store(store)
    with open_cluster(cluster_of(values)) as cluster:
        rows = choose_rows(opened, choice, cluster, bars)
        rewrite = plan_subset(
            opened,
            rows,
            choice.description,
            cluster,
            teachers=names(values["teachers"]),
            fields=names(values["fields"]),
            atom_capacity=values["block_atoms"],
            blocks_per_shard=values["shard_blocks"],
            progress=bars,
        )
        click.echo(f"{len(rows)} of {len(opened)} structures: {choice.description}")
        _report(output, write_rewrite(output, rewrite, cluster, bars))


@click.command("merge")
@click.argument("stores", nargs=-1, required=True, type=store_or_address)
@_with(OUTPUT)
@click.option("--seed", type=NOT_NEGATIVE, default=0, show_default=True, help="Of the order.")
@click.option("--skip-repeated", is_flag=True, help="Keep the first of structures that are equal.")
@click.option(
    "--same-structures",
    is_flag=True,
    help="STORES are of one dataset: unite their teachers in the first one's order and layout.",
)
@click.option(
    "--rename",
    multiple=True,
    metavar="[N:]OLD=NEW",
    help="Name of a teacher of the N-th store; without N, of every store but the first.",
)
@_with(KEPT)
@cluster_options
@store_cache_options
def merge_command(stores: tuple[Path | str, ...], output: Path, **values: Any) -> None:
    """Write the structures of several STORES to a new store, in a random order.

    \b
    kdcache merge part1.zarr part2.zarr -o all.zarr
    kdcache merge features.zarr other.zarr -o both.zarr --same-structures --rename teacher=second
    """
    from kdcache.cluster import open_cluster
    from kdcache.store import open_store
    from kdcache.store.combining import plan_merge
    from kdcache.store.rewrite import refuse_existing, write_rewrite
    from kdcache.store.uniting import plan_union

    _refuse_of_other_merge(click.get_current_context(), values["same_structures"])
    refuse_existing(output)
    opened = [open_store(store) for store in stores]
    kept = {"teachers": names(values["teachers"]), "fields": names(values["fields"])}
    with open_cluster(cluster_of(values)) as cluster:
        if values["same_structures"]:
            renamed = _renamed(values["rename"], opened)
            rewrite = plan_union(opened, rename=renamed, **kept)
        else:
            rewrite = plan_merge(
                opened,
                cluster,
                seed=values["seed"],
                skip_repeated=values["skip_repeated"],
                atom_capacity=values["block_atoms"],
                blocks_per_shard=values["shard_blocks"],
                progress=bars,
                **kept,
            )
        _report(output, write_rewrite(output, rewrite, cluster, bars))


@click.command("convert")
@click.argument("store", type=store_or_address)
@_with(OUTPUT)
@click.option(
    "--codec",
    "codecs",
    multiple=True,
    help="half, exact or compact for all features, or by field: node=compact,vector=exact.",
)
@click.option(
    "--on-overflow",
    type=click.Choice(["stop", "clip"]),
    default="stop",
    show_default=True,
    help="Values beyond ±65504 where a field becomes half.",
)
@cluster_options
@store_cache_options
def convert_command(store: Path | str, output: Path, **values: Any) -> None:
    """Write STORE anew with other codecs or in other blocks.

    \b
    kdcache convert features.zarr -o small.zarr --codec node=compact
    kdcache convert features.zarr -o chunked.zarr --block-atoms 8192 --shard-blocks 8
    """
    from kdcache.cluster import open_cluster
    from kdcache.store import open_store
    from kdcache.store.converting import parse_codecs, plan_conversion
    from kdcache.store.rewrite import refuse_existing, write_rewrite

    codecs, features = parse_codecs(values["codecs"]) if values["codecs"] else ({}, None)
    refuse_existing(output)
    rewrite = plan_conversion(
        open_store(store),
        codecs,
        features,
        atom_capacity=values["block_atoms"],
        blocks_per_shard=values["shard_blocks"],
        on_overflow=values["on_overflow"],
    )
    with open_cluster(cluster_of(values)) as cluster:
        _report(output, write_rewrite(output, rewrite, cluster, bars))


def _report(output: Path, report: Any) -> None:
    for note in report.notes:
        click.echo(note)
    n_structures = report.manifest.dataset.n_structures
    rate = report.n_bytes / max(report.seconds, 1e-3)
    click.echo(
        f"{output}: {n_structures} structures, {report.manifest.n_atoms} atoms, "
        f"{size(report.n_bytes)}, digest {report.manifest.root_digest[:12]}…; "
        f"{report.seconds:.1f} s ({size(int(rate))}/s)"
    )


def _refuse_of_other_merge(context: click.Context, same_structures: bool) -> None:
    """An option that this kind of merge does not read would be ignored in silence."""
    other = ("seed", "skip_repeated", "block_atoms", "shard_blocks")
    for option in other if same_structures else ("rename",):
        if context.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE:
            flag = "--" + option.replace("_", "-")
            way = "without" if same_structures else "with"
            raise ConfigError(f"{flag} belongs to a merge {way} --same-structures. Leave it out.")


def _renamed(texts: tuple[str, ...], stores: list[Any]) -> dict[tuple[int, str], str]:
    found: dict[tuple[int, str], str] = {}
    for text in texts:
        number, colon, pair = text.rpartition(":")
        old, equals, new = pair.partition("=")
        if not equals or not old or not new or (colon and not number.isdecimal()):
            raise ConfigError(f"--rename {text} is not [N:]OLD=NEW, e.g. --rename 2:painn=second.")
        if colon and not 1 <= int(number) <= len(stores):
            raise ConfigError(f"--rename {text}: there are stores 1 to {len(stores)}.")
        numbers = [int(number) - 1] if colon else range(1, len(stores))
        holders = [k for k in numbers if old in stores[k].teachers]
        if not holders:
            known = {name for k in numbers for name in stores[k].teachers}
            raise ConfigError(
                f"--rename {text}: no such store has a teacher {old!r}: {did_you_mean(old, known)}"
            )
        found |= {(k, old): new for k in holders}
    return found


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _numbers(path: Path) -> list[int]:
    lines = _lines(path)
    for line in lines:
        if not line.isdecimal():
            raise ConfigError(f"{path}: {line!r} is no row number. One number a line is expected.")
    return [int(line) for line in lines]


def _elements(text: str | None) -> list[int] | None:
    if text is None:
        return None
    from ase.data import atomic_numbers

    for symbol in names(text) or ():
        if symbol not in atomic_numbers:
            known = [name for name in atomic_numbers if name != "X"]
            raise ConfigError(
                f"--elements {text}: {symbol!r} is none: {did_you_mean(symbol, known)}"
            )
    return [int(atomic_numbers[symbol]) for symbol in names(text) or ()]
