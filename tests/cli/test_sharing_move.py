"""publish, pull and pack: what they print and make, and what they refuse in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from kdcache.sharing import Selection
from kdcache.store import open_store, read_manifest
from kdcache_cli.main import main
from tests.cli.commands import kdcache, refused, settings, usage
from tests.sharing.counting import counted
from tests.store.sample import files_of


def test_a_store_goes_round_and_comes_back_the_same(features: Path, tmp_path: Path) -> None:
    n_files = len(files_of(features)) - 1
    digest = read_manifest(features).root_digest[:12]
    said = kdcache("publish", features, tmp_path / "disk.zarr")
    assert re.fullmatch(
        rf"{tmp_path}/disk\.zarr: {n_files} files, [\d.]+ kB, digest {digest}…; "
        rf"[\d.]+ s \([\d.]+ k?M?B/s\)\n",
        said,
    )
    said = kdcache("publish", features, tmp_path / "disk.zarr")
    assert said.endswith(f" were there already, digest {digest}…\n")
    kdcache("pack", tmp_path / "disk.zarr", "-o", tmp_path / "packed.zip")
    kdcache("pull", tmp_path / "packed.zip", "-o", tmp_path / "unpacked.zarr")
    with counted(tmp_path) as server:
        kdcache("pull", f"{server.url}/unpacked.zarr", "-o", f"file://{tmp_path}/back.zarr")
    assert files_of(tmp_path / "back.zarr") == files_of(features)
    assert "the store is whole" in kdcache("verify", tmp_path / "back.zarr")


def test_a_sample_says_its_cost_first_and_trains(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"file://{tmp_path}/sample.zarr"
    monkeypatch.setenv("KDCACHE_STORE_CACHE", str(tmp_path / "cache"))
    with counted(features.parent) as server:
        said = kdcache("pull", f"{server.url}/{features.name}", "-o", target, "--sample", 12,
                       "--fields", "node,energy").splitlines()  # fmt: skip
    n_blocks = open_store(features).plan.n_blocks
    assert re.fullmatch(
        rf"12 of 24 structures: the first 12 in store order; [\d.]+ kB are read, "
        rf"\d+ of {n_blocks} blocks",
        said[0],
    )
    assert said[-1].startswith(f"{target}: 12 structures, ")
    assert not (tmp_path / "cache").exists()  # whole files are not wanted
    options = settings("training.max_steps=2", "training.eval_every=2")
    kdcache("train-student", tmp_path / "sample.zarr", "-o", tmp_path / "run",
            "--preset", "painn-small", "--strategy", "n2n", *options)  # fmt: skip


def test_a_sample_with_a_seed_is_that_of_a_subset(features: Path, tmp_path: Path) -> None:
    drawn, subset = tmp_path / "drawn.zarr", tmp_path / "subset.zarr"
    said = kdcache("pull", features, "-o", drawn, "--sample", 9, "--seed", 5)
    assert said.startswith("9 of 24 structures: a sample of 9 with seed 5; ")
    kdcache("subset", features, "-o", subset, "--sample", 9, "--seed", 5)
    ids = open_store(subset).index.structure_id.tolist()
    assert open_store(drawn).index.structure_id.tolist() == ids
    assert read_manifest(drawn).root_digest == read_manifest(subset).root_digest
    shown = " ".join(kdcache("pull", "--help").split())
    assert "the same for everybody" in shown
    assert "as subset --seed does" in shown
    assert "none is asked for" in refused("pull", features, "-o", tmp_path / "x", "--seed", 5)


def test_some_structures_are_published(features: Path, tmp_path: Path) -> None:
    said = kdcache("publish", features, tmp_path / "few.zarr", "--where",
                   "n_atoms<3 or split=='val'", "--scratch", tmp_path)  # fmt: skip
    n_atoms = open_store(features).index.n_atoms
    few = open_store(tmp_path / "few.zarr")
    assert said.startswith(f"{len(few)} of 24 structures: where n_atoms < 3 or split == 'val'; ")
    assert (few.index.n_atoms < 3).sum() == (n_atoms < 3).sum()
    assert [file.name for file in tmp_path.iterdir()] == ["few.zarr"]


def refusal(*words: object) -> str:
    """The one line that is said after what would be read."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


def test_before_rows_are_read_the_target_of_some_structures_is_looked_at(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, scratch, foreign = (tmp_path / name for name in ("few.zarr", "scratch", "foreign"))
    scratch.mkdir()
    publish = ("publish", features, few, "--scratch", scratch, "--where")
    kdcache(*publish, "n_atoms < 3")
    assert "were there already" in kdcache(*publish, "n_atoms < 3")
    foreign.mkdir()
    (foreign / "thesis.tex").touch()

    def write(*_: object) -> None:
        raise AssertionError("rows are read")

    with monkeypatch.context() as patched:
        patched.setattr(Selection, "write", write)
        before = read_manifest(few).root_digest
        line = refusal(*publish, "n_atoms < 4")
        assert f"{few} is another store ({before[:12]}…). Nothing is overwritten" in line
        line = refusal("publish", features, foreign, "--scratch", scratch, "--where", "n_atoms < 4")
        assert f"{foreign} exists and is no finished store" in line
    assert not any(scratch.iterdir())
    kdcache(*publish, "n_atoms < 4", "--replace")
    # What only the copy could know is said with where the rows are.
    line = refusal(*publish, "n_atoms < 4", "--fields", "node")
    kept = next(scratch.iterdir())
    assert f"The rows were read already, and are kept in {kept} for the same command" in line


def test_wrong_uses_are_refused_in_one_line(features: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    target = tmp_path / "x.zarr"
    for arguments, said in (
        (["publish", features, features], "is source and target"),
        (["publish", features, "https://host/x.zarr"], "which is read from only"),
        (["publish", features, tmp_path / "mine"], "Nothing is overwritten"),
        (["publish", tmp_path / "none.zarr", target], "none.zarr does not exist"),
        (["publish", features, target, "--fields", "nod"], "did you mean node"),
        (["publish", features, target, "--teachers", "x"], "holds no teacher 'x'"),
        (["publish", features, target, "--where", "n_atom < 3"], "did you mean n_atoms"),
        (["publish", features, target, "--where", "open('x')"], "is not part of the language"),
        (["pull", features, "-o", "s3://bucket/x.zarr"], "what is pulled is written to a disk"),
        (["pull", features, "-o", target, "--sample", 99], "A sample of 99 is asked for, 24"),
        (["pull", tmp_path / "mine", "-o", target], "mine"),
        (["pull", "https://host/x.zip", "-o", target], "Fetch the file and name it here"),
        (["pack", features, "-o", tmp_path / "mine"], "nothing is overwritten"),
        (["pack", features, "-o", "s3://bucket/x.zip"], "a packed store is written to a disk"),
    ):
        assert said in refused(*arguments), arguments
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_numbers_out_of_range_are_refused(features: Path, tmp_path: Path) -> None:
    assert "--jobs" in usage("pull", features, "-o", tmp_path / "x", "--jobs", 0)
    assert "--sample" in usage("pull", features, "-o", tmp_path / "x", "--sample", 0)
