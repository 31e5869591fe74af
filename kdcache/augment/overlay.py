"""An overlay store: structures made from a dataset's, imported and labelled by a teacher.

Owns parents, ids and what the manifest says; import and dump are the ordinary ones.
Invariant: parents are structures that may be trained on, and an overlay holds no ground truth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kdcache.augment.options import AugmentOptions
from kdcache.augment.rattle import ascent_steps, random_step
from kdcache.augment.trajectories import frames
from kdcache.checkpoint import potential_digest
from kdcache.dump import DumpOptions, DumpReport, dump_teacher
from kdcache.errors import ConfigError, DataError, StoreError
from kdcache.ingest import ImportOptions, import_dataset
from kdcache.models.potential import Potential
from kdcache.origins import child_id
from kdcache.progress import Progress, silent
from kdcache.readers.dataset import Dataset, Source, read_structures
from kdcache.store import Store, open_store
from kdcache.store.manifest import MANIFEST
from kdcache.store.work import WORK
from kdcache.structures import FloatArray, Structure
from kdcache.teachers import NativeTeacher, Teacher

Parent = tuple[Structure, np.random.Generator]

# Second derivatives of two models at once: as many atoms as a small GPU bears.
ATOMS_AT_ONCE = 1024


@dataclass
class Augmented(Dataset):
    """What is made of the structures of a dataset, read like any other dataset.

    Attributes:
        made_by: options of the method.
        teacher: of every method but random.
        student: of ascent.
        without_step: parents that could not be displaced, filled while iterating.
    """

    made_by: AugmentOptions = field(default_factory=AugmentOptions)
    teacher: Potential | None = None
    student: Potential | None = None
    without_step: int = 0

    @property
    def notes(self) -> list[str]:
        still = [f"{self.without_step} parents have no atom to move"] if self.without_step else []
        return [self.recipe, *still]

    def where(self, number: int) -> str:
        return f"{self.made_by.origin} structure {number}"

    def __iter__(self) -> Iterator[Structure]:
        self.without_step = n_made = n_parents = 0
        for parents in _groups(self._parents()):
            n_parents += len(parents)
            for child in self._children(parents):
                n_made += 1
                yield child
        if not n_made:
            raise DataError(
                f"Nothing was made: of {sum(self.counts)} structures, {n_parents} are parents "
                f"(not held out, among the share of {self.made_by.share:g}). "
                "Raise --share, --keep or --max-force."
            )

    def _parents(self) -> Iterator[Parent]:
        """Chosen structures, each with random numbers of its own: their order does not matter."""
        for structure in super().__iter__():
            if structure.split not in ("train", ""):
                continue
            content = int.from_bytes(structure.content_hash()[:8], "little")
            generator = np.random.Generator(np.random.PCG64([self.made_by.seed, content]))
            if generator.random() < self.made_by.share:
                yield structure, generator

    def _children(self, parents: Sequence[Parent]) -> Iterator[Structure]:
        options = self.made_by
        if options.origin == "synthetic":
            assert self.teacher is not None
            kind = "relaxed" if options.method == "relax" else "md"
            for parent, generator in parents:
                chosen = generator.random(options.max_steps + 1) < options.keep
                for number, frame in frames(parent, self.teacher, options, generator):
                    if chosen[number]:
                        yield self._child(parent, kind, number, frame.positions)
            return
        for parent, steps in zip(
            [parent for parent, _ in parents], self._steps(parents), strict=True
        ):
            moved = [step for step in steps if step.any()]
            self.without_step += not moved
            for k, step in enumerate(moved):
                yield self._child(parent, "rattled", k, parent.positions + step)

    def _steps(self, parents: Sequence[Parent]) -> list[list[FloatArray]]:
        """Displacements of every parent."""
        options = self.made_by
        if options.method == "random":
            return [
                [random_step(s, options.norm, options.norm_of, g) for _ in range(options.copies)]
                for s, g in parents
            ]
        assert self.teacher is not None
        assert self.student is not None
        structures = [structure for structure, _ in parents]
        steps = ascent_steps(structures, self.teacher, self.student, options.norm, options.norm_of)
        return [[step] for step in steps]

    def _child(self, parent: Structure, kind: str, number: int, positions: FloatArray) -> Structure:
        return replace(
            parent,
            structure_id=child_id(parent.structure_id, kind, number),
            positions=positions,
            energy=None,
            forces=None,
            origin=self.made_by.origin,
            weight=1.0,
            split="train",
        )


def augment(
    sources: Source | Sequence[Source],
    output: str | Path,
    teacher: Teacher,
    options: AugmentOptions,
    *,
    layout: ImportOptions,
    dump: DumpOptions,
    student: Potential | None = None,
    progress: Progress = silent,
) -> DumpReport:
    """Make structures out of a dataset's and write them, labelled by a teacher, to a new store.

    Args:
        sources: files, globs or a store; structures of splits val and test are passed over.
        output: the overlay; one that was killed while the teacher labelled it is gone on with.
        teacher: labels the structures, and drives every method but random.
        options: method and numbers.
        layout: how `sources` are read, and what is kept of the new structures.
        dump: name and fields of the teacher.
        student: of the method ascent.
        progress: shows structures made and labelled.

    Raises:
        ConfigError: the method needs a student, or a teacher of ours.
        DataError: nothing was made.
        StoreError: `output` is something else.

    Source: Ekström Kelvinius et al. 2023, section D.
    """
    if (student is None) == (options.method == "ascent"):
        wants = "needs a student" if student is None else "takes no student"
        raise ConfigError(
            f"Method {options.method} {wants}: only ascent climbs the difference of two models."
        )
    potential = None if options.method == "random" else _potential(teacher, options)
    read = replace(layout.read, unlabelled=True)
    digest = None if student is None else potential_digest(student)
    dataset = Augmented(
        read_structures(sources, read).paths,
        read,
        recipe=options.recipe(teacher.digest, digest),
        made_by=options,
        teacher=potential,
        student=student,
    )
    output = Path(output)
    if (output / MANIFEST).is_file() and not (output / WORK / "spool").is_dir():
        _check_same(open_store(output), dataset.recipe)
    else:
        import_dataset(dataset, output, replace(layout, read=read), progress)
    return dump_teacher(output, teacher, dump, progress=progress)


def same_teacher(store: Store, teacher: Teacher) -> str | None:
    """The name a store knows this very teacher by; None where it does not."""
    return next((n for n, e in store.teachers.items() if e.digest == teacher.digest), None)


def _potential(teacher: Teacher, options: AugmentOptions) -> Potential:
    if not isinstance(teacher, NativeTeacher):
        raise ConfigError(
            f"Method {options.method} moves atoms by the teacher's forces and gradients, which "
            f"{type(teacher).__name__} gives no access to. Use --method random."
        )
    return teacher.potential


def _check_same(store: Store, recipe: str) -> None:
    if recipe not in store.manifest.dataset.notes:
        raise StoreError(
            f"{store.path} is a finished store that was not made by {recipe}. Nothing is "
            f"overwritten: name another path."
        )


def _groups(
    parents: Iterable[Parent],
) -> Iterator[list[Parent]]:
    """Consecutive parents of about `ATOMS_AT_ONCE` atoms together."""
    group: list[Parent] = []
    n_atoms = 0
    for parent in parents:
        group.append(parent)
        n_atoms += parent[0].n_atoms
        if n_atoms >= ATOMS_AT_ONCE:
            yield group
            group, n_atoms = [], 0
    if group:
        yield group
