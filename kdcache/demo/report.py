"""What the demo shows at its end: rows of errors, and a picture of them.

Owns the arithmetic of the rows and the drawing; reading runs is `kdcache.checkpoint`'s.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kdcache.evaluate import gap_closed


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the demo, evaluated on the held-out split.

    Attributes:
        name: "teacher", "control" or the strategy.
        energy_mae_mev, force_mae_mev_per_a, force_cos, efwt: see `kdcache.evaluate.Metrics`.
        gap_closed_energy, gap_closed_force: share of the gap between control and teacher.
        n_parameters: trainable numbers of the model.
        training_seconds: wall time of its training.
        structures_per_second: evaluated per second, neighbour lists included.
    """

    name: str
    energy_mae_mev: float
    force_mae_mev_per_a: float
    force_cos: float
    efwt: float
    gap_closed_energy: float
    gap_closed_force: float
    n_parameters: int
    training_seconds: float
    structures_per_second: float

    def as_dict(self) -> dict[str, str | float]:
        return asdict(self)


def rows(evaluations: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Rows in the order given, with the gap each closes.

    Args:
        evaluations: by name, "teacher" and "control" among them: the metrics of `Metrics`, and
            n_parameters, training_seconds, structures_per_second.
    """
    teacher, control = evaluations["teacher"], evaluations["control"]

    def row(name: str, values: Mapping[str, float]) -> Row:
        energy, force = (
            gap_closed(values[key], control[key], teacher[key])
            for key in ("energy_mae_mev", "force_mae_mev_per_a")
        )
        return Row(
            name=name,
            energy_mae_mev=values["energy_mae_mev"],
            force_mae_mev_per_a=values["force_mae_mev_per_a"],
            force_cos=values["force_cos"],
            efwt=values["efwt"],
            gap_closed_energy=energy,
            gap_closed_force=force,
            n_parameters=int(values["n_parameters"]),
            training_seconds=values["training_seconds"],
            structures_per_second=values["structures_per_second"],
        )

    return [row(name, values) for name, values in evaluations.items()]


def draw(path: Path, found: Sequence[Row], curves: Mapping[str, Path]) -> None:
    """Learning curves and bars of the errors, as a PNG.

    Args:
        path: of the picture.
        found: the rows.
        curves: metrics.csv of every run, by row name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    quantities = (
        ("val_energy_mae_mev", "energy_mae_mev", "energy MAE (meV)"),
        ("val_force_mae_mev_per_a", "force_mae_mev_per_a", "force MAE (meV/Å)"),
    )
    colours = {row.name: f"C{k}" for k, row in enumerate(found)}
    for column, (curve_key, row_key, label) in enumerate(quantities):
        top, bottom = axes[0, column], axes[1, column]
        for name, metrics in curves.items():
            steps, values = read_curve(metrics, curve_key)
            style = "--" if name in ("teacher", "control") else "-"
            top.plot(steps, values, style, color=colours[name], label=name)
        top.set(xlabel="step", ylabel=f"{label}, validation", yscale="log")
        top.grid(alpha=0.3, which="both")
        names = [row.name for row in found]
        values = [getattr(row, row_key) for row in found]
        bars = bottom.bar(names, values, color=[colours[name] for name in names])
        bottom.bar_label(bars, fmt="%.0f", fontsize=9)
        bottom.axhline(values[names.index("teacher")], ls=":", color="grey")
        bottom.axhline(values[names.index("control")], ls="--", color="grey")
        bottom.set_ylabel(f"{label}, held-out")
        bottom.tick_params(axis="x", rotation=20)
    axes[0, 0].legend(fontsize=9)
    figure.suptitle("Students with few labels: ground truth alone (control) and with the teacher")
    figure.savefig(path, dpi=110)


def read_curve(path: Path, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one column of a run's metrics.csv, rows without a value left out."""
    with path.open(newline="") as file:
        found = [(float(line["step"]), line[key]) for line in csv.DictReader(file)]
    kept = [(step, float(value)) for step, value in found if value]
    return [step for step, _ in kept], [value for _, value in kept]
