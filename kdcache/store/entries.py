"""The entries of a manifest: what is recorded of a dataset, its graph, a teacher and each field.

Owns their types and the bounds of every value; what they say together is `manifest`'s.
Invariant: an entry that was read is written with the same text again, or root digests would change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
)

from kdcache.errors import StoreError
from kdcache.fields import N_EDGES, Codec, FieldSpec, Level, Symmetry
from kdcache.store.metadata import canonical

MAX_EXTENT = 2**24

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FieldName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,99}$")]
# A folder name on every file system: no separators, no leading dot, nothing a shell would read.
TeacherName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[^/\\\x00]{1,255}$")]
RelativePath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.+/-]{1,300}$")]
Line = Annotated[str, StringConstraints(max_length=1000)]
Text = Annotated[str, StringConstraints(max_length=20_000)]
Count = Annotated[int, Field(ge=0, le=2**40)]
Capacity = Annotated[int, Field(ge=1, le=2**40)]
Extent = Annotated[int, Field(ge=1, le=MAX_EXTENT)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Part(BaseModel):
    """Strict: no unknown keys, no conversions between types, no change once made."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RuleLike(Protocol):
    """Whatever names what makes two atoms neighbours: `graphs.GraphRule` or a `GraphEntry`."""

    @property
    def cutoff(self) -> float: ...
    @property
    def max_neighbors(self) -> int | None: ...
    @property
    def symmetric(self) -> bool: ...


class GraphEntry(Part):
    """The rule of a neighbour list: cutoff in Å, nearest neighbours kept, made symmetric or not.

    `truncated` says whether the neighbour limit dropped an edge of any structure; it is None where
    nobody counted. Two entries, or an entry and a rule, are equal when their rules are.
    """

    cutoff: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    max_neighbors: Annotated[int, Field(ge=1)] | None = None
    symmetric: bool = False
    truncated: bool | None = None

    @classmethod
    def describe(cls, rule: RuleLike, truncated: bool | None = None) -> GraphEntry:
        """The record of a rule."""
        return cls(
            cutoff=float(rule.cutoff),
            max_neighbors=rule.max_neighbors,
            symmetric=rule.symmetric,
            truncated=truncated,
        )

    def __eq__(self, other: object) -> bool:
        try:
            return self._rule == (other.cutoff, other.max_neighbors, other.symmetric)  # type: ignore[attr-defined]
        except AttributeError:
            return NotImplemented

    def __hash__(self) -> int:
        return hash(self._rule)

    @property
    def _rule(self) -> tuple[float, int | None, bool]:
        return self.cutoff, self.max_neighbors, self.symmetric


class FieldEntry(Part):
    """A field of a group, keyed there by its name."""

    level: Level
    shape: Annotated[tuple[Extent, ...], Field(max_length=4, strict=False)]
    dtype: Line
    unit: Line
    symmetry: Symmetry
    codec: Codec

    @classmethod
    def describe(cls, spec: FieldSpec) -> FieldEntry:
        """The record of a field."""
        return cls(
            level=spec.level,
            shape=spec.shape,
            dtype=spec.dtype,
            unit=spec.unit,
            symmetry=spec.symmetry,
            codec=spec.codec,
        )

    def spec(self, name: str) -> FieldSpec:
        """The field it describes."""
        return FieldSpec(
            name, self.level, self.shape, self.dtype, self.unit, self.symmetry, self.codec
        )


class FieldError(Part):
    """What storing a teacher's field changed.

    Attributes:
        relative: ‖values − stored‖ / ‖values‖ over the whole field.
        clipped: values cut to the largest float16.
        nonfinite: NaN and infinities replaced by zero.
    """

    relative: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    clipped: Count = 0
    nonfinite: Count = 0


class Licences(Part):
    """Licences of structures and of labels, as their owners state them; "" where unknown."""

    structures: Text = ""
    labels: Text = ""


