"""One lab annotates, signs and withholds; another verifies, joins and trains."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from kdcache.store import open_store, read_manifest
from kdcache.structures import Structure
from kdcache_cli.main import main
from tests.cli.commands import dataset, kdcache, refused, settings, write_structures
from tests.store.sample import files_of


@pytest.fixture
def copied(features: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(features, tmp_path / "copied.zarr"))


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private and a public key."""
    kdcache("keygen", tmp_path / "lab.pem")
    return tmp_path / "lab.pem", tmp_path / "lab.pem.pub"


@pytest.fixture
def shared(features: Path, tmp_path: Path) -> Path:
    kdcache("withhold", features, "-o", tmp_path / "shared.zarr")
    return tmp_path / "shared.zarr"


def reversed_data(tmp_path: Path, structures: Sequence[Structure] | None = None) -> Path:
    """The receiver's copy: ids are his own, the order is another."""
    mine = list(structures or dataset())[::-1]
    return write_structures(tmp_path / "mine.extxyz", mine)


def test_what_is_annotated_is_inspected_and_the_digest_is_said(copied: Path) -> None:
    before = read_manifest(copied).root_digest
    said = kdcache("annotate", copied, "--creator", "A. Lab", "--citation", "doi:10.1000/xyz",
                   "--licence-structures", "CC-BY-4.0", "--licence-labels", "ask us",
                   "--licence-teacher", "teacher=MIT")  # fmt: skip
    after = read_manifest(copied).root_digest
    assert said.splitlines() == [
        "ask us: no SPDX identifier known here; kept as free text",
        f"{copied}: root digest {after[:12]}…, before {before[:12]}…: whoever was given the old "
        f"one needs this one",
    ]
    shown = kdcache("inspect", copied)
    assert "creator     A. Lab" in shown
    assert "citation    doi:10.1000/xyz" in shown
    assert "licence: MIT" in shown
    assert json.loads(kdcache("inspect", copied, "--json"))["dataset"]["creator"] == "A. Lab"
    assert "nothing changes" in kdcache("annotate", copied, "--creator", "A. Lab")
    assert "the store is whole" in kdcache("verify", copied)
    assert "Nothing is stated" in refused("annotate", copied)
    assert "NAME=LICENCE" in refused("annotate", copied, "--licence-teacher", "MIT")
    assert "did you mean teacher?" in refused("annotate", copied, "--licence-teacher", "teach=MIT")
    assert "does not exist" in refused("annotate", copied / "no", "--creator", "A. Lab")


