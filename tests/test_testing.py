"""The executable contracts accept what is built in, and catch one broken promise each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import ase.db
import ase.io
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from kdcache.errors import ContractError
from kdcache.fields import FieldSpec
from kdcache.ingest import import_dataset
from kdcache.models import Model, build_model
from kdcache.models.potential import Normalizer, Potential
from kdcache.models.taps import Tap
from kdcache.readers import Reader, ReadOptions
from kdcache.readers.labels import LabelKeys
from kdcache.registry import known_names, lookup
from kdcache.structures import Batch, ModelOutput, Structure
from kdcache.teachers import NativeTeacher
from kdcache.testing import check_reader, check_student, check_teacher, sample_structures
from tests.readers.identity import as_atoms, numbered_structure
from tests.readers.lmdb_files import write_lmdb

PAINN = {"name": "painn", "hidden_channels": 8, "num_layers": 1, "num_rbf": 6, "cutoff": 3.0}
SCHNET = {"name": "schnet", "hidden_channels": 8, "num_filters": 8, "num_interactions": 1,
          "num_gaussians": 6, "cutoff": 3.0}  # fmt: skip


def model(settings: Mapping[str, object] = PAINN, dtype: torch.dtype = torch.float64) -> Model:
    return build_model(settings, seed=1).to(dtype)


def teacher(kind: type[NativeTeacher] = NativeTeacher, dtype: torch.dtype = torch.float64,
            taps: tuple[Tap, ...] = ()) -> NativeTeacher:  # fmt: skip
    references = {1: -13.5, 6: -1029.25, 8: -2041.75}
    units = Normalizer(energy_scale=2.0, energy_shift=0.25, force_scale=2.0)
    return kind(Potential(model(dtype=dtype), units, references).eval(), taps)


@pytest.mark.parametrize("settings", [PAINN, {**PAINN, "direct_forces": False}, SCHNET])
def test_built_in_models_keep_the_contract(settings: Mapping[str, object]) -> None:
    check_student(model(settings))
    check_student(model(settings, torch.float32), tolerance=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_our_teacher_keeps_the_contract(dtype: torch.dtype) -> None:
    check_teacher(teacher(dtype=dtype, taps=(Tap.parse("node/msg=message_layers.0"),)))


def test_samples_hold_molecules_crystals_and_slabs() -> None:
    assert {tuple(s.pbc.tolist()) for s in sample_structures(3.0)} == {
        (False,) * 3, (True,) * 3, (True, True, False),
    }  # fmt: skip


# What may be wrong with a teacher: its fields, the batch it saw, and what the error must say.
Break = Callable[[dict[str, Tensor], Batch], dict[str, Tensor]]


def changed(name: str, change: Callable[[Tensor, Batch], Tensor]) -> Break:
    return lambda fields, batch: {**fields, name: change(fields[name], batch)}


def _zeroes_positions(fields: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    batch.positions.zero_()
    return fields


def _replaces_numbers(fields: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    batch.atomic_numbers = batch.atomic_numbers + 1
    return fields


BROKEN: dict[str, tuple[Break, str]] = {
    "leaves a field out": (lambda f, b: {"energy": f["energy"]}, "computed were"),
    "gives another field": (lambda f, b: {**f, "extra": f["node"]}, "computed were"),
    "gives a column": (changed("energy", lambda v, b: v[:, None]), r"energy must have shape"),
    "gives float32 energies": (changed("energy", lambda v, b: v.float()), "must be float64"),
    "writes into the batch": (_zeroes_positions, "changed the batch it was given: positions"),
    "replaces a tensor of the batch": (_replaces_numbers, "batch it was given: atomic_numbers"),
    "divides by the number of neighbours": (
        changed("node", lambda v, b: v / torch.bincount(
            b.edge_index[1], minlength=b.n_atoms)[:, None]),
        "NaN or infinity in node",
    ),
    "draws random numbers": (
        changed("node", lambda v, b: v + torch.rand_like(v)), "node computed a second time",
    ),
    "normalises over the batch": (
        changed("node", lambda v, b: v - v.mean(0)), "node computed one structure at a time",
    ),
    "sees absolute positions": (
        changed("node", lambda v, b: v + b.positions[:, :1]), "node after a translation",
    ),
    "prefers an axis": (
        changed("vector", lambda v, b: v * torch.tensor([1.0, 1.0, 0.5])[:, None]),
        "vector after a rotation",
    ),
    "gives components as features": (
        changed("node", lambda v, b: v + _first_component(b)), "node after a rotation",
    ),
    "counts atoms": (
        changed("node", lambda v, b: v + _place(b)[:, None]), "node with the atoms in another",
    ),
    "forgets the shift in atomic energies": (
        changed("atomic_energy", lambda v, b: v - 0.1), "energy as the sum of atomic_energy",
    ),
}  # fmt: skip


def _first_component(batch: Batch) -> Tensor:
    """The x distance of each atom from its structure's first atom: translation sees nothing."""
    first = torch.searchsorted(batch.structure_index, batch.structure_index)
    return (batch.positions - batch.positions[first])[:, :1]


