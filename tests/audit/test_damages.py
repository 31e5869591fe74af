"""An audit names the field of every mistake a writer can make with right digests, and no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
import torch

from kdcache.audit import AuditOptions, AuditReport, audit_store
from kdcache.fields import Codec
from kdcache.store import Store, open_store
from kdcache.store.manifest import MANIFEST
from kdcache.teachers import NativeTeacher
from tests.audit.damage import damaged
from tests.audit.test_pipeline import audit, wrong
from tests.chain import dump, make_potential, make_store
from tests.store.test_verify import reseal

Array = npt.NDArray[Any]
N = 40
Taught = tuple[Store, NativeTeacher]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    """Everything in one shard of one block, so that a change meets all or what it names."""
    store = make_store(tmp_path_factory.mktemp("damages"), N, atom_capacity=4096)
    teacher = NativeTeacher(make_potential())
    dump(store, teacher, codec="half")
    return open_store(store.path), teacher


def spoilt(taught: Taught, directory: Path, field: str, change: Callable[[Array], Array]) -> Any:
    store, teacher = taught
    found = damaged(store, directory / "c.zarr", f"teachers/teacher/{field}", change)
    return audit(found, teacher)


def n_outside(report: AuditReport, field: str) -> int:
    (found,) = (one for one in report.fields if one.spec.name == field)
    return found.n_outside


def atoms_of(store: Store, row: int) -> slice:
    first = int(store.index.atom_start[row])
    return slice(first, first + int(store.index.n_atoms[row]))


def permuted(values: Array) -> Array:
    return values[:, [1, 0, *range(2, values.shape[1])]]


def transposed(values: Array) -> Array:
    """[n, 3, C] written as [n, C, 3]."""
    return values.transpose(0, 2, 1).reshape(values.shape)


def noisy(values: Array) -> Array:
    noise = np.random.default_rng(0).uniform(-10, 10, values.shape) * 2.0**-11
    return values * (1 + noise)


@pytest.mark.parametrize(
    ("field", "change", "share"),
    [
        ("node", permuted, 1.0),
        ("vector", lambda values: -values, 1.0),
        ("vector", transposed, 1.0),
        ("node", noisy, 0.9),
        ("vector", noisy, 0.9),
        ("forces", lambda values: values * 0.529177 / 27.2114, 1.0),
        ("forces", lambda values: -values, 1.0),
        ("node", lambda values: values * 1.002, 0.5),
        ("atomic_energy", lambda values: values + 0.05, 1.0),
        ("energy", lambda values: values[::-1], 0.9),
        ("node", lambda values: np.roll(values, 1, axis=0), 0.9),
    ],
    ids=[
        "a channel permuted", "vectors negated", "vectors transposed", "node noisy", "vector noisy",
        "atomic units", "gradients for forces", "scaled", "a constant", "energies in another order",
        "a row too far",
    ],
)  # fmt: skip
def test_a_mistake_in_a_field_is_found(
    field: str, change: Callable[[Array], Array], share: float, taught: Taught, tmp_path: Path
) -> None:
    report = spoilt(taught, tmp_path, field, change)
    assert wrong(report) == [field]
    (found,) = (one for one in report.fields if one.problem)
    # A lone atom's vectors and forces are zero, whatever is done to them.
    store, _ = taught
    n_alone = int((store.index.n_atoms == 1).sum()) if field in ("vector", "forces") else 0
    assert found.n_outside >= share * (found.n_rows - 2 * n_alone) * 0.9


def test_energies_without_references_are_found(taught: Taught, tmp_path: Path) -> None:
    store, teacher = taught
    numbers = [structure.atomic_numbers.tolist() for structure in store.structures("store")]
    totals = np.array([sum(teacher.references[z] for z in one) for one in numbers])
    for k, sign in enumerate((-1, 1)):
        (tmp_path / str(k)).mkdir()

        def add(values: Array, moved: Array = sign * totals) -> Array:
            return values + moved

        report = spoilt(taught, tmp_path / str(k), "energy", add)
        assert wrong(report) == ["energy"]
        assert n_outside(report, "energy") == N


def test_structures_in_each_others_place_are_found(taught: Taught, tmp_path: Path) -> None:
    store, _ = taught
    first, second = np.flatnonzero(store.index.n_atoms == 4)[:2].tolist()
    a, b = atoms_of(store, first), atoms_of(store, second)

    def swap(values: Array) -> Array:
        changed = values.copy()
        changed[a], changed[b] = values[b], values[a]
        return changed

    report = spoilt(taught, tmp_path, "node", swap)
    assert wrong(report) == ["node"]
    (node,) = (one for one in report.fields if one.problem)
    assert node.n_outside == 8
    assert node.worst_structure in store.index.structure_id[[first, second]]


@pytest.mark.parametrize("field", ["node", "vector", "forces"])
def test_one_structure_in_twenty_is_found(field: str, taught: Taught, tmp_path: Path) -> None:
    store, teacher = taught
    rows = np.flatnonzero(store.index.n_atoms > 3)[[2, 9]]

    def turn(values: Array) -> Array:
        for row in rows.tolist():
            values[atoms_of(store, row)] *= 1.01
        return values

    report = spoilt(taught, tmp_path, field, turn)
    assert wrong(report) == [field]
    (found,) = (one for one in report.fields if one.problem)
    assert found.worst_structure in store.index.structure_id[rows]
    assert found.relative < 0.01  # too little for a mean over all to tell
    # A sample without them says nothing, one with them does.
    damaged_store = open_store(tmp_path / "c.zarr")
    seen = [bool(wrong(audit(damaged_store, teacher, sample=20, seed=seed))) for seed in range(6)]
    assert any(seen)


def test_a_wild_value_does_not_hide_what_is_wrong_elsewhere(taught: Taught, tmp_path: Path) -> None:
    store, teacher = taught
    wild = atoms_of(store, 0)

    def hide(values: Array) -> Array:
        values[wild] = 65504.0
        values[wild.stop :] *= 1.002
        return values

    found = damaged(store, tmp_path / "c.zarr", "teachers/teacher/node", hide)
    seeds = [s for s in range(20) if 0 not in sampled(found, s)][:2]
    for seed in seeds:
        report = audit(found, teacher, sample=20, seed=seed)
        assert wrong(report) == ["node"]


def sampled(store: Store, seed: int) -> list[int]:
    order = np.random.default_rng([seed, 0]).permutation(np.arange(len(store)))
    return [int(row) for row in order[:20]]


def described(store: Store, copy: Path, **changes: Any) -> Store:
    """A copy whose manifest says other things of the teacher."""
    shutil.copytree(str(store.path), copy)
    document = json.loads((copy / MANIFEST).read_text())
    document["teachers"]["teacher"] |= changes
    (copy / MANIFEST).write_text(json.dumps(document))
    reseal(copy)
    return open_store(copy)


def test_what_a_manifest_says_loosens_nothing(taught: Taught, tmp_path: Path) -> None:
    store, teacher = taught
    found = damaged(
        store, tmp_path / "a.zarr", "teachers/teacher/energy", lambda values: values + 0.5
    )
    found = described(found, tmp_path / "b.zarr", precision="approximate")
    report = audit(found, teacher)
    assert report.tolerance == 1e-4
    assert wrong(report) == ["energy"]
    # Energies beyond all bounds, of which half an eV would be nothing.
    wild = {str(z): 1e9 for z in teacher.references}
    report = audit(described(found, tmp_path / "c.zarr", references=wild), teacher)
    assert n_outside(report, "energy") == N


def test_other_reference_energies_are_named(taught: Taught, tmp_path: Path) -> None:
    store, teacher = taught
    moved = {str(z): energy + 0.01 for z, energy in teacher.references.items()}
    report = audit(described(store, tmp_path / "a.zarr", references=moved), teacher)
    assert sorted(wrong(report)) == ["atomic_energy", "energy"]
    assert all("other reference energies" in problem for problem in report.problems)


@pytest.mark.parametrize("stated", [{"unit": ""}, {"symmetry": "vector"}, {"unit": "eV/Å"}])
def test_a_field_that_is_described_otherwise_is_named(
    stated: dict[str, str], taught: Taught, tmp_path: Path
) -> None:
    store, teacher = taught
    name = "forces" if stated.get("unit") == "" else "node"
    if "symmetry" in stated:
        name, stated = "vector", {"symmetry": "invariant"}
    fields = json.loads((Path(str(store.path)) / MANIFEST).read_text())["teachers"]["teacher"]
    fields["fields"][name] |= stated
    copy = tmp_path / "a.zarr"
    shutil.copytree(str(store.path), copy)
    node = copy / "teachers" / "teacher" / name / "zarr.json"
    document = json.loads(node.read_text())
    document["attributes"] |= stated
    node.write_text(json.dumps(document))
    root = json.loads((copy / "zarr.json").read_text())
    root["consolidated_metadata"]["metadata"][f"teachers/teacher/{name}"] = document
    (copy / "zarr.json").write_text(json.dumps(root))
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["teachers"]["teacher"] = fields
    (copy / MANIFEST).write_text(json.dumps(manifest))
    reseal(copy)
    report = audit(open_store(copy), teacher)
    assert wrong(report) == [name]
    assert "it is described wrongly" in report.problems[0]


@pytest.mark.parametrize("codec", ["half", "exact", "compact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_an_honest_store_passes_in_batches_of_any_size(
    codec: Codec, dtype: torch.dtype, tmp_path: Path
) -> None:
    store = make_store(tmp_path, 18)
    teacher = NativeTeacher(make_potential(dtype=dtype))
    dump(store, teacher, codec=codec)
    found = open_store(store.path)
    for max_atoms, sample, seed in ((1, 18, 0), (7, 11, 1), (4096, 1, 2), (4096, 18, 3)):
        report = audit(found, teacher, max_atoms=max_atoms, sample=sample, seed=seed)
        assert report.problems == []
        assert report.tolerance == (1e-9 if dtype is torch.float64 else 1e-4)


def test_compact_values_a_step_off_are_found(tmp_path: Path) -> None:
    store = make_store(tmp_path, 18, atom_capacity=4096)
    teacher = NativeTeacher(make_potential())
    dump(store, teacher, codec="compact")
    found = open_store(store.path)
    file = Path(str(found.path)) / "teachers" / "teacher" / "node" / "c" / "0" / "0"
    assert n_outside(audit(found, teacher), "node") == 0
    content = bytearray(file.read_bytes())
    n_bytes = found.plan.atom_capacity * found.spec("teachers/teacher/node").row_size
    values = np.frombuffer(content[:n_bytes], np.int8).copy()
    # Two steps of int8 towards zero; the chunk's checksum stands behind it.
    values[0] -= 2 * np.sign(values[0])
    content[:n_bytes] = values.tobytes()
    checksum = google_crc32c.value(values.tobytes())
    content[n_bytes : n_bytes + 4] = checksum.to_bytes(4, "little")
    file.write_bytes(content)
    reseal(Path(str(found.path)))
    report = audit(open_store(store.path), teacher)
    assert wrong(report) == ["node"]
    assert n_outside(report, "node") == 1


def test_an_error_that_is_recorded_too_small_is_found(tmp_path: Path) -> None:
    store = make_store(tmp_path, 18)
    teacher = NativeTeacher(make_potential())
    dump(store, teacher, codec="compact")
    found = open_store(store.path)
    errors = {n: e.model_dump() for n, e in found.teachers["teacher"].errors.items()}
    errors["node"]["relative"] = 1e-5
    report = audit(described(found, tmp_path / "a.zarr", errors=errors), teacher)
    assert wrong(report) == ["node"]
    assert n_outside(report, "node") == 0


def test_a_structure_at_rest_is_not_taken_for_wrong(taught: Taught) -> None:
    store, teacher = taught
    options = AuditOptions(threads=1, sample=1)
    alone = np.flatnonzero(store.index.n_atoms == 1)
    seeds = [s for s in range(200) if sampled(store, s)[0] in alone][:2]
    assert seeds
    for seed in seeds:
        assert audit_store(store, teacher, replace(options, seed=seed)).problems == []
