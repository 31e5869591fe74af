"""Plain-text tables for the terminal, whoever wrote what stands in them."""

from __future__ import annotations

from collections.abc import Sequence

from kdcache.errors import printable


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    header, *rows = ([printable(cell) for cell in row] for row in [header, *rows])
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    rule = "─" * len(
        line([" " * width for width in widths]).ljust(sum(widths) + 2 * len(widths) - 2)
    )
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def size(n_bytes: int) -> str:
    """Bytes as people read them: "1.4 GB"."""
    value = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
