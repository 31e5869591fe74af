"""Draw the distributions of a store: a panel for every quantity."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kdcache.errors import StoreError, printable
from kdcache.store.moments import N_BINS
from kdcache.store.statistics import Distribution, StoreStatistics
from kdcache.structures import FloatArray, IntArray

COLUMNS = 4
# Bars a panel of 3 inches shows: 1,000 bins would be one hue.
BARS = 50


def draw_statistics(statistics: StoreStatistics, path: Path) -> None:
    """A PNG of histograms, counts on a logarithmic axis.

    Raises:
        StoreError: nothing to draw.
    """
    # Drawn without pyplot, which would look for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {name: one for name, one in statistics.quantities.items() if one.count}
    if not shown:
        raise StoreError("There is no finite value in the store, so there is nothing to draw.")
    n_rows = -(-len(shown) // COLUMNS)
    figure: Figure = Figure(figsize=(3.2 * min(COLUMNS, len(shown)), 2.4 * n_rows))
    FigureCanvasAgg(figure)
    for k, (name, one) in enumerate(shown.items()):
        axes = figure.add_subplot(n_rows, min(COLUMNS, len(shown)), k + 1)
        edges, counts = bars_of(one)
        axes.stairs(counts, edges, fill=True)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_title(name, fontsize=8)
        axes.set_xlabel(printable(one.unit), fontsize=7, parse_math=False)
        axes.tick_params(labelsize=6)
    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def bars_of(one: Distribution) -> tuple[FloatArray, IntArray]:
    """Edges [51] and counts [50] of the bars of a panel."""
    least, largest = one.least, one.largest
    if least == largest:
        half = 0.5 * max(1.0, abs(least))
        counts = np.zeros(BARS, np.int64)
        counts[BARS // 2] = one.count
        return np.linspace(least - half, least + half, BARS + 1), counts
    counts = one.bins.reshape(BARS, N_BINS // BARS).sum(axis=1)
    return np.linspace(least, largest, BARS + 1), counts
