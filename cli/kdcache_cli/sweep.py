"""`kdcache sweep`: many students over one store, one table."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import click

from kdcache_cli.options import (
    AT_LEAST_ONE,
    read_options,
    reading_options,
    refuse_runs,
    store_cache_options,
)
from kdcache_cli.progress import bars
from kdcache_cli.tables import table


@click.command("sweep")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory of the runs."
)
@click.option(
    "--processes",
    type=AT_LEAST_ONE,
    help="Runs at a time (default: one per GPU, else cores over training.threads).",
)
@click.option("--set", "overrides", multiple=True, help="Any setting of all runs, as in the base.")
@click.option(
    "--split", type=click.Choice(["val", "test"]), help="Errors on this split of the store."
)
@click.option("--data", multiple=True, help="Errors on these files instead.")
@store_cache_options
@reading_options
def sweep_command(file: Path, output: Path, **values: Any) -> None:
    """Train and evaluate every run of the grid in FILE, and print one table.

    Finished runs are read back, a stopped sweep goes on with the same command, further values
    add runs. Exit code 1 when a run failed.

    \b
    store: features.zarr
    base: student.yaml
    strategies: [control, {name: n2n, weights: {n2n: [10, 100]}}]
    grid:
      data.labels: [1.0, 0.05]
      training.seed: [0, 1, 2]
    """
    from kdcache.errors import ConfigError
    from kdcache.sweep import load_sweep, rows_of, run_sweep, write_results
    from kdcache.sweep.evaluation import Target

    read = read_options(values)
    sweep = load_sweep(file)
    if values["split"] and values["data"]:
        raise ConfigError("--split is of the store, --data names files. Give one of them.")
    refuse_runs(values["data"])
    result = run_sweep(
        sweep,
        output,
        overrides=values["overrides"],
        target=Target(values["split"] or sweep.split, tuple(values["data"]), read),
        processes=values["processes"],
        progress=bars,
    )
    paths = write_results(result, output)
    if result.reports:
        click.echo(_shown(rows_of(result), result))
    for name, failure in result.failures.items():
        click.secho(f"failed: {name}: {failure}", err=True, fg="red")
    click.echo(f"{len(result.reports)} of {len(result.jobs)} runs; {paths[0]}, {paths[1].name}")
    if result.failures:
        sys.exit(1)


def _shown(rows: list[Any], result: Any) -> str:
    """A line per strategy and setting, mean ± standard deviation over seeds."""
    settings = list(dict.fromkeys(key for row in rows for key in row.settings))
    header = [f"errors on {result.target}", *map(_short, settings), "runs", "E MAE", "F MAE",
              "F cos", "EFwT", "gap E", "gap F"]  # fmt: skip
    units = ["", *("" for _ in settings), "", "meV", "meV/Å", "", "%", "%", "%"]
    cells = [
        [
            row.strategy or "base",
            *(row.settings.get(key, "") for key in settings),
            str(row.n_runs),
            _spread(row, "energy_mae_mev", 1, 1),
            _spread(row, "force_mae_mev_per_a", 1, 1),
            _spread(row, "force_cos", 1, 3),
            _spread(row, "efwt", 100, 1),
            _gap(row, "energy_mae_mev"),
            _gap(row, "force_mae_mev_per_a"),
        ]
        for row in rows
    ]
    for name, metrics in result.teachers.items():
        cells.append(
            [
                f"teacher {name}",
                *("" for _ in settings),
                "",
                f"{metrics.energy_mae_mev:.1f}",
                f"{metrics.force_mae_mev_per_a:.1f}",
                f"{metrics.force_cos:.3f}",
                f"{100 * metrics.efwt:.1f}",
                "",
                "",
            ]
        )
    return table(header, [units, *cells])


def _short(setting: str) -> str:
    """The last two parts of a setting's name: they tell one from another well enough."""
    if setting.startswith("lambda."):
        return f"λ {setting.removeprefix('lambda.')}"
    return ".".join(setting.split(".")[-2:])


def _spread(row: Any, key: str, factor: float, digits: int) -> str:
    mean = f"{factor * row.mean[key]:.{digits}f}"
    std = row.std[key]
    return mean if math.isnan(std) else f"{mean} ± {factor * std:.{digits}f}"


def _gap(row: Any, key: str) -> str:
    share = row.gap_closed.get(key, math.nan)
    return "" if math.isnan(share) or row.strategy == "control" else str(round(100 * share))