class DatasetEntry(Part):
    """The dataset a store was made from.

    Attributes:
        digest: `structures.dataset_digest` over the structures in dataset order.
        n_structures, n_labelled: structures, and those with both energy and forces.
        sources: file names, without folders.
        keys: which key of the files each quantity was taken from.
        units: the files' units; stores are always in eV, Å, eV/Å.
        notes: what was said while reading.
        licences: of structures and of labels.
        creator: who made the store, as they state it; never guessed from the machine.
        citation: what to cite: free text, a DOI.
    """

    digest: Sha256
    n_structures: Count
    n_labelled: Count
    sources: list[FileName] = []
    keys: dict[Line, Line] = {}
    units: dict[Line, Line] = {}
    notes: list[Text] = []
    licences: Licences = Licences()
    creator: Text = ""
    citation: Text = ""

    @model_serializer(mode="wrap")
    def _without_default(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Left out where nobody stated them: older stores keep their root digests."""
        return left_out(plain(self), creator="", citation="")


class OrderEntry(Part):
    """How store order was made from dataset order: a permutation drawn from `seed`."""

    seed: int | None = None
    generator: Line = "numpy PCG64 permutation"


class Capacities(Part):
    """The layout, together with the counts in the index."""

    n_blocks: Capacity
    blocks_per_shard: Capacity
    structure: Capacity
    atom: Capacity
    edge: Capacity


class TeacherEntry(Part):
    """A teacher whose features are stored.

    Attributes:
        digest: over weights and configuration, as the teacher defines it.
        fields: by name.
        model: architecture's name.
        architecture: its hyperparameters.
        graph: rule the teacher saw its neighbours by.
        precision: dtype it computed in.
        software: versions by package.
        licence: of the weights.
        references: eV by atomic number, already contained in its energies.
        errors: what storing changed, by field; filled when the group is committed.
        n_failed: structures it gave nothing for, listed in failures.parquet of its group; likewise.
    """

    digest: Sha256
    fields: dict[FieldName, FieldEntry]
    model: Line
    architecture: dict[Line, JsonValue] = {}
    graph: GraphEntry | None = None
    precision: Line = ""
    software: dict[Line, Line] = {}
    licence: Text = ""
    references: dict[int, Finite] = {}
    errors: dict[FieldName, FieldError] = {}
    n_failed: Count = 0

    @model_serializer(mode="wrap")
    def _without_default(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Left out where nothing failed, so that older readers know every key."""
        return left_out(plain(self), n_failed=0)

    @classmethod
    def describe(
        cls,
        *,
        digest: str,
        fields: Sequence[FieldSpec],
        model: str,
        architecture: Mapping[str, JsonValue] | None = None,
        graph: RuleLike | None = None,
        references: Mapping[int, float] | None = None,
        precision: str = "",
        licence: str = "",
        software: Mapping[str, str] | None = None,
    ) -> TeacherEntry:
        """The record of a teacher, before anything of it is written."""
        # Through JSON, so that an entry and what is read back from disk are equal.
        plain = json.loads(canonical(dict(architecture or {})))
        return cls(
            digest=digest,
            fields={spec.name: FieldEntry.describe(spec) for spec in fields},
            model=model,
            architecture=plain,
            graph=None if graph is None else GraphEntry.describe(graph),
            references={int(z): float(e) for z, e in (references or {}).items()},
            precision=precision,
            licence=licence,
            software=dict(software or {}),
        )

    @property
    def has_own_edges(self) -> bool:
        """Its edge fields have rows by the counts in `n_edges`, not by those of the index."""
        return self.fields.get(N_EDGES.name) == FieldEntry.describe(N_EDGES)


class Withheld(Part):
    """What the store held before it was passed on without its structures.

    Attributes:
        root_digest: of the whole store.
        structures: fields that are left out.
        digests: of the files that are left out, and of the whole store's zarr.json.
        values: SHA-256 of the rows of a left out field in store order, without padding, by field:
            what tells other values from the same ones compressed otherwise.
    """

    root_digest: Sha256
    structures: dict[FieldName, FieldEntry]
    digests: dict[RelativePath, Sha256]
    values: dict[FieldName, Sha256]


def check_name(name: str, what: str) -> str:
    """A teacher's name that is also a safe folder name.

    Raises:
        StoreError: it is not one.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}", name):
        raise StoreError(
            f"{name!r} cannot name a {what}: letters, digits, _ . + - only, and a letter or digit "
            f"first."
        )
    return name


def left_out(document: dict[str, Any], **defaults: object) -> dict[str, Any]:
    """The document without the keys whose value is the default."""
    for key, default in defaults.items():
        if document.get(key) == default:
            document.pop(key, None)
    return document