def test_a_signed_store_is_verified_by_the_public_key(
    copied: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert "exists, and a key that is lost" in refused("keygen", private)
    assert "is not signed" in refused("verify", copied, "--key", public)
    kdcache("sign", copied, "--key", private)
    said = kdcache("verify", copied, "--key", public)
    assert "the store is whole" in said
    assert "; signed by key " in said
    assert ", not checked here (kdcache verify --key)" in kdcache("inspect", copied)
    assert "nothing is overwritten" in refused("sign", copied, "--key", private)
    assert "is signed" in refused("annotate", copied, "--creator", "A. Lab")
    kdcache("annotate", copied, "--creator", "A. Lab", "--remove-signature")
    beside = tmp_path / "copied.sig.json"
    kdcache("sign", copied, "--key", private, "-o", beside)
    assert "signed by key" in kdcache("verify", copied, "--key", public, "--signature", beside)
    assert "needs the --key" in refused("verify", copied, "--signature", beside)


def test_every_wrong_signature_is_one_line(
    copied: Path, features: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    verify = ("verify", copied, "--key", public)
    kdcache("sign", copied, "--key", private)
    kdcache("keygen", tmp_path / "other.pem")
    other = tmp_path / "other.pem.pub"
    assert "whoever signed is not whom you trust" in refused("verify", copied, "--key", other)
    assert "the other key of a pair" in refused("verify", copied, "--key", private)
    signature = (copied / "signature.json").read_bytes()
    (copied / "signature.json").write_bytes(signature[:-40])
    assert "is no signature" in refused(*verify)
    (copied / "signature.json").write_bytes(signature)
    manifest = (copied / "manifest.json").read_bytes()
    (copied / "manifest.json").write_bytes(manifest.replace(b"data.extxyz", b"date.extxyz"))
    assert "it was edited or damaged" in refused(*verify)
    (copied / "manifest.json").write_bytes(manifest)
    kdcache("annotate", copied, "--creator", "a stranger", "--remove-signature")
    (copied / "signature.json").write_bytes(signature)
    assert "another store, or one that was changed" in refused(*verify)
    assert "of ANOTHER content" in kdcache("inspect", copied)
    (copied / "manifest.json").write_bytes(manifest)
    assert "signed by key" in kdcache(*verify)
    shard = copied / "teachers" / "teacher" / "node" / "c" / "0" / "0"
    damaged = bytearray(shard.read_bytes())
    damaged[3] ^= 1
    shard.write_bytes(damaged)
    result = CliRunner().invoke(main, [str(word) for word in verify])
    assert result.exit_code == 2
    assert "teachers/teacher/node/c/0/0 has digest" in result.stderr
    assert result.stdout == ""


def test_a_store_goes_to_another_lab_without_its_structures_and_comes_together_there(
    features: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    store = Path(shutil.copytree(features, tmp_path / "features.zarr"))
    kdcache("sign", store, "--key", private)
    shared, full = tmp_path / "shared.zarr", tmp_path / "full.zarr"
    said = kdcache("withhold", store, "-o", shared)
    assert said.startswith("left out: atomic_numbers, cell, energy, forces, pbc, positions\n")
    said = kdcache("verify", shared, "--key", public)
    assert "signed by key" in said
    assert "; left out, so not checked: atomic_numbers, cell," in said
    shown = kdcache("inspect", shared)
    assert "structures (left out: atomic_numbers, cell, energy" in shown
    assert "of the whole store, not checked here" in shown
    # By contents: ids and order of the receiver are his own, and he has more than the sender used.
    mine = reversed_data(tmp_path, [*dataset(), *dataset(26)[24:]])
    said = kdcache("join", shared, mine, "-o", full)
    assert "2 structures of the data are not in the store and are left out" in said
    assert "the sender's whole store, byte for byte" in said
    assert files_of(full) == files_of(store)
    assert "signed by key" in kdcache("verify", full, "--key", public)
    kdcache("train-student", full, "-o", tmp_path / "run", "--strategy", "n2n", *settings())


def test_joined_from_a_store_of_ones_own(shared: Path, features: Path, tmp_path: Path) -> None:
    kdcache("import", reversed_data(tmp_path), "-o", tmp_path / "mine.zarr", "--seed", 7)
    kdcache("join", shared, tmp_path / "mine.zarr", "-o", tmp_path / "full.zarr")
    assert files_of(tmp_path / "full.zarr") == files_of(features)


def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    shared: Path, features: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full.zarr"
    before = sorted(file.name for file in tmp_path.iterdir())
    data = dataset()
    data[5] = replace(data[5], energy=-3.5)
    other = reversed_data(tmp_path / "labels", data)
    line = refused("join", shared, other, "-o", full)
    assert "energy of the data are not those of" in line
    assert "--own-labels" in line
    fewer = reversed_data(tmp_path / "fewer", dataset()[:20])
    line = refused("join", shared, fewer, "-o", full)
    assert "4 of 24 structures are not in it, the first is 'data:20'" in line
    bare = [replace(structure, energy=None, forces=None) for structure in dataset()]
    unlabelled = reversed_data(tmp_path / "bare", bare)
    line = refused("join", shared, unlabelled, "-o", full, "--unlabelled")
    assert "0 of 24 structures have labels, there 24" in line
    assert "holds its structures" in refused("join", features, other, "-o", full)
    assert "exists" in refused("join", shared, other, "-o", features)
    assert "holds no structures" in refused("withhold", shared, "-o", full)
    made = {"labels", "fewer", "bare"}
    assert sorted({file.name for file in tmp_path.iterdir()} - made) == before
    said = kdcache("join", shared, other, "-o", full, "--own-labels")
    assert "energy are the data's own" in said
    assert read_manifest(full).root_digest != read_manifest(features).root_digest
    assert open_store(full).structure(0).energy is not None


def test_a_student_is_not_trained_on_a_store_without_structures(
    shared: Path, tmp_path: Path
) -> None:
    line = refused("train-student", shared, "-o", tmp_path / "run", "--strategy", "n2n",
                   *settings())  # fmt: skip
    assert "kdcache join" in line
    assert not (tmp_path / "run" / "state").exists()


def test_a_teacher_is_not_added_to_a_store_without_structures(shared: Path, teacher: Path) -> None:
    before = files_of(shared)
    line = refused("dump-teacher", "--into", shared, "--teacher", teacher, "--name", "second")
    assert "kdcache join" in line
    assert files_of(shared) == before