def _place(batch: Batch) -> Tensor:
    first = torch.searchsorted(batch.structure_index, batch.structure_index)
    return (torch.arange(batch.n_atoms) - first).double()


@pytest.mark.parametrize("defect", BROKEN)
def test_a_broken_teacher_is_caught(defect: str) -> None:
    spoil, said = BROKEN[defect]

    class Broken(NativeTeacher):
        def compute(self, batch: Batch) -> dict[str, Tensor]:
            return spoil(super().compute(batch), batch)

    with pytest.raises(ContractError, match=said):
        check_teacher(teacher(Broken))


def test_a_teacher_whose_identity_cannot_be_stored_is_caught() -> None:
    class NoDigest(NativeTeacher):
        digest = "v2"

    class NoJson(NativeTeacher):
        architecture = {"activation": torch.nn.SiLU()}  # noqa: RUF012

    class WrongName(NativeTeacher):
        def field_specs(self) -> tuple[FieldSpec, ...]:
            return tuple(replace(s, name="Node features") for s in super().field_specs()[:1])

    class Twice(NativeTeacher):
        def field_specs(self) -> tuple[FieldSpec, ...]:
            return super().field_specs() * 2

    broken: dict[type[NativeTeacher], str] = {
        NoDigest: "cannot record digest",
        NoJson: "not JSON serializable",
        WrongName: "cannot record fields.Node features",
        Twice: "twice",
    }
    for kind, said in broken.items():
        with pytest.raises(ContractError, match=said):
            check_teacher(teacher(kind))


def test_a_model_that_cannot_learn_is_caught() -> None:
    broken = model()
    forward = broken.forward

    def detached(batch: Batch) -> ModelOutput:
        output = forward(batch)
        return replace(output, forces=output.forces.detach())

    broken.forward = detached  # type: ignore[method-assign]
    with pytest.raises(ContractError, match="forces has no gradient"):
        check_student(broken)


def test_a_model_that_names_no_atomic_energy_is_caught() -> None:
    broken = model()
    broken.field_specs = lambda: model().field_specs()[:2]  # type: ignore[method-assign]
    with pytest.raises(ContractError, match="must name atomic_energy"):
        check_student(broken)


def write_rmd17(path: Path) -> None:
    structures = [numbered_structure(s, 3, periodic=False) for s in range(4)]
    np.savez(
        path,
        nuclear_charges=structures[0].atomic_numbers,
        coords=np.stack([s.positions for s in structures]),
        energies=np.array([s.energy for s in structures]),
        forces=np.stack([np.asarray(s.forces) for s in structures]),
    )


def write_ani(path: Path) -> None:
    structures = [numbered_structure(s, 3, periodic=False) for s in range(4)]
    with h5py.File(path, "w") as file:
        group = file.create_group("molecule")
        group["species"] = structures[0].atomic_numbers
        group["coordinates"] = np.stack([s.positions for s in structures])
        group["energies"] = np.array([s.energy for s in structures])
        group["forces"] = np.stack([np.asarray(s.forces) for s in structures])


def write_parquet(path: Path) -> None:
    structures = [numbered_structure(s, periodic=False) for s in range(4)]
    columns = {
        "atomic_numbers": [s.atomic_numbers.tolist() for s in structures],
        "positions": [s.positions.tolist() for s in structures],
        "energy": [s.energy for s in structures],
        "forces": [np.asarray(s.forces).tolist() for s in structures],
    }
    pq.write_table(pa.table(columns), path)


