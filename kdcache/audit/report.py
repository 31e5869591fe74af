"""What an audit found, for people and for programs.

Owns which findings are problems and their wording; numbers come from the others.
Invariant: a field without a problem is within its bound in every sampled row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kdcache.fields import FieldSpec
from kdcache.store.metadata import Json


@dataclass(frozen=True, slots=True)
class FieldAudit:
    """One field of a teacher, stored against computed.

    Attributes:
        spec: of the field, as the store describes it.
        n_rows, n_outside: sampled rows, and those further off than codec and tolerance explain.
        cosine: of all sampled values, stored and computed.
        relative: root mean square difference over that of the values, references of energies taken
            off.
        bound: what `relative` may be.
        recorded: relative error the manifest states; 0 for what is kept exactly.
        worst_structure: id of the structure with the largest difference.
        worst_relative: that difference, as `relative`.
        turning: relative difference between the field of turned structures and the turned field;
            None where it was not computed.
        problem: what is wrong with it; "" for nothing.
    """

    spec: FieldSpec
    n_rows: int
    n_outside: int
    cosine: float
    relative: float
    bound: float
    recorded: float
    worst_structure: str
    worst_relative: float
    turning: float | None
    problem: str

    def to_json(self) -> Json:
        """For programs; what is not finite is null."""
        return {
            "level": self.spec.level,
            "codec": self.spec.codec,
            "symmetry": self.spec.symmetry,
            "rows": self.n_rows,
            "rows_outside": self.n_outside,
            "cosine": _finite(self.cosine),
            "relative": _finite(self.relative),
            "bound": _finite(self.bound),
            "recorded": self.recorded,
            "worst_structure": self.worst_structure,
            "worst_relative": _finite(self.worst_relative),
            "turning": None if self.turning is None else _finite(self.turning),
            "problem": self.problem,
        }


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit found.

    Attributes:
        root_digest: of the store.
        teacher: its name there.
        stored_digest, given_digest: of the teacher in the manifest, and of the one that computed.
        tolerance: relative, what computing once more may change.
        n_structures: in the sample.
        n_left_out: structures of the store that the teacher had failed on.
        n_in_store: structures of the store.
        fields: field by field, in the store's order.
        force_mismatch: relative difference between forces and −dE/dx by finite differences; None
            where the teacher lacks one of them. A matter of the teacher, no problem of the store.
        n_turned: structures of the sample that were turned and moved.
    """

    root_digest: str
    teacher: str
    stored_digest: str
    given_digest: str
    tolerance: float
    n_structures: int
    n_left_out: int
    n_in_store: int
    fields: Sequence[FieldAudit]
    force_mismatch: float | None
    n_turned: int

    @property
    def is_same_teacher(self) -> bool:
        """Whether the teacher that computed has the digest the store records."""
        return self.stored_digest == self.given_digest

    @property
    def problems(self) -> list[str]:
        """A line for every field that is not what it should be."""
        return [f"{one.spec.name}: {one.problem}" for one in self.fields if one.problem]

    def to_json(self) -> Json:
        """For programs."""
        mismatch = self.force_mismatch
        return {
            "root_digest": self.root_digest,
            "teacher": self.teacher,
            "stored_digest": self.stored_digest,
            "given_digest": self.given_digest,
            "same_teacher": self.is_same_teacher,
            "tolerance": self.tolerance,
            "structures": self.n_structures,
            "structures_in_store": self.n_in_store,
            "structures_left_out": self.n_left_out,
            "structures_turned": self.n_turned,
            "force_mismatch": None if mismatch is None else _finite(mismatch),
            "fields": {one.spec.name: one.to_json() for one in self.fields},
            "problems": list(self.problems),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
