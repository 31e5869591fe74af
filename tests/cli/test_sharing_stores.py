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

from kdcache.store import add_teacher, open_store, read_manifest
from kdcache.structures import Structure
from kdcache_cli.main import main
from tests.cli.commands import dataset, kdcache, refused, settings, write_structures
from tests.store.sample import TEACHER, files_of, teacher_entry


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


def test_a_teacher_goes_into_a_signed_store_only_where_its_signature_goes(
    copied: Path, teacher: Path, keys: tuple[Path, Path]
) -> None:
    private, public = keys
    kdcache("sign", copied, "--key", private)
    dump = ("dump-teacher", "--teacher", teacher, "--into", copied, "--name", "second")
    before = files_of(copied)
    assert "is signed, and its signature would be of another content" in refused(*dump)
    assert files_of(copied) == before
    kdcache(*dump, "--remove-signature")
    assert not (copied / "signature.json").exists()
    kdcache("sign", copied, "--key", private)
    assert "signed by key" in kdcache("verify", copied, "--key", public)


def test_an_unfinished_teacher_is_not_signed_and_verify_says_that_it_is_not_checked(
    copied: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    writer = add_teacher(copied, "late", teacher_entry(), TEACHER)
    with writer:
        pass  # stopped before its first shard
    for output in ((), ("-o", tmp_path / "beside.json")):
        line = refused("sign", copied, "--key", keys[0], *output)
        assert "unfinished teachers/late. Run the command that was interrupted again" in line
    assert not (tmp_path / "beside.json").exists()
    said = kdcache("verify", copied).splitlines()
    assert said[0].startswith("unfinished, so not checked: teachers/late, 0 of ")
    assert said[1].startswith("the store is whole")


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
    assert said.startswith("what was passed on is right: ")
    assert (
        "; left out, so not checked: atomic_numbers, cell, energy, forces, pbc, positions; " in said
    )
    assert "; signed by key " in said
    shown = kdcache("inspect", shared)
    assert "structures (left out: atomic_numbers, cell, energy" in shown
    assert "of the whole store, not checked here" in shown
    # By contents: ids and order of the receiver are his own, and he has more than the sender used.
    mine = reversed_data(tmp_path, [*dataset(), *dataset(26)[24:]])
    said = kdcache("join", shared, mine, "-o", full)
    assert (
        "2 structures of the data are not in the store, or repeat one that is, and are left" in said
    )
    assert "the sender's whole store, byte for byte" in said
    assert files_of(full) == files_of(store)
    assert "signed by key" in kdcache("verify", full, "--key", public)
    kdcache("train-student", full, "-o", tmp_path / "run", "--strategy", "n2n", *settings())


@pytest.mark.parametrize(
    "part",
    [
        ("subset", "--sample", 10, "--fields", "node,energy"),
        ("pull", "--where", "n_atoms < 4", "--teachers", "teacher"),
    ],
    ids=["subset", "where"],
)
def test_a_part_of_a_store_goes_without_structures_as_a_store_of_its_own(
    part: tuple[object, ...], features: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    """The way out that refusals name: the part first, then what is left of it."""
    private, public = keys
    command, *options = part
    some, sent, got = (tmp_path / f"{name}.zarr" for name in ("some", "sent", "got"))
    publish = ("publish", features, sent, "--without-structures")
    assert "kdcache subset" in refused(*publish, "--fields", "node")
    assert "kdcache pull STORE -o PART" in refused(*publish, "--where", "n_atoms < 4")
    kdcache(command, features, "-o", some, *options)
    kdcache("sign", some, "--key", private)
    kdcache("publish", some, sent, "--without-structures")
    assert not (sent / "structures" / "positions").exists()
    for store in (sent, got):
        if store == got:
            kdcache("pull", sent, "-o", got)
        said = kdcache("verify", store, "--key", public)
        assert said.startswith("what was passed on is right: ")
        assert "; signed by key " in said
    full = tmp_path / "full.zarr"
    said = kdcache("join", got, reversed_data(tmp_path), "-o", full)
    assert "the sender's whole store, byte for byte" in said
    assert files_of(full) == files_of(some)
    said = kdcache("verify", full, "--key", public)
    assert said.startswith("the store is whole: ")
    assert "; signed by key " in said


def test_what_is_made_of_a_part_would_be_lost_for_joining_and_is_refused(
    shared: Path, features: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new.zarr"
    for command in (
        ("subset", shared, "-o", new, "--sample", 5),
        ("convert", shared, "-o", new, "--codec", "node=exact"),
        ("merge", features, shared, "-o", new, "--skip-repeated"),
        ("merge", shared, features, "-o", new, "--same-structures", "--rename", "teacher=second"),
    ):
        assert f"`kdcache join {shared} DATA -o FULL`" in refused(*command)
    result = CliRunner().invoke(main, ["pull", str(shared), "-o", str(new), "--sample", "5"])
    assert (result.exit_code, "kdcache join" in result.stderr) == (2, True)
    assert not list(tmp_path.glob("new.zarr*"))
    kdcache("merge", features, shared, "-o", new, "--same-structures", "--rename", "teacher=second")
    assert "the store is whole" in kdcache("verify", new)


def test_a_signature_that_cannot_hold_is_left_behind_and_that_is_said(
    copied: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    shared, full = tmp_path / "shared.zarr", tmp_path / "full.zarr"
    kdcache("sign", copied, "--key", private)
    before = (copied / "signature.json").read_bytes()
    kdcache("annotate", copied, "--creator", "A. Lab", "--remove-signature")
    (copied / "signature.json").write_bytes(before)
    said = kdcache("withhold", copied, "-o", shared)
    assert "the signature is left behind: it is of " in said
    assert "is not signed" in refused("verify", shared, "--key", public)
    # Signed too late: of the part alone, which the receiver's whole store is not.
    kdcache("sign", shared, "--key", private)
    assert "; signed by key " in kdcache("verify", shared, "--key", public)
    said = kdcache("join", shared, reversed_data(tmp_path), "-o", full)
    assert "the signature is left behind: it is of " in said
    assert "is not signed" in refused("verify", full, "--key", public)


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
    assert "already. To leave out more" in refused("withhold", shared, "-o", full)
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
