"""What of a teacher is stored, how, and who computes it.

Invariant: options and teacher together fix the bytes of a store, whoever computes them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kdcache.errors import ConfigError, did_you_mean
from kdcache.fields import GRAPH_FIELDS, Codec, FieldSpec
from kdcache.models.taps import Tap
from kdcache.store import TeacherEntry
from kdcache.teachers import Teacher, load_teacher


@dataclass(frozen=True, slots=True)
class DumpOptions:
    """What of a teacher is stored, and how.

    Attributes:
        name: group of the store the fields go to.
        fields: which of the teacher's fields; None for all but whole edges, which take some fifty
            times the room of the others: their sums at the atoms are kept instead.
        codec: of features; quantities with a unit are always kept exactly.
        max_atoms: atoms in one batch; None for what suits the device.
        on_overflow: a feature beyond float16: "stop", or "clip" it to the largest float16.
        on_nonfinite: NaN or infinity: "stop", or "zero".
        on_error: a structure that the teacher fails on, or gives NaN or infinity for: "stop", or
            "skip" it and record why.
        licence: of the teacher's weights, as its owner states it.
        device: where the teacher computes.
        threads: for neighbour lists.
        compute_threads: threads of one operation on a CPU; None leaves what is set. Sums over
            another number of threads have other last digits.
        all_software: record the version of every installed package, not only of those that
            compute.
    """

    name: str
    fields: Sequence[str] | None = None
    codec: Codec = "half"
    max_atoms: int | None = None
    on_overflow: Literal["stop", "clip"] = "stop"
    on_nonfinite: Literal["stop", "zero"] = "stop"
    on_error: Literal["stop", "skip"] = "stop"
    licence: str = ""
    device: str = "cpu"
    threads: int = 2
    compute_threads: int | None = None
    all_software: bool = False


@dataclass(frozen=True, slots=True)
class TeacherSource:
    """Where a teacher comes from, for processes that load it themselves; as `load_teacher` takes.

    Attributes:
        kind, path, precision, taps, scale_file, config_file, allow_pickle: see `load_teacher`.
    """

    kind: str
    path: str
    precision: str = "float32"
    taps: tuple[Tap, ...] = ()
    scale_file: str | None = None
    config_file: str | None = None
    allow_pickle: bool = False

    def load(self, device: str) -> Teacher:
        """The teacher on a device.

        Raises:
            KdcacheError: whatever its loader says.
        """
        return load_teacher(
            self.kind,
            self.path,
            device=device,
            precision=self.precision,
            taps=self.taps,
            scale_file=self.scale_file,
            config_file=self.config_file,
            allow_pickle=self.allow_pickle,
        )


@dataclass(frozen=True, slots=True)
class Part:
    """One of several processes that share a dump without talking: number k of n, from 0."""

    k: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.k < self.n:
            raise ConfigError(
                f"Part {self.k}/{self.n} does not exist: parts count from 0, so the last of "
                f"{self.n} is {max(self.n - 1, 0)}/{self.n}."
            )

    @classmethod
    def parse(cls, text: str) -> Part:
        """A part from "k/n".

        Raises:
            ConfigError: it is not of that form, or does not exist.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if match is None:
            raise ConfigError(f"{text!r} is no part: write k/n, e.g. 0/4 to 3/4 for four of them.")
        return cls(int(match[1]), int(match[2]))

    def order(self, shards: Sequence[int]) -> list[int]:
        """The shards in the order this part takes them: its own first, then those of others.

        Example:
            >>> Part(1, 3).order(range(8))
            [1, 4, 7, 2, 5, 0, 3, 6]
        """
        return sorted(shards, key=lambda shard: ((shard - self.k) % self.n, shard))


@dataclass(frozen=True, slots=True)
class DumpReport:
    """What a dump wrote.

    Attributes:
        n_structures, n_atoms: of the store.
        n_bytes: on disk, the teacher's fields only.
        seconds: wall time of this call.
        computed: structures computed by this call; fewer than all after a resume.
        failed: structures the teacher failed on, with the reason by structure id.
        left_to_others: shards that other parts are at; 0 where the teacher is finished.
        entry: the teacher as the manifest records it, with the error of every field.
    """

    n_structures: int
    n_atoms: int
    n_bytes: int
    seconds: float
    computed: int
    failed: dict[str, str]
    left_to_others: int
    entry: TeacherEntry


def choose_fields(
    specs: Sequence[FieldSpec], wanted: Sequence[str] | None, codec: Codec
) -> tuple[FieldSpec, ...]:
    """The specs to store, features in `codec`, quantities with a unit exactly.

    Whole edges, kept when they are asked for, bring edge_index and edge_shift with them.

    Raises:
        ConfigError: a name the teacher does not give.
    """
    known = {spec.name: spec for spec in specs}
    whole = [name for name, spec in known.items() if spec.level != "edge"]
    names = whole if wanted is None else list(dict.fromkeys(wanted))
    for name in names:
        if name not in known:
            raise ConfigError(f"The teacher has no field {name}: {did_you_mean(name, known)}")
    if not names:
        raise ConfigError(
            f"No fields are chosen, so there is nothing to dump. Known: {list(known)}"
        )
    chosen = tuple(
        replace(known[name], codec="exact" if known[name].unit else codec) for name in names
    )
    return chosen + GRAPH_FIELDS if has_edges(chosen) else chosen


def has_edges(specs: Sequence[FieldSpec]) -> bool:
    """Whether rows of some field belong to edges."""
    return any(spec.level == "edge" for spec in specs)
