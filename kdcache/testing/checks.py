"""The contracts of teachers, models and readers as checks, for people who write their own.

Each check runs an extension on small structures and raises on the first promise it breaks, with
both values. Passing says nothing about how good a model is, only that what it gives can be stored,
batched and compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from kdcache.errors import ContractError, KdcacheError
from kdcache.models import Model
from kdcache.readers import Reader, ReadOptions
from kdcache.readers.labels import LabelKeys
from kdcache.store import TeacherEntry
from kdcache.stream.window import collate
from kdcache.structures import Batch, Structure, check_structure
from kdcache.teachers import Teacher
from kdcache.testing.fields import TOLERANCE, FieldCheck, require

ELEMENTS = (1, 6, 8)


def check_teacher(
    teacher: Teacher,
    structures: Sequence[Structure] | None = None,
    *,
    device: str = "cpu",
    tolerance: float | None = None,
) -> None:
    """A teacher gives the fields it names, and gives them to a structure wherever it stands.

    Checked: names, shapes and dtypes; the batch is left alone; equal batches give equal fields; a
    structure alone and in a batch; translation; rotation, which turns vector fields and leaves the
    others; another order of the atoms; one atom; atoms without neighbours; atomic energies that sum
    to the energy; a digest and an architecture that a store can record.

    Args:
        teacher: on `device`.
        structures: a handful, of elements it knows; `sample_structures` of its references without.
            One atom, and two out of reach of each other, are added.
        device: where batches are put.
        tolerance: relative to a field's largest value; by the teacher's dtype without.

    Raises:
        ContractError: the first promise that is broken.
    """
    specs = {spec.name: spec for spec in teacher.field_specs()}
    require(len(specs) == len(teacher.field_specs()), "field_specs names a field twice", specs)
    _check_entry(teacher)
    elements = sorted(teacher.references) or ELEMENTS
    FieldCheck(
        compute=teacher.compute,
        specs=specs,
        rule=teacher.graph_rule,
        further=teacher.further_graphs,
        dtype=teacher.dtype,
        device=device,
        references=teacher.references,
        tolerance=tolerance or TOLERANCE.get(teacher.dtype, 1e-2),
    ).check(list(structures or sample_structures(teacher.graph_rule.cutoff, elements)))


def check_student(
    model: Model, structures: Sequence[Structure] | None = None, *, tolerance: float | None = None
) -> None:
    """A model can be trained, distilled into and saved.

    Checked: what `check_teacher` checks of its fields; energies and forces from which its
    parameters learn; hyperparameters that survive JSON.

    Args:
        model: on the CPU.
        structures: as for `check_teacher`.
        tolerance: as for `check_teacher`.

    Raises:
        ContractError: the first promise that is broken.
    """
    dtype = next(model.parameters()).dtype
    name = str(dtype).removeprefix("torch.")
    specs = {spec.name: replace(spec, dtype=name) for spec in model.field_specs()}
    for needed in ("energy", "forces", "atomic_energy"):
        require(needed in specs, f"field_specs must name {needed}, got", list(specs))
    kind = model.hyperparameter_type
    written = json.loads(json.dumps(model.hyperparameters.model_dump(mode="json")))
    require(
        kind.model_validate(written) == model.hyperparameters,
        "hyperparameters come back from JSON as others:",
        written,
    )

    def compute(batch: Batch) -> dict[str, Tensor]:
        output = model(batch)
        own = {"energy": output.energy, "forces": output.forces}
        return {**own, "atomic_energy": output.atomic_energy, **output.features}

    chosen = list(structures or sample_structures(model.graph_rule.cutoff))
    FieldCheck(
        compute=compute,
        specs=specs,
        rule=model.graph_rule,
        further=model.further_graphs,
        dtype=dtype,
        device="cpu",
        references={},
        tolerance=tolerance or TOLERANCE.get(dtype, 1e-2),
    ).check(chosen)
    model.train()
    batch = collate(chosen, model.graph_rule, further=model.further_graphs).to("cpu", dtype)
    for name in ("energy", "forces"):
        model.zero_grad(set_to_none=True)
        value = compute(batch)[name]
        require(value.requires_grad, f"{name} has no gradient: training could not move", "it")
        value.square().sum().backward()  # type: ignore[no-untyped-call]
        learning = [p for p in model.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        require(bool(learning), f"no parameter gets a gradient from {name}:", "it would not learn")
    model.zero_grad(set_to_none=True)


def check_reader(reader: Reader, path: str | Path, options: ReadOptions | None = None) -> None:
    """A reader yields usable structures one by one, the same each time, and leaves its file alone.

    Args:
        reader: a function as `kdcache.readers.Reader` describes it.
        path: a small file of its format, of two structures or more.
        options: as a user would give them for this file.

    Raises:
        ContractError: the first promise that is broken.
    """
    path, options = Path(path), options or ReadOptions()
    before = path.stat()
    found = reader(path, options, LabelKeys())
    require(
        isinstance(found, Iterator),
        "a reader yields one structure at a time, it must not return a",
        type(found),
    )
    structures: list[Structure] = []
    as_read: list[bytes] = []
    for index, structure in enumerate(found):
        _check_record(structure, index)
        try:
            check_structure(structure, f"structure {index}", unlabelled=options.unlabelled)
        except KdcacheError as error:
            raise ContractError(str(error)) from error
        structures.append(structure)
        as_read.append(_content(structure))
    require(len(structures) > 1, "a file of two structures or more is needed, got", len(structures))
    for index, (structure, was) in enumerate(zip(structures, as_read, strict=True)):
        require(
            _content(structure) == was,
            "a structure changed while later ones were read; its arrays must be its own:",
            f"structure {index}",
        )
    ids = [structure.structure_id for structure in structures]
    require(not any(ids) or len(set(ids)) == len(ids), "ids must be unique, or all empty, got", ids)
    again = list(reader(path, options, LabelKeys()))
    require(
        len(again) == len(structures),
        f"the first reading gave {len(structures)} structures, the second",
        len(again),
    )
    for index, (structure, was) in enumerate(zip(again, as_read, strict=True)):
        require(_content(structure) == was, "a second reading gave another", f"structure {index}")
    after = path.stat()
    require(
        (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns),
        "reading changed",
        path.name,
    )


def sample_structures(cutoff: float, atomic_numbers: Sequence[int] = ELEMENTS) -> list[Structure]:
    """A molecule, a crystal whose atoms see their own images, and a slab, within `cutoff`.

    Args:
        cutoff: Å; distances follow it.
        atomic_numbers: elements to use.
    """
    generator = np.random.default_rng(0)
    spacing = cutoff / 2.5
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    made = []
    for k, (n_atoms, pbc) in enumerate([(5, "FFF"), (3, "TTT"), (4, "TTF")]):
        jitter = generator.uniform(-0.2, 0.2, (n_atoms, 3))
        cell = np.diag([2.0, 2.0, 2.2]) + np.array([[0, 0.1, 0], [0, 0, 0.2], [0.1, 0, 0]])
        made.append(
            Structure(
                structure_id=f"sample-{k}",
                atomic_numbers=np.resize(np.array(atomic_numbers, np.int64), n_atoms),
                positions=spacing * (corners[:n_atoms] + jitter),
                cell=spacing * cell * (pbc != "FFF"),
                pbc=np.array([flag == "T" for flag in pbc]),
            )
        )
    return made


def _check_entry(teacher: Teacher) -> None:
    try:
        TeacherEntry.describe(
            digest=teacher.digest,
            fields=teacher.field_specs(),
            model=teacher.model_name,
            architecture=teacher.architecture,
            graph=teacher.graph_rule,
            references=teacher.references,
            precision=str(teacher.dtype).removeprefix("torch."),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ContractError(f"a store cannot record {key}: {first['msg']}") from error
    except (TypeError, ValueError) as error:
        raise ContractError(f"a store cannot record this teacher: {error}") from error


def _check_record(structure: object, index: int) -> None:
    if not isinstance(structure, Structure):
        raise ContractError(f"a reader yields Structure, got {type(structure)} as {index}")
    wanted = {"atomic_numbers": "int64", "positions": "float64", "cell": "float64", "pbc": "bool"}
    if structure.forces is not None:
        wanted["forces"] = "float64"
    for name, dtype in wanted.items():
        array = getattr(structure, name)
        require(
            isinstance(array, np.ndarray) and array.dtype == dtype,
            f"{name} of structure {index} must be an array of {dtype}, got",
            getattr(array, "dtype", type(array)),
        )


def _content(structure: Structure) -> bytes:
    forces = b"" if structure.forces is None else structure.forces.tobytes()
    return structure.content_hash() + forces + repr(structure.energy).encode()
