"""`kdcache annotate`, `kdcache withhold` and `kdcache join`: what a store needs between labs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcache.errors import ConfigError
from kdcache_cli.options import (
    read_options,
    reading_options,
    refuse_runs,
    store_cache_options,
    store_or_address,
)
from kdcache_cli.progress import bars
from kdcache_cli.tables import size

OUTPUT = click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="New store."
)


@click.command("annotate")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--creator", help="Who made the store: names, a group, an ORCID.")
@click.option("--citation", help="What to cite: free text, a DOI.")
@click.option("--licence-structures", help="Of the structures; an SPDX expression if there is one.")
@click.option("--licence-labels", help="Of energies and forces.")
@click.option(
    "--licence-teacher",
    "licence_teachers",
    multiple=True,
    metavar="NAME=LICENCE",
    help="Of the weights of a teacher.",
)
@click.option("--remove-signature", is_flag=True, help="Of a signed store, whose content changes.")
def annotate_command(store: Path, remove_signature: bool, **values: Any) -> None:
    """State who made STORE, what to cite and its licences; '' takes a statement back.

    Only the manifest is written anew. The root digest changes with it.

    \b
    kdcache annotate features.zarr --creator "A. Lab" --citation doi:10.1000/xyz \\
        --licence-structures CC-BY-4.0 --licence-teacher painn=MIT
    """
    from kdcache.store import read_manifest
    from kdcache.store.annotation import Annotation, annotate_store
    from kdcache.store.licences import is_spdx

    teachers: dict[str, str] = {}
    for text in values.pop("licence_teachers"):
        name, equals, licence = text.partition("=")
        if not equals or not name or name in teachers:
            raise ConfigError(
                f"--licence-teacher {text}: NAME=LICENCE is expected, each teacher once."
            )
        teachers[name] = licence
    if not teachers and all(value is None for value in values.values()):
        raise ConfigError("Nothing is stated. Name --creator, --citation or a licence.")
    annotation = Annotation(**values, licence_teachers=teachers)
    before = read_manifest(store).root_digest if (store / "manifest.json").is_file() else ""
    manifest = annotate_store(store, annotation, remove_signature=remove_signature)
    stated = [values["licence_structures"], values["licence_labels"], *teachers.values()]
    for licence in dict.fromkeys(text for text in stated if text and not is_spdx(text)):
        click.echo(f"{licence}: no SPDX identifier known here; kept as free text")
    if manifest.root_digest == before:
        click.echo(f"{store}: nothing changes, digest {before[:12]}…")
    else:
        click.echo(
            f"{store}: root digest {manifest.root_digest[:12]}…, before {before[:12]}…: whoever "
            f"was given the old one needs this one"
        )


@click.command("withhold")
@click.argument("store", type=store_or_address)
@OUTPUT
@store_cache_options
def withhold_command(store: Path | str, output: Path) -> None:
    """Write STORE anew without its structures and labels, for those who have the data.

    Features, neighbour lists and the index stay: ids, groups, splits, numbers of atoms and one-way
    hashes of the structures.

    \b
    kdcache withhold features.zarr -o shared.zarr
    kdcache join shared.zarr data.extxyz -o features.zarr
    """
    from kdcache.store import open_store
    from kdcache.store.withholding import write_without_structures

    manifest, unsigned = write_without_structures(open_store(store), output, bars)
    part = manifest.withheld
    left_out = ", ".join(sorted(part.structures)) if part else ""
    click.echo(f"left out: {left_out}")
    if unsigned:
        click.echo(unsigned)
    click.echo(f"{output}: digest {manifest.root_digest[:12]}…, {_size(output)}")


@click.command("join")
@click.argument("store", type=store_or_address)
@click.argument("data", nargs=-1, required=True)
@OUTPUT
@click.option(
    "--own-labels",
    is_flag=True,
    help="Keep energies and forces of DATA that are not the sender's, under another root digest.",
)
@store_cache_options
@reading_options
def join_command(
    store: Path | str, data: tuple[str, ...], output: Path, own_labels: bool, **values: Any
) -> None:
    """Write STORE anew with the structures it was passed on without, out of DATA: files, globs or
    stores, in any order. Every structure is found by its contents.

    \b
    kdcache join shared.zarr data.extxyz -o features.zarr
    """
    from kdcache.readers import read_structures
    from kdcache.store import open_store
    from kdcache.store.joining import join_store

    options = read_options(values)
    refuse_runs(data)
    structures = read_structures(list(data), options)
    report = join_store(open_store(store), structures, output, own_labels=own_labels, progress=bars)
    for line in report.lines:
        click.echo(line)
    click.echo(f"{output}: digest {report.manifest.root_digest[:12]}…, {_size(output)}")


def _size(store: Path) -> str:
    return size(sum(file.stat().st_size for file in store.rglob("*") if file.is_file()))
