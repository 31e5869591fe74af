"""`kdcache evaluate`: errors of a trained model on labelled data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from kdcache_cli.options import (
    REPORT,
    max_atoms_option,
    read_options,
    reading_options,
    refuse_runs,
    store_cache_options,
    write_report,
)
from kdcache_cli.progress import bars
from kdcache_cli.tables import table


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data", nargs=-1, required=True)
@store_cache_options
@reading_options
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test"]),
    help="Only structures of this split.",
)
@click.option("--max-force", type=float, help="Leave out structures with a larger force, eV/Å.")
@click.option("--all-atoms", is_flag=True, help="Count forces on fixed atoms, too.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@max_atoms_option
@click.option("--json", "json_file", type=REPORT, help="Write the numbers here.")
def evaluate_command(run: Path, data: tuple[str, ...], **values: Any) -> None:
    """Errors of RUN on DATA (files, globs or a store): energies, forces, by group.

    \b
    kdcache evaluate student test.extxyz --json student.json
    """
    from kdcache.checkpoint import load_potential, training_seconds
    from kdcache.devices import find_device
    from kdcache.evaluate import kept, predict_structures
    from kdcache.readers import read_structures

    options = read_options(values)
    refuse_runs(data)
    dataset = read_structures(list(data), options)
    potential = load_potential(run, device=str(find_device(values["device"], "--device")))
    structures = kept(dataset, split=values["split"], max_force=values["max_force"])
    started = time.perf_counter()
    predictions = predict_structures(
        potential,
        structures,
        max_atoms=values["max_atoms"],
        free_atoms_only=not values["all_atoms"],
        progress=bars,
    )
    seconds = time.perf_counter() - started
    whole, groups = predictions.metrics(), predictions.by_group()
    click.echo(_shown({"all": whole, **groups}))
    if predictions.n_fixed:
        click.echo(
            f"forces without {predictions.n_fixed} of {whole.n_atoms} atoms that the data holds "
            f"fixed (--all-atoms counts them)"
        )
    if values["json_file"]:
        report = {
            **whole.as_dict(),
            "n_parameters": sum(p.numel() for p in potential.parameters()),
            "training_seconds": training_seconds(run),
            "structures_per_second": whole.n_structures / seconds,
            "groups": {name: metrics.as_dict() for name, metrics in groups.items()},
        }
        write_report(values["json_file"], report)


def _shown(found: dict[str, Any]) -> str:
    header = ["", "structures", "E MAE", "E RMSE", "E MAE/atom", "F MAE", "F RMSE", "F cos", "EFwT"]
    units = ["", "", "meV", "meV", "meV", "meV/Å", "meV/Å", "", "%"]
    rows = [
        [
            name,
            str(m.n_structures),
            f"{m.energy_mae_mev:.2f}",
            f"{m.energy_rmse_mev:.2f}",
            f"{m.energy_mae_mev_per_atom:.2f}",
            f"{m.force_mae_mev_per_a:.2f}",
            f"{m.force_rmse_mev_per_a:.2f}",
            f"{m.force_cos:.4f}",
            f"{100 * m.efwt:.2f}",
        ]
        for name, m in found.items()
    ]
    return table(header, [units, *rows])
