"""Files, globs, ids and how often a dataset can be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ase.io
import pytest

from kdcache.errors import ConfigError, DataError
from kdcache.readers import LabelKeys, ReadOptions, read_structures
from kdcache.readers.dataset import format_of
from kdcache.structures import Structure
from tests.readers.identity import as_atoms, numbered_structure


def write(path: Path, start: int, n: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    ase.io.write(path, [as_atoms(numbered_structure(s)) for s in range(start, start + n)])
    return path


def test_several_files_and_globs_come_in_the_order_named(tmp_path: Path) -> None:
    write(tmp_path / "b1.extxyz", 4, 2)
    write(tmp_path / "b2.extxyz", 6, 1)
    first = write(tmp_path / "z.extxyz", 0, 4)
    dataset = read_structures([first, str(tmp_path / "b*.extxyz")])
    assert dataset.names == ("z.extxyz", "b1.extxyz", "b2.extxyz")
    # Twice: a dataset is no iterator.
    for _ in range(2):
        assert [s.energy for s in dataset] == [numbered_structure(s).energy for s in range(7)]
    assert [s.structure_id for s in dataset][-3:] == ["b1:0", "b1:1", "b2:0"]


def test_files_of_one_name_in_two_folders_keep_their_ids_apart(tmp_path: Path) -> None:
    files = [write(tmp_path / folder / "train.extxyz", 0, 2) for folder in ("b", "a")]
    ids = [s.structure_id for s in read_structures(files)]
    assert ids == ["train:0", "train:1", "train#2:0", "train#2:1"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    path = write(tmp_path / "run[1].extxyz", 0, 2)
    assert len(list(read_structures(path))) == 2


def test_sources_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.extxyz", 0, 2)
    with pytest.raises(DataError, match="is named twice"):
        read_structures([path, str(tmp_path / "*.extxyz")])
    with pytest.raises(DataError, match="does not exist"):
        read_structures(tmp_path / "b.extxyz")
    with pytest.raises(DataError, match="matches no file"):
        read_structures(str(tmp_path / "*.npz"))
    with pytest.raises(DataError, match="is a directory"):
        read_structures(tmp_path)
    with pytest.raises(DataError, match="No files"):
        read_structures([])
    with pytest.raises(ConfigError, match="did you mean extxyz"):
        list(read_structures(path, ReadOptions(format="extxy")))


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.extxyz", 0, 3)
    path.write_text(path.read_text() + "damaged\n")
    found = iter(read_structures(path))
    assert [next(found).structure_id for _ in range(3)] == ["a:0", "a:1", "a:2"]
    with pytest.raises(DataError, match="damaged"):
        next(found)


def read_one(path: Path, options: ReadOptions, keys: LabelKeys) -> Iterator[Structure]:
    """A reader of somebody else's, named by import path."""
    structure = numbered_structure(int(path.read_text()))
    structure.structure_id = ""
    yield structure


def test_a_reader_may_be_named_by_import_path(tmp_path: Path) -> None:
    (tmp_path / "a.mine").write_text("3")
    (found,) = read_structures(
        tmp_path / "a.mine", ReadOptions(format="tests.readers.test_dataset:read_one")
    )
    assert found.structure_id == "a:0"
    assert found.energy == numbered_structure(3).energy


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.xyz", "extxyz"),
        ("a.extxyz.gz", "extxyz"),
        ("a.NPZ", "npz"),
        ("a.h5", "hdf5"),
        ("a.db", "ase-db"),
        ("a.zarr", "store"),
        ("OUTCAR", "ase"),
        ("a.traj", "ase"),
    ],
)
def test_the_suffix_chooses_the_reader(name: str, expected: str) -> None:
    assert format_of(Path(name)) == expected
