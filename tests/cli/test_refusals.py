"""Features meet only the dataset they were made from, and only whole: each refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from kdcache.structures import Structure
from kdcache_cli.main import main
from tests.cli.commands import dataset, refused, settings, write_structures


def wrong(store: Path, *arguments: object) -> str:
    """The problems that `verify` lists, which it exits 2 for."""
    texts = ["verify", str(store), *map(str, arguments)]
    result = CliRunner().invoke(main, texts)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    assert result.stdout == ""
    *problems, summary = result.stderr.splitlines()
    assert problems
    assert all(line.startswith("wrong: ") for line in problems)
    assert summary.startswith(f"kdcache: {store}: {len(problems)} problem")
    return "\n".join(problems)


def other(structures: list[Structure]) -> list[Structure]:
    return [replace(s, positions=s.positions * 1.5) for s in structures]


def reordered(structures: list[Structure]) -> list[Structure]:
    return [structures[1], structures[2], structures[0], *structures[3:]]


def moved(structures: list[Structure]) -> list[Structure]:
    """Atom 2 of structure 7 stands 1e-4 Å further on; nothing else is another."""
    positions = structures[7].positions.copy()
    positions[2, 1] += 1e-4
    return [*structures[:7], replace(structures[7], positions=positions), *structures[8:]]


Edit = Callable[[list[Structure]], list[Structure]]
EDITS: list[tuple[Edit, str]] = [
    (other, "another dataset"),
    (reordered, "the same structures in another order"),
    (moved, "1 of 24 structures were edited"),
]


@pytest.mark.proof
@pytest.mark.parametrize(("edit", "said"), EDITS)
def test_features_of_another_dataset_are_refused(
    edit: Edit, said: str, features: Path, teacher: Path, tmp_path: Path
) -> None:
    # The same file name and the same ids: only the contents can tell.
    data = write_structures(tmp_path / "data.extxyz", edit(dataset()))
    line = wrong(features, "--data", data)
    assert said in line
    if edit is moved:
        assert "structure 7" in line
    run = tmp_path / "run"
    assert said in refused("train-student", features, "-o", run, *settings(),
                           "--strategy", "n2n", "--check-data", data)  # fmt: skip
    assert not run.exists()
    into = ("--into", features, "--name", "other")
    assert said in refused("dump-teacher", data, "--teacher", teacher, *into)
    assert not (features / "teachers" / "other").exists()


def shard(store: Path) -> Path:
    """A file of features."""
    return max((store / "teachers" / "teacher" / "node" / "c").rglob("*"), key=str)


def truncate(store: Path) -> None:
    content = shard(store).read_bytes()
    shard(store).write_bytes(content[: len(content) // 2])


def flip(store: Path) -> None:
    content = bytearray(shard(store).read_bytes())
    content[5] ^= 1
    shard(store).write_bytes(content)


def remove(store: Path) -> None:
    shard(store).unlink()


def age(store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps({**manifest, "format_version": 3}))


def replace_by_zarr(store: Path) -> None:
    shutil.rmtree(store)
    group = zarr.open_group(store, mode="w")
    group.create_array("node", data=np.zeros((4, 8), np.float32))


Damage = Callable[[Path], None]
# Each with what every command says of it, and whether a look at the files is enough to see it.
DAMAGES: list[tuple[Damage, str, bool]] = [
    (truncate, "bytes", True),
    (remove, "missing", True),
    (age, "format version 3, this kdcache reads 1 to 2. Install a newer kdcache", True),
    (replace_by_zarr, "is Zarr but no kdcache store", True),
    (flip, "checksum", False),
]


@pytest.mark.proof
@pytest.mark.parametrize(("damage", "said", "at_a_glance"), DAMAGES)
def test_a_damaged_store_is_refused(
    damage: Damage, said: str, at_a_glance: bool, features: Path, teacher: Path, tmp_path: Path
) -> None:
    store = tmp_path / "features.zarr"
    shutil.copytree(features, store)
    name = shard(store).relative_to(store).as_posix()
    damage(store)
    train = ("train-student", store, "-o", tmp_path / "run", "--strategy", "n2n", *settings())
    lines = [refused(*train)]
    if at_a_glance:
        lines.append(refused("inspect", store))
        into = ("--into", store, "--name", "other")
        lines.append(refused("dump-teacher", "--teacher", teacher, *into))
    lines.append(refused("verify", store) if damage in (age, replace_by_zarr) else wrong(store))
    for line in lines:
        assert said in line
        assert str(store) in line
        if damage in (truncate, flip, remove):
            assert name in line


def test_a_store_is_no_run_and_a_run_no_store(
    data: Path, features: Path, teacher: Path, tmp_path: Path
) -> None:
    assert "is a store" in refused("train-student", features, "-o", features, *settings())
    assert "no trained model" in refused("evaluate", features, data)
    assert "no trained model" in refused(
        "dump-teacher", data, "--teacher", features, "-o", tmp_path / "x.zarr"
    )
    for command in (
        ("import", teacher, "-o", tmp_path / "x.zarr"),
        ("train-student", teacher, "-o", tmp_path / "run", *settings()),
        ("dump-teacher", teacher, "--teacher", teacher, "-o", tmp_path / "x.zarr"),
        ("evaluate", teacher, teacher),
        ("verify", features, "--data", teacher),
    ):
        assert f"{teacher} is a run" in refused(*command)
    assert "no kdcache store" in refused("inspect", teacher)
    assert "no kdcache store" in refused("verify", teacher)
    assert not list(tmp_path.iterdir())


def test_a_file_is_said_to_be_no_store(data: Path, teacher: Path, tmp_path: Path) -> None:
    for command in (
        ("inspect", data),
        ("verify", data),
        ("stats", data),
        ("sign", data, "--key", data),
        ("dump-teacher", "--into", data, "--teacher", teacher),
    ):
        line = refused(*command)
        assert "Not a directory" not in line
        if command[0] != "sign":  # its key is looked at first
            assert f"{data} is a file and no kdcache store" in line


def test_one_that_lacks_something_holds_it_not(features: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.extxyz"
    empty.touch()
    line = refused("import", empty, "-o", tmp_path / "x.zarr")
    assert "empty.extxyz holds no structures" in line
    line = refused("subset", features, "-o", tmp_path / "x.zarr", "--sample", 2, "--teachers", "x")
    assert f"{features} holds no teacher 'x'" in line


def test_what_does_not_exist_is_named(data: Path, teacher: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.extxyz"
    for command in (
        ("import", missing, "-o", tmp_path / "x.zarr"),
        ("train-student", missing, "-o", tmp_path / "run", *settings()),
        ("dump-teacher", missing, "--teacher", teacher, "-o", tmp_path / "x.zarr"),
        ("dump-teacher", data, "--teacher", missing, "-o", tmp_path / "x.zarr"),
        ("dump-teacher", "--teacher", teacher, "--into", missing),
        ("evaluate", teacher, missing),
        ("evaluate", missing, data),
        ("inspect", missing),
        ("verify", missing),
    ):
        assert f"{missing} does not exist" in refused(*command)
    assert not list(tmp_path.iterdir())
