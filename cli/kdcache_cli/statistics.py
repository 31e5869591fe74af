"""`kdcache stats`: what the values of a store are like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcache.errors import ConfigError
from kdcache_cli.options import (
    REPORT,
    cluster_of,
    cluster_options,
    store_cache_options,
    store_or_address,
    write_report,
)
from kdcache_cli.progress import bars
from kdcache_cli.tables import table

SHOWN_CHANNELS = 8
DRAWN = (".png", ".pdf", ".svg")


@click.command("stats")
@click.argument("store", type=store_or_address)
@click.option("--channels", is_flag=True, help="Mean and std of every channel of features.")
@click.option("--json", "report", type=REPORT, help="Write all numbers to this file.")
@click.option("--plot", type=REPORT, help="Draw histograms into this .png, .pdf or .svg.")
@cluster_options
@store_cache_options
def stats_command(store: Path | str, report: Path | None, plot: Path | None, **values: Any) -> None:
    """Mean, spread, range and quantiles of every field of STORE, and its elements.

    \b
    kdcache stats features.zarr --json stats.json --plot stats.png
    """
    from kdcache.cluster import open_cluster
    from kdcache.store import open_store
    from kdcache.store.statistics import store_statistics

    if plot is not None and plot.suffix.lower() not in DRAWN:
        raise ConfigError(
            f"--plot {plot}: histograms are drawn as {', '.join(DRAWN)}. Name such a file."
        )
    opened = open_store(store)
    with open_cluster(cluster_of(values)) as cluster:
        found = store_statistics(opened, cluster, by_channel=values["channels"], progress=bars)
    click.echo(_distributions(found))
    click.echo(_elements(found))
    if values["channels"]:
        click.echo(_channels(found))
    if report is not None:
        write_report(report, found.to_json())
    if plot is not None:
        from kdcache.store.histograms import draw_statistics

        draw_statistics(found, plot)
    written = [str(path) for path in (report, plot) if path is not None]
    click.echo(
        f"{store}: {found.n_structures} structures, {found.n_atoms} atoms, "
        f"{found.n_edges} edges" + (f"; {', '.join(written)}" if written else "")
    )


def _distributions(found: Any) -> str:
    header = ["quantity", "unit", "count", "NaN", "zeros", "mean", "std", "rms"]
    header += ["min", "5 %", "median", "95 %", "max"]
    rows = []
    for name, one in found.quantities.items():
        numbers = [one.mean, one.std, one.rms, one.least]
        numbers += [one.quantiles[share] for share in (0.05, 0.5, 0.95)]
        counts = [str(one.count), str(one.n_nan), f"{100 * one.zeros:.1f} %"]
        shown = [f"{number:.4g}" for number in (*numbers, one.largest)]
        rows.append([name, one.unit or "–", *counts, *shown])
        if one.n_infinite:
            rows.append([f"  {one.n_infinite} values are infinite", *[""] * (len(header) - 1)])
    return table(header, rows)


def _elements(found: Any) -> str:
    from ase.data import chemical_symbols

    rows = [
        [
            chemical_symbols[number],
            str(atoms),
            f"{100 * atoms / found.n_atoms:.1f} %",
            str(structures),
        ]
        for number, (atoms, structures) in found.elements.items()
    ]
    return table(["element", "atoms", "share", "structures"], rows)


def _channels(found: Any) -> str:
    """The channels that spread most and least; all of them are in the JSON."""
    rows = []
    for name, one in found.quantities.items():
        order = sorted(range(len(one.channel_std)), key=lambda k: -one.channel_std[k])
        half = SHOWN_CHANNELS // 2
        for k in order if len(order) <= SHOWN_CHANNELS else [*order[:half], *order[-half:]]:
            mean, std = one.channel_mean[k], one.channel_std[k]
            rows.append([f"{name} channel {k}", f"{mean:.4g}", f"{std:.4g}"])
    return table(["widest and narrowest channels", "mean", "std"], rows)
