"""What commands that dump a teacher share: the fields they are given, the report they end with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcache.errors import printable
from kdcache_cli.tables import size, table

SHOWN_FAILURES = 5


def names(text: str | None) -> list[str] | None:
    """Names by comma; None where none were given."""
    if text is None:
        return None
    return [name.strip() for name in text.split(",") if name.strip()]


def report_dump(report: Any) -> str:
    """What was kept of a teacher, with its errors, and how fast."""
    if report.left_to_others:
        return (
            f"{report.computed} structures computed in {report.seconds:.1f} s; "
            f"{report.left_to_others} shards are with other parts, the last of which finishes"
        )
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
            *_failed(report.failed),
            table(["field", "level", "shape", "codec", "relative error"], rows),
            f"{report.n_structures} structures, {report.n_atoms} atoms, {size(report.n_bytes)}; "
            f"{report.computed} computed in {report.seconds:.1f} s ({rate:.0f} structures/s)",
        ]
    )


def _failed(reasons: Mapping[str, str]) -> list[str]:
    if not reasons:
        return []
    first = list(reasons.items())[:SHOWN_FAILURES]
    shown = [printable(f"  {name}: {reason}") for name, reason in first]
    more = [f"  and {len(reasons) - len(shown)} more"] if len(reasons) > len(shown) else []
    return [
        f"the teacher failed on {len(reasons)} structures, left without features:",
        *shown,
        *more,
    ]
