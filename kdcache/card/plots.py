"""Histograms as one SVG to stand in a page: no script, no link, no font from elsewhere.

Drawn by matplotlib, without pyplot. Invariant: the same values give the same text.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import numpy as np
from ase.data import chemical_symbols

from kdcache.card.sample import Panel, Sample
from kdcache.structures import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
BARS = 40
SHOWN_ELEMENTS = 18
# Inches of a panel, and of the room around its axes: left, right, below, above.
WIDTH, HEIGHT = 3.4, 2.4
MARGINS = (0.5, 0.15, 0.55, 0.3)
# Characters of a title that fit above a panel.
LONGEST_TITLE = 46
BLUE = "#2a6f97"


def draw(sample: Sample) -> str:
    """The elements and every panel as `<svg>…</svg>`."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    n_panels = len(sample.panels) + bool(sample.elements.any())
    n_rows = -(-n_panels // COLUMNS)
    # Text stays text: it is read out, found and drawn with the reader's own font.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "kdcache", "svg.id": "distributions"}):
        figure: Figure = Figure(figsize=(WIDTH * COLUMNS, HEIGHT * n_rows))
        FigureCanvasSVG(figure)
        for place, panel in enumerate(sample.panels):
            _draw_panel(figure.add_axes(_box(place, n_rows)), panel)
        if sample.elements.any():
            _draw_elements(figure.add_axes(_box(n_panels - 1, n_rows)), sample)
        drawn = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(drawn, format="svg", metadata=nothing)
    text = drawn.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{n_panels} histograms" ', 1)


def _box(place: int, n_rows: int) -> tuple[float, float, float, float]:
    """Left, bottom, width and height of the axes of a panel, as shares of the figure.

    By hand: matplotlib's own layouts take a minute for thirty panels.
    """
    row, column = divmod(place, COLUMNS)
    left, right, below, above = MARGINS
    width, height = WIDTH * COLUMNS, HEIGHT * n_rows
    return (
        (column * WIDTH + left) / width,
        ((n_rows - 1 - row) * HEIGHT + below) / height,
        (WIDTH - left - right) / width,
        (HEIGHT - below - above) / height,
    )


def _draw_panel(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    edges = bar_edges(panel)
    counts, _ = np.histogram(panel.values, bins=edges)
    axes.stairs(counts, edges, fill=True, color=BLUE)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=panel.values.dtype.kind in "iu"))
    axes.set_xlabel(panel.unit, fontsize=8)
    _finish(axes, panel.title)


def _draw_elements(axes: Axes, sample: Sample) -> None:
    numbers = np.flatnonzero(sample.elements)
    common = numbers[np.argsort(-sample.elements[numbers], kind="stable")][:SHOWN_ELEMENTS]
    shown = np.sort(common)
    axes.bar([chemical_symbols[z] for z in shown], sample.elements[shown], color=BLUE)
    axes.set_xlim(-1, max(len(shown), 4))
    few = "" if len(shown) == len(numbers) else f", {len(shown)} of {len(numbers)}"
    _finish(axes, f"atoms by element{few}")
    if len(shown) > 12:
        axes.tick_params(axis="x", labelsize=7)


def _finish(axes: Axes, title: str) -> None:
    half = LONGEST_TITLE // 2
    shown = title if len(title) <= LONGEST_TITLE else f"{title[: half - 1]}…{title[-half:]}"
    axes.set_title(shown, fontsize=9, parse_math=False)
    axes.set_yscale("symlog", linthresh=1)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def bar_edges(panel: Panel) -> FloatArray:
    """Edges of the bars: around whole numbers that are few, else equal parts of the range."""
    least, largest = float(panel.values.min()), float(panel.values.max())
    if panel.values.dtype.kind in "iu" and largest - least < BARS:
        return np.arange(least, largest + 2) - 0.5
    # Bars narrower than the spacing of numbers have no edges.
    if largest - least <= 2 * BARS * np.spacing(max(abs(least), abs(largest))):
        half = 0.5 * max(1.0, abs(least))
        least, largest = least - half, largest + half
    return np.linspace(least, largest, BARS + 1)
