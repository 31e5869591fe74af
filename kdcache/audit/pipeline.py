"""A teacher run once more over a sample of a store, its fields held against what is stored.

Owns the order of events and what counts as a problem. Invariant: nothing is written, and the sample
depends on the store and the seed alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdcache.audit.difference import Difference
from kdcache.audit.report import AuditReport, FieldAudit
from kdcache.audit.sample import Piece, SampleReader
from kdcache.audit.symmetry import force_mismatch, turning_errors
from kdcache.devices import batch_atoms
from kdcache.errors import StoreError, TeacherError, did_you_mean
from kdcache.fields import GRAPH_FIELDS, N_EDGES, FieldSpec
from kdcache.progress import Progress, silent
from kdcache.store import FieldError, Store, TeacherEntry
from kdcache.stream.reader import WindowReader
from kdcache.stream.searched import lists_read_once
from kdcache.stream.window import make_batch
from kdcache.structures import Batch, IntArray
from kdcache.teachers import Teacher

# What computing again changes: other batches and other machines sum in another order.
COARSE = 1e-2
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": COARSE, "bfloat16": COARSE}
N_TURNED = 16


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """What is looked at, and how exactly.

    Attributes:
        name: of the teacher in the store.
        sample: structures to compute; all where there are no more.
        seed: of the sample, and of the rotations.
        max_atoms: atoms in one batch; None for what suits the device.
        tolerance: relative, of computing the same twice; by the teacher's precision without.
        symmetry_limit: relative, how far a turned field may be off.
        device: where the teacher computes.
        threads: for neighbour lists.
    """

    name: str = "teacher"
    sample: int = 200
    seed: int = 0
    max_atoms: int | None = None
    tolerance: float | None = None
    symmetry_limit: float = 1e-2
    device: str = "cpu"
    threads: int = 2


def audit_store(
    store: Store, teacher: Teacher, options: AuditOptions, *, progress: Progress = silent
) -> AuditReport:
    """Hold what a store keeps of a teacher against what a teacher says now.

    Args:
        store: an open store.
        teacher: on `options.device`; whichever is claimed to have made the fields.
        options: sample and tolerances.
        progress: shows structures.

    Raises:
        StoreError: no teacher of this name, nothing to compute from, or a damaged shard.
        TeacherError: the teacher gives rows of something else.
    """
    entry = _entry(store, options.name)
    rows, n_left_out = _sample(store, options)
    specs = [
        spec
        for name, spec in store.fields(f"teachers/{options.name}").items()
        if spec not in GRAPH_FIELDS and name != N_EDGES.name
    ]
    given = {spec.name: spec for spec in teacher.field_specs()}
    compared = [spec for spec in specs if _comparable(spec, given)]
    tolerance = options.tolerance or _tolerance(teacher, entry)
    max_atoms = batch_atoms(options.max_atoms, torch.device(options.device))
    reader = _reader(store, teacher, options, max_atoms, compared)
    differences = {
        spec.name: Difference(spec, entry.errors.get(spec.name, FieldError()), tolerance)
        for spec in compared
    }
    ordered = np.sort(rows)
    with progress("audit", len(rows), "structures") as advance:
        for pieces in _batches(reader.pieces(ordered), max_atoms):
            _compare(teacher, pieces, differences, options.device)
            advance(sum(len(piece.rows) for piece in pieces))
    few = _few(store, rows, max_atoms)
    batch = _batch(list(reader.pieces(few)), options.device)
    generator = np.random.default_rng([options.seed, 1])
    turning = turning_errors(teacher, batch, compared, generator, teacher.references)
    same_references = dict(entry.references) == dict(teacher.references)
    return AuditReport(
        root_digest=store.manifest.root_digest,
        teacher=options.name,
        stored_digest=entry.digest,
        given_digest=teacher.digest,
        tolerance=tolerance,
        n_structures=len(rows),
        n_left_out=n_left_out,
        n_in_store=len(store),
        fields=[
            _verdict(
                store, differences[spec.name], turning.get(spec.name), options, same_references
            )
            if spec.name in differences
            else _missing(spec, given)
            for spec in specs
        ],
        force_mismatch=force_mismatch(teacher, batch, generator, teacher.references),
        n_turned=len(few),
    )


def _entry(store: Store, name: str) -> TeacherEntry:
    if name not in store.teachers:
        raise StoreError(
            f"{store.path} has no teacher {name}: {did_you_mean(name, store.teachers)}. Name one "
            f"with --name."
        )
    needed = {"atomic_numbers", "positions", "cell", "pbc"} - set(store.fields("structures"))
    if needed:
        raise StoreError(
            f"{store.path} was published without {', '.join(sorted(needed))}, and a teacher cannot "
            f"compute without them. Audit the store it was made of."
        )
    return store.teachers[name]


def _sample(store: Store, options: AuditOptions) -> tuple[IntArray, int]:
    """Store rows in random order, and how many could not be drawn."""
    failed = store.failures(options.name).row
    candidates = np.setdiff1d(np.arange(len(store)), failed)
    if not len(candidates):
        raise StoreError(
            f"{store.path}: teacher {options.name} failed on all {len(store)} structures, so there "
            f"is nothing to audit."
        )
    order = np.random.default_rng([options.seed, 0]).permutation(candidates)
    return order[: options.sample], len(failed)


def _comparable(spec: FieldSpec, given: dict[str, FieldSpec]) -> bool:
    other = given.get(spec.name)
    return other is not None and _kind(other) == _kind(spec)


def _kind(spec: FieldSpec) -> tuple[object, ...]:
    return spec.level, spec.shape, spec.unit, spec.symmetry


def _tolerance(teacher: Teacher, entry: TeacherEntry) -> float:
    """Of the coarsest precision that is known; a word of the store that is none loosens nothing."""
    precisions = [str(teacher.dtype).removeprefix("torch."), *entry.precision.split(", ")]
    return max((TOLERANCE[name] for name in precisions if name in TOLERANCE), default=COARSE)


def _reader(
    store: Store,
    teacher: Teacher,
    options: AuditOptions,
    max_atoms: int,
    specs: Sequence[FieldSpec],
) -> SampleReader:
    neighbors, further = lists_read_once(
        store, teacher.graph_rule, teacher.further_graphs, options.threads
    )
    dtype = np.float64 if teacher.dtype == torch.float64 else np.float32
    window = WindowReader(store, neighbors, further, labels=False, dtype=dtype)
    return SampleReader(store, options.name, teacher.references, specs, window, max_atoms)


def _batches(pieces: Iterator[Piece], max_atoms: int) -> Iterator[list[Piece]]:
    """Pieces that fit one batch; one too large stands alone."""
    waiting: list[Piece] = []
    n_atoms = 0
    for piece in pieces:
        size = int(piece.counts["atom"].sum())
        if waiting and n_atoms + size > max_atoms:
            yield waiting
            waiting, n_atoms = [], 0
        waiting.append(piece)
        n_atoms += size
    if waiting:
        yield waiting


def _batch(pieces: Sequence[Piece], device: str) -> Batch:
    return make_batch([piece.inputs for piece in pieces]).to(device)


def _compare(
    teacher: Teacher, pieces: Sequence[Piece], differences: dict[str, Difference], device: str
) -> None:
    said = teacher.compute(_batch(pieces, device))
    for name, difference in differences.items():
        spec = difference.spec
        sizes = [int(piece.counts[spec.level].sum()) for piece in pieces]
        values = _rows(teacher, said, spec, sum(sizes))
        ends = np.cumsum(sizes)
        for piece, end, size in zip(pieces, ends, sizes, strict=True):
            computed = values[end - size : end].cpu().numpy()
            if spec.unit == "eV" and spec.level in piece.references:
                computed = computed - piece.references[spec.level]
            match = piece.match if spec.level == "edge" else np.arange(size)
            owner = np.repeat(piece.rows, piece.counts[spec.level])
            difference.add(piece.stored[name], computed, owner, match)
            if spec.level == "edge":
                difference.add_unseen(int(piece.n_unseen.sum()))


def _rows(teacher: Teacher, said: dict[str, Tensor], spec: FieldSpec, n_rows: int) -> Tensor:
    values, shape = said[spec.name].detach(), [n_rows, *spec.shape]
    if list(values.shape) != shape:
        raise TeacherError(
            f"{teacher.model_name} gave {spec.name} as {list(values.shape)} for a batch where it "
            f"must be {shape}: rows would be held against those of others. Correct the teacher."
        )
    return values


def _few(store: Store, rows: IntArray, max_atoms: int) -> IntArray:
    """The first few of the sample, in store order."""
    sizes = np.cumsum(store.index.n_atoms[rows[:N_TURNED]])
    return np.sort(rows[: max(1, int((sizes <= max_atoms).sum()))])


def _verdict(
    store: Store,
    found: Difference,
    turning: float | None,
    options: AuditOptions,
    same_references: bool,
) -> FieldAudit:
    problem = ""
    if found.spec.unit == "eV" and not same_references:
        problem = (
            "the manifest gives other reference energies than the teacher has: students would "
            "take the wrong ones off."
        )
    row, worst = found.worst()
    identity = "" if row < 0 else str(store.index.structure_id[row])
    return FieldAudit(
        spec=found.spec,
        n_rows=found.n_rows,
        n_outside=found.n_outside,
        cosine=found.cosine,
        relative=found.relative,
        bound=found.bound,
        recorded=found.recorded.relative,
        worst_structure=identity,
        worst_relative=worst,
        turning=turning,
        problem=_problem(found, identity, turning, options.symmetry_limit) or problem,
    )


def _problem(found: Difference, identity: str, turning: float | None, limit: float) -> str:
    outside, relative = found.n_outside, found.relative
    if outside or not relative <= found.bound:
        axes = found.axes()
        hint = ""
        if axes is not None:
            shown = "; ".join(
                " ".join(f"{x:+.2f}" for x in line) for line in np.round(axes, 2) + 0.0
            )
            hint = f" The stored vectors are the teacher's turned by [{shown}]: other axes."
        return (
            f"{outside} of {found.n_rows} sampled rows are not what the teacher says (relative "
            f"error {relative:.2e}, bound {found.bound:.2e}), most in structure {identity!r}.{hint}"
        )
    if turning is not None and not turning <= limit:
        kind = "turn with" if found.spec.symmetry == "vector" else "stay as they are in"
        return (
            f"described as {found.spec.symmetry}, but values do not {kind} a turned structure "
            f"(relative difference {turning:.2e}, limit {limit:.2e})."
        )
    return ""


def _missing(spec: FieldSpec, given: dict[str, FieldSpec]) -> FieldAudit:
    other = given.get(spec.name)
    if other is None:
        problem = f"the teacher gives no such field: {did_you_mean(spec.name, given)}"
        problem += ". Name its --tap, where it is an inner module's."
    else:
        problem = (
            f"stored by {spec.level} with shape {list(spec.shape)}, the teacher gives it by "
            f"{other.level} with shape {list(other.shape)}"
        )
        if (other.level, other.shape) != (spec.level, spec.shape):
            problem += ": another architecture."
        else:
            problem += (
                f"; but as {spec.symmetry} in {spec.unit or 'no unit'} there, as {other.symmetry} "
                f"in {other.unit or 'no unit'} here: it is described wrongly."
            )
    nan = float("nan")
    return FieldAudit(spec, 0, 0, nan, nan, nan, nan, "", nan, None, problem)
