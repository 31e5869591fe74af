"""`kdcache import`: a dataset into a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from kdcache.errors import ConfigError, printable
from kdcache_cli.options import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    F,
    fractions,
    read_options,
    reading_options,
    refuse_runs,
)
from kdcache_cli.progress import bars
from kdcache_cli.tables import size

LAYOUT = (
    click.option(
        "--split", multiple=True, help="Hold structures out at random: val=0.05,test=0.1."
    ),
    click.option(
        "--seed",
        type=NOT_NEGATIVE,
        default=0,
        show_default=True,
        help="Of the order and of --split.",
    ),
    click.option("--cutoff", type=float, help="Keep neighbour lists up to this distance, Å."),
    click.option(
        "--max-neighbors", type=AT_LEAST_ONE, help="Nearest neighbours kept (with --cutoff)."
    ),
    click.option("--licence-structures", default="", help="Licence of the structures."),
    click.option("--licence-labels", default="", help="Licence of energies and forces."),
)


def layout_options(command: F) -> F:
    """Order, splits, graph and licences of a new store."""
    for option in reversed(LAYOUT):
        command = option(command)
    return command


def layout_of(values: Mapping[str, Any]) -> Any:
    """The `ImportOptions` that `layout_options` name.

    Raises:
        ConfigError: a limit of neighbours without a cutoff, or shares that are none.
    """
    from kdcache.graphs import GraphRule
    from kdcache.ingest import ImportOptions

    cutoff, max_neighbors = values["cutoff"], values["max_neighbors"]
    if max_neighbors is not None and cutoff is None:
        raise ConfigError("--max-neighbors belongs to a --cutoff. Give both, or neither.")
    return ImportOptions(
        seed=values["seed"],
        split=fractions(",".join(values["split"])),
        graph=GraphRule(cutoff, max_neighbors) if cutoff is not None else None,
        licence_structures=values["licence_structures"],
        licence_labels=values["licence_labels"],
    )


@click.command("import")
@click.argument("data", nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="New store.")
@reading_options
@layout_options
def import_command(data: tuple[str, ...], output: Path, **values: Any) -> None:
    """Read DATA (files or globs: extended XYZ, any ASE format, ASE databases, npz, HDF5, Parquet,
    Open Catalyst LMDB, or a store) into a store that every other command takes.

    \b
    kdcache import train.extxyz val.extxyz -o data.zarr
    kdcache import rmd17_ethanol.npz --energy-unit kcal/mol -o ethanol.zarr --split val=0.05
    """
    from kdcache.ingest import import_dataset

    read = read_options(values)
    refuse_runs(data)
    options = replace(layout_of(values), read=read)
    store = import_dataset(list(data), output, options, progress=bars)
    report_store(store)


def report_store(store: Any) -> None:
    """Say what was read, and how."""
    for note in store.manifest.dataset.notes:
        click.echo(printable(note))
    n_bytes = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
    click.echo(
        f"{store.path}: {len(store.index)} structures, {int(store.index.n_atoms.sum())} atoms, "
        f"{store.manifest.dataset.n_labelled} labelled, {size(n_bytes)}"
    )
