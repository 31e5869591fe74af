"""A row of the table of faults, and how one is counted."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Row:
    """One kind of fault.

    Attributes:
        fault: what was done.
        tried: how often.
        survived: as often as all was well afterwards, or it was refused in time.
        lost: the rest.
        note: what a count does not say.
        losses: the first of what was lost.
    """

    fault: str
    tried: int = 0
    survived: int = 0
    lost: int = 0
    note: str = ""
    losses: list[str] = field(default_factory=list)

    def count(self, survived: bool, what: object = "") -> None:
        """One more try."""
        self.tried += 1
        self.survived += survived
        self.lost += not survived
        if not survived and len(self.losses) < 10:
            self.losses.append(str(what))


def times(n: int, scale: float) -> int:
    """How often something is tried at a scale; at least once."""
    return max(1, round(n * scale))
