"""Histograms as one SVG to stand in a page: no script, no link, no font from elsewhere.

Drawn by matplotlib, without pyplot. Invariant: the same values give the same text.
"""

from __future__ import annotations

import io
import re

import numpy as np
from ase.data import chemical_symbols

from kdcache.card.sample import Panel, Sample

COLUMNS = 3
BARS = 40
SHOWN_ELEMENTS = 30


def draw(sample: Sample) -> str:
    """The elements and every panel as `<svg>…</svg>`."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    n_panels = len(sample.panels) + bool(sample.elements.any())
    n_rows = -(-n_panels // COLUMNS)
    # Text stays text: it is read out, found and drawn with the reader's own font.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "kdcache", "svg.id": "distributions"}):
        figure: Figure = Figure(figsize=(3.4 * COLUMNS, 2.5 * n_rows))
        FigureCanvasSVG(figure)
        for place, panel in enumerate(sample.panels):
            axes = figure.add_subplot(n_rows, COLUMNS, place + 1)
            counts, edges = np.histogram(panel.values, bins=BARS, range=_range(panel))
            axes.stairs(counts, edges, fill=True, color="#2a6f97")
            axes.set_title(panel.title, fontsize=8, parse_math=False)
            axes.set_xlabel(panel.unit, fontsize=7)
            axes.set_yscale("symlog", linthresh=1)
            axes.tick_params(labelsize=6)
        if sample.elements.any():
            axes = figure.add_subplot(n_rows, COLUMNS, n_panels)
            numbers = np.flatnonzero(sample.elements)
            common = numbers[np.argsort(-sample.elements[numbers], kind="stable")][:SHOWN_ELEMENTS]
            shown = np.sort(common)
            axes.bar([chemical_symbols[z] for z in shown], sample.elements[shown], color="#2a6f97")
            axes.set_title("atoms by element", fontsize=8)
            axes.set_yscale("symlog", linthresh=1)
            axes.tick_params(labelsize=6)
        figure.set_layout_engine("constrained")
        drawn = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(drawn, format="svg", metadata=nothing)
    text = drawn.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _range(panel: Panel) -> tuple[float, float]:
    least, largest = float(panel.values.min()), float(panel.values.max())
    if least < largest:
        return least, largest
    half = 0.5 * max(1.0, abs(least))
    return least - half, least + half
