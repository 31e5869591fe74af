"""Draw a comparison: CKA of every pair of layers, and what distillation added to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdcache.compare.pipeline import Comparison
from kdcache.structures import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Beyond so many cells numbers in them cannot be read.
NUMBERED_CELLS = 400


def draw(comparison: Comparison, path: Path) -> None:
    """A PNG: a's layers upwards, b's to the right; pairs that were trained on are marked.

    With a control, a second map shows the gain. Pairs that do not compare stay white.

    Args:
        comparison: at least one pair.
        path: of the picture.

    Source: the layout of Ekström Kelvinius et al. 2023, Figures 2, 3 and 6 to 8.
    """
    # Drawn without pyplot, which would look for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    maps = {"CKA": _grid(comparison, "cka")}
    if any(pair.gain is not None for pair in comparison.pairs):
        maps["similarity gain"] = _grid(comparison, "gain")
    # In inches: a cell 0.45 wide, a letter of a label 0.08.
    width, height = (
        1.5 + 0.45 * len(across) + 0.08 * max(map(len, along))
        for across, along in (
            (comparison.b_layers, comparison.a_layers),
            (comparison.a_layers, comparison.b_layers),
        )
    )
    figure: Figure = Figure(figsize=(len(maps) * width, height), layout="constrained")
    FigureCanvasAgg(figure)
    for k, (title, grid) in enumerate(maps.items()):
        axes = figure.add_subplot(1, len(maps), k + 1)
        _map(figure, axes, comparison, title, grid)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _grid(comparison: Comparison, column: str) -> FloatArray:
    rows = {name: k for k, name in enumerate(comparison.a_layers)}
    columns = {name: k for k, name in enumerate(comparison.b_layers)}
    grid = np.full((len(rows), len(columns)), np.nan)
    for pair in comparison.pairs:
        grid[rows[pair.a], columns[pair.b]] = getattr(pair, column)
    return grid


def _map(figure: Figure, axes: Axes, comparison: Comparison, title: str, grid: FloatArray) -> None:
    gain = title != "CKA"
    known = grid[np.isfinite(grid)]
    reach = float(np.abs(known).max(initial=0.01))
    low, high = (-reach, reach) if gain else (0.0, 1.0)
    image = axes.imshow(
        grid, cmap="RdBu_r" if gain else "viridis", vmin=low, vmax=high, origin="lower"
    )
    figure.colorbar(image, ax=axes, label=title)
    axes.set_xticks(range(len(comparison.b_layers)), comparison.b_layers, rotation=90)
    axes.set_yticks(range(len(comparison.a_layers)), comparison.a_layers)
    axes.set_xlabel(comparison.b)
    axes.set_ylabel(comparison.a)
    axes.set_title(f"{title}, {comparison.n_structures} structures")
    numbered = grid.size <= NUMBERED_CELLS
    marked = {(pair.a, pair.b) for pair in comparison.pairs if pair.taught}
    for i, a in enumerate(comparison.a_layers):
        for j, b in enumerate(comparison.b_layers):
            text = f"{grid[i, j]:.2f}" if numbered and np.isfinite(grid[i, j]) else ""
            text += "↙" if (a, b) in marked else ""
            # Viridis is dark at its lower end, the other map at both.
            dark = abs(grid[i, j]) > 0.6 * reach if gain else grid[i, j] < 0.6
            if text:
                color = "white" if dark else "black"
                axes.text(j, i, text, ha="center", va="center", fontsize=6, color=color)
