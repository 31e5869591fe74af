"""What commands that dump a teacher share: the fields they are given, the report they end with."""

from __future__ import annotations

from typing import Any

from kdcache_cli.tables import size, table


def names(text: str | None) -> list[str] | None:
    """Names by comma; None where none were given."""
    if text is None:
        return None
    return [name.strip() for name in text.split(",") if name.strip()]


def report_dump(report: Any) -> str:
    """What was kept of a teacher, with its errors, and how fast."""
    rows = []
    for name, entry in report.entry.fields.items():
        error = report.entry.errors[name]
        odd = [f"{error.clipped} clipped"] if error.clipped else []
        odd += [f"{error.nonfinite} not finite"] if error.nonfinite else []
        shape = "×".join(map(str, entry.shape)) or "1"
        shown = ", ".join([f"{error.relative:.1e}", *odd])
        rows.append([name, entry.level, shape, entry.codec, shown])
    rate = report.computed / report.seconds if report.seconds else 0.0
    return "\n".join(
        [
            table(["field", "level", "shape", "codec", "relative error"], rows),
            f"{report.n_structures} structures, {report.n_atoms} atoms, {size(report.n_bytes)}; "
            f"{report.computed} computed in {report.seconds:.1f} s ({rate:.0f} structures/s)",
        ]
    )
