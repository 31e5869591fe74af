"""`kdcache dump-teacher`: what is kept, how, and what is refused before anything is made."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdcache.store import open_store
from tests.cli.commands import dataset, kdcache, refused, settings, usage, write_structures


def test_a_dump_prints_size_rate_and_the_error_of_every_field(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    said = kdcache("dump-teacher", data, "--teacher", teacher, "-o", tmp_path / "f.zarr")
    rows = {line.split()[0]: line.split() for line in said.splitlines()[2:-1]}
    assert sorted(rows) == ["atomic_energy", "energy", "forces", "node", "vector"]
    assert rows["energy"][3:] == ["exact", "0.0e+00"]
    assert rows["node"][3] == "half"
    assert 0 < float(rows["node"][4]) < 1e-3
    assert "24 structures, 71 atoms" in said
    assert "24 computed in" in said


def test_fields_codec_precision_name_and_taps_are_chosen(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    store = tmp_path / "f.zarr"
    kdcache("dump-teacher", data, "--teacher", teacher, "-o", store, "--fields", "node, node_msg",
            "--codec", "exact", "--precision", "float64", "--name", "painn-1",
            "--tap", "node/msg=message_layers.0", "--licence-teacher", "MIT",
            "--max-atoms", "7")  # fmt: skip
    entry = open_store(store).teachers["painn-1"]
    assert sorted(entry.fields) == ["node", "node_msg"]
    assert (entry.precision, entry.licence) == ("float64", "MIT")
    values = open_store(store).read("teachers/painn-1/node_msg")
    assert (values.dtype, values.shape) == (np.float64, (71, 8))


def test_a_second_teacher_goes_into_a_store(
    data: Path, teacher: Path, features: Path, tmp_path: Path
) -> None:
    store = tmp_path / "f.zarr"
    shutil.copytree(features, store)
    kdcache("dump-teacher", data, "--teacher", teacher, "--into", store, "--name", "second",
            "--codec", "compact")  # fmt: skip
    shown = kdcache("inspect", store)
    assert "teacher second: painn" in shown
    assert "teacher teacher: painn" in shown
    assert "the store is whole" in kdcache("verify", store, "--data", data)
    line = refused("train-student", store, "-o", tmp_path / "run", "--strategy", "n2n",
                   *settings())  # fmt: skip
    assert "names no teacher, and the store has teachers second, teacher" in line
    assert "--teacher NAME, or teacher_name in the term" in line
    kdcache("train-student", store, "-o", tmp_path / "run", "--strategy", "n2n",
            "--teacher", "second", *settings())  # fmt: skip


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("--fields", "nod"), "did you mean node?"),
    (("--fields", ""), "No fields"),
    (("--name", "a/b"), "cannot name a teacher"),
    (("--tap", "msg"), "kind/name=path"),
    (("--tap", "node/msg=message_layer.0"), "message_layers.0"),
    (("--teacher-format", "nativ"), "did you mean native?"),
    (("--teacher-format", "os:path"), "not a function that opens a teacher"),
    (("--teacher-format", "nowhere:load"), "cannot be imported"),
    (("--device", "gpu"), "--device gpu is no device"),
    (("--energy-unit", "eVv"), "did you mean eV?"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_a_refused_dump_leaves_nothing(
    options: tuple[str, ...], said: str, data: Path, teacher: Path, tmp_path: Path
) -> None:
    command = ("dump-teacher", data, "--teacher", teacher, "-o", tmp_path / "f.zarr")
    assert said in refused(*command, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("references", ["least_squares", "none"])
def test_an_element_the_teacher_does_not_know_is_refused_before_a_store_is_made(
    references: str, tmp_path: Path
) -> None:
    known = write_structures(tmp_path / "known.extxyz", dataset())
    teacher, store = tmp_path / "run", tmp_path / "f.zarr"
    kdcache("train-student", known, "-o", teacher, "--preset", "painn",
            *settings(f"references.mode={references}"))  # fmt: skip
    strange = dataset()
    strange[4] = replace(strange[4], atomic_numbers=np.full(strange[4].n_atoms, 118))
    data = write_structures(tmp_path / "data.extxyz", strange)
    command = ("dump-teacher", data, "--teacher", teacher, "-o", store)
    for policy in ("stop", "skip"):  # it is no failure of a teacher, but the wrong teacher
        line = refused(*command, "--on-error", policy)
        assert "Structure 'data:4' is none for this teacher: a structure has atomic number" in line
        assert "118" in line
        assert not store.exists()


def test_a_block_too_small_does_not_block_a_retry(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    command = ("dump-teacher", data, "--teacher", teacher, "-o", tmp_path / "f.zarr")
    assert "largest structure has 5 atoms" in refused(*command, "--block-atoms", 2)
    kdcache(*command, "--block-atoms", 6)


def test_where_a_dump_goes_is_said_once(
    data: Path, teacher: Path, features: Path, tmp_path: Path
) -> None:
    command = ("dump-teacher", "--teacher", teacher)
    assert "either -o STORE" in refused(*command, data)
    assert "either -o STORE" in refused(*command, data, "-o", "a.zarr", "--into", features)
    assert "needs DATA" in refused(*command, "-o", tmp_path / "f.zarr")
    assert "Leave it out with --into" in refused(*command, "--into", features, "--block-atoms", 9)
    assert "--into" in refused(*command, data, "-o", features)
    assert "already" in refused(*command, "--into", features)
    assert "0 is not in the range" in usage(*command, "--into", features, "--max-atoms", 0)