def write_extxyz(path: Path) -> None:
    ase.io.write(path, [as_atoms(numbered_structure(s)) for s in range(4)])


def write_database(path: Path) -> None:
    with ase.db.connect(path) as database:
        for s in range(4):
            database.write(as_atoms(numbered_structure(s)))


def write_store(path: Path) -> None:
    source = path.with_suffix(".extxyz")
    write_extxyz(source)
    import_dataset(source, path)


def write_open_catalyst(path: Path) -> None:
    write_lmdb(path, [numbered_structure(s) for s in range(4)])


FILES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "extxyz": ("a.extxyz", write_extxyz),
    "ase": ("a.traj", write_extxyz),
    "ase-db": ("a.db", write_database),
    "npz": ("a.npz", write_rmd17),
    "hdf5": ("a.h5", write_ani),
    "parquet": ("a.parquet", write_parquet),
    "ocp-lmdb": ("a.lmdb", write_open_catalyst),
    "store": ("a.zarr", write_store),
}


@pytest.mark.parametrize("name", known_names("kdcache.readers"))
def test_built_in_readers_keep_the_contract(name: str, tmp_path: Path) -> None:
    file, write = FILES[name]
    write(tmp_path / file)
    reader: Reader = lookup("kdcache.readers", name)  # type: ignore[assignment]
    check_reader(reader, tmp_path / file, ReadOptions(energy_unit="eV", allow_pickle=True))


def read_two(path: Path, options: ReadOptions, keys: LabelKeys, /) -> Iterator[Structure]:
    """A reader of a format of its own, in which a file says nothing."""
    del path, options, keys
    yield from (numbered_structure(s) for s in range(2))


def _list(path: Path, options: ReadOptions, keys: LabelKeys, /) -> Iterator[Structure]:
    return list(read_two(path, options, keys))  # type: ignore[return-value]


def _one_buffer(path: Path, options: ReadOptions, keys: LabelKeys, /) -> Iterator[Structure]:
    buffer = np.zeros((2, 3))
    for s in range(2):
        buffer[:] = s
        yield replace(numbered_structure(s, 2), positions=buffer)


def _float32(path: Path, options: ReadOptions, keys: LabelKeys, /) -> Iterator[Structure]:
    for structure in read_two(path, options, keys):
        yield replace(structure, positions=structure.positions.astype(np.float32))


def _same_id(path: Path, options: ReadOptions, keys: LabelKeys, /) -> Iterator[Structure]:
    for structure in read_two(path, options, keys):
        yield replace(structure, structure_id="water")


def _unlabelled(path: Path, options: ReadOptions, keys: LabelKeys, /) -> Iterator[Structure]:
    for structure in read_two(path, options, keys):
        yield replace(structure, forces=None)


def _random(path: Path, options: ReadOptions, keys: LabelKeys, /) -> Iterator[Structure]:
    for structure in read_two(path, options, keys):
        yield replace(structure, energy=float(np.random.default_rng().random()))


def _writes(path: Path, options: ReadOptions, keys: LabelKeys, /) -> Iterator[Structure]:
    path.write_text("cache")
    return read_two(path, options, keys)


def _one(path: Path, options: ReadOptions, keys: LabelKeys, /) -> Iterator[Structure]:
    yield numbered_structure(0)


BROKEN_READERS: list[tuple[Reader, str]] = [
    (_list, "must not return a <class 'list'>"),
    (_one_buffer, "changed while later ones were read; .* structure 0"),
    (_float32, "positions of structure 0 must be an array of float64, got float32"),
    (_same_id, "ids must be unique"),
    (_unlabelled, "structure 0 has no forces"),
    (_random, "a second reading gave another structure 0"),
    (_writes, "reading changed a.txt"),
    (_one, "two structures or more is needed, got 1"),
]


def test_a_reader_of_ones_own_passes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    check_reader(read_two, tmp_path / "a.txt")


@pytest.mark.parametrize(("reader", "said"), BROKEN_READERS)
def test_a_broken_reader_is_caught(reader: Reader, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ContractError, match=said):
        check_reader(reader, tmp_path / "a.txt")
