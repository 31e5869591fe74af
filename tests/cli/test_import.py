"""`kdcache import`: what it says, what it refuses, and that a refusal does not block a retry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kdcache.store import open_store
from tests.cli.commands import dataset, kdcache, refused, usage, write_structures


def test_an_import_says_which_keys_it_took_and_what_it_made(data: Path, tmp_path: Path) -> None:
    store = tmp_path / "data.zarr"
    said = kdcache("import", data, "-o", store, "--split", "val=0.25", "--cutoff", 3,
                   "--max-neighbors", 4, "--licence-labels", "CC-BY-4.0").splitlines()  # fmt: skip
    assert said[0] == "data.extxyz: energy from energy, forces from forces"
    assert said[1] == "splits: train 18, val 6"
    assert said[2].startswith(f"{store}: 24 structures, 71 atoms, 24 labelled, ")
    manifest = open_store(store).manifest
    assert manifest.graph is not None
    assert (manifest.graph.cutoff, manifest.graph.max_neighbors) == (3.0, 4)
    assert manifest.dataset.licences.labels == "CC-BY-4.0"


def test_a_finished_store_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    kdcache("import", data, "-o", tmp_path / "data.zarr")
    before = (tmp_path / "data.zarr" / "manifest.json").read_bytes()
    assert "nothing is overwritten" in refused("import", data, "-o", tmp_path / "data.zarr")
    assert (tmp_path / "data.zarr" / "manifest.json").read_bytes() == before


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("--energy-key", "enrgy"), "did you mean energy?"),
    (("--energy-unit", "kcal"), "did you mean kcal/mol?"),
    (("--forces-unit", "eV"), "eV"),
    (("--format", "extxzy"), "did you mean extxyz?"),
    (("--split", "val"), "NAME=FRACTION"),
    (("--split", "vla=0.1"), "neither val nor test"),
    (("--split", "val=0.1,val=0.2"), "twice"),
    (("--split", "val=0.1", "--split", "val=0.2"), "twice"),
    (("--split", "val=1.5"), "between 0 and 1"),
    (("--max-neighbors", "4"), "--cutoff"),
    (("--cutoff", "-1"), "positive"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_a_refused_import_leaves_nothing(
    options: tuple[str, ...], said: str, data: Path, tmp_path: Path
) -> None:
    assert said in refused("import", data, "-o", tmp_path / "data.zarr", *options)
    assert not list(tmp_path.iterdir())


def test_splits_may_be_named_together_or_one_by_one(data: Path, tmp_path: Path) -> None:
    together = kdcache("import", data, "-o", tmp_path / "a.zarr", "--split", "val=0.25,test=0.25")
    one_by_one = ("--split", "val=0.25", "--split", "test=0.25")
    assert "splits: test 6, train 12, val 6" in together
    assert "splits: test 6, train 12, val 6" in kdcache(
        "import", data, "-o", tmp_path / "b.zarr", *one_by_one
    )


def test_numbers_out_of_range_are_usage_errors(data: Path, tmp_path: Path) -> None:
    assert "--seed" in usage("import", data, "-o", tmp_path / "data.zarr", "--seed", -1)


def test_an_empty_file_a_directory_and_other_text_are_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.extxyz").write_text("")
    (tmp_path / "notes.txt").write_text("hello\n")
    output = ("-o", tmp_path / "data.zarr")
    assert "no structures" in refused("import", tmp_path / "empty.extxyz", *output)
    assert "notes.txt cannot be read" in refused("import", tmp_path / "notes.txt", *output)
    assert "is a directory" in refused("import", tmp_path, *output)
    assert "matches no file" in refused("import", tmp_path / "*.db", *output)
    assert "named twice" in refused("import", data, data, *output)
    # What was refused does not stand in the way of what is right.
    kdcache("import", data, *output)


def test_missing_labels_name_the_structure_and_the_way_out(tmp_path: Path) -> None:
    structures = dataset(6)
    structures[4] = replace(structures[4], energy=None, forces=None)
    data = write_structures(tmp_path / "data.extxyz", structures)
    line = refused("import", data, "-o", tmp_path / "data.zarr")
    assert "data.extxyz, structure 4 has no energy" in line
    assert "--unlabelled" in line
    kdcache("import", data, "-o", tmp_path / "data.zarr", "--unlabelled")
    assert open_store(tmp_path / "data.zarr").manifest.dataset.n_labelled == 5
