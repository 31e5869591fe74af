"""Stores without their structures in hostile, hurried or unlucky hands: refused, or it is said."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.cluster import Here
from kdcache.errors import IdentityError, StoreError
from kdcache.fields import STRUCTURE_FIELDS
from kdcache.sharing import Selection, publish_store, pull_store, select_rows
from kdcache.store import (
    Store,
    create_store,
    index_from_plan,
    open_store,
    plan_blocks,
    read_manifest,
    verify_store,
)
from kdcache.store.annotation import Annotation, annotate_store
from kdcache.store.combining import plan_merge, plan_subset
from kdcache.store.converting import plan_conversion
from kdcache.store.joining import join_store
from kdcache.store.manifest import Manifest
from kdcache.store.rewrite import Rewrite, write_rewrite
from kdcache.store.signature import SIGNATURE, make_keys, read_private_key, sign_store
from kdcache.store.uniting import plan_union
from kdcache.store.withholding import building, check_part, narrowed, write_without_structures
from kdcache.structures import dataset_digest
from tests.store.sample import Sample, files_of, make_dataset

NODE = "teachers/painn/node/c/0/0"


@pytest.fixture
def part(finished: Path, tmp_path: Path) -> Path:
    """What another lab is given; may be damaged."""
    write_without_structures(open_store(finished), tmp_path / "part.zarr")
    return tmp_path / "part.zarr"


def sealed(path: Path, change: Callable[[dict[str, Any]], None]) -> Store:
    """A store whose manifest somebody edited, with the root digest of what it says now."""
    document = json.loads((path / "manifest.json").read_bytes())
    change(document)
    manifest = Manifest.model_validate_json(json.dumps(document)).sealed()
    (path / "manifest.json").write_bytes(manifest.to_bytes())
    return open_store(path)


def test_edited_features_do_not_pass_for_the_senders(part: Path, tmp_path: Path) -> None:
    """The sender's digest stands among what is left out, so the whole store's is still his."""
    shard = bytearray((part / NODE).read_bytes())
    shard[:2], shard[2:4] = shard[2:4], shard[:2]
    (part / NODE).write_bytes(shard)

    def edit(document: dict[str, Any]) -> None:
        document["withheld"]["digests"][NODE] = document["digests"][NODE]
        document["digests"][NODE] = hashlib.sha256(shard).hexdigest()

    store = sealed(part, edit)
    with pytest.raises(StoreError, match="is not what is left of store"):
        join_store(store, make_dataset(), tmp_path / "full.zarr", own_labels=True)
    for move in (pull_store, publish_store):
        with pytest.raises(StoreError, match="is not what is left of store"):
            move(part, tmp_path / "moved.zarr")
    assert not (tmp_path / "moved.zarr").exists()
    assert "is not what is left of store" in verify_store(part).problems[0]


def test_what_is_left_out_is_not_there(finished: Path, copied: Path, tmp_path: Path) -> None:
    """Else the sender's labels would be taken for the data's, which were compared."""
    write_without_structures(open_store(finished), tmp_path / "part.zarr")
    record = json.loads((tmp_path / "part.zarr" / "manifest.json").read_bytes())["withheld"]
    store = sealed(copied, lambda document: document.update(withheld=record))
    with pytest.raises(StoreError, match="is not what is left of store"):
        join_store(store, make_dataset(), tmp_path / "full.zarr")
    assert "is not what is left of store" in verify_store(copied).problems[0]


@pytest.mark.parametrize(
    ("counts", "own_labels"), [((4, 1, 2), False), ((3, 5, 2), False), ((3, 5, 2), True)]
)
def test_an_index_that_counts_other_atoms_is_refused(
    counts: Sequence[int], own_labels: bool, tmp_path: Path
) -> None:
    """Of a structure of one atom, five rows would be filled with that atom."""
    dataset = make_dataset((3, 1, 2))
    plan = plan_blocks(counts)
    hashes = [structure.content_hash() for structure in dataset]
    ids = [structure.structure_id for structure in dataset]
    index = index_from_plan(plan, structure_id=ids, content_hash=hashes, source_index=range(3))
    entry = Sample(dataset, np.arange(3), plan, index).entry
    assert entry.digest == dataset_digest(hashes)
    with create_store(
        tmp_path / "whole.zarr", index=index, plan=plan, fields=STRUCTURE_FIELDS, dataset=entry
    ) as writer:
        rows = {"atom": sum(counts), "structure": 3}
        zeros = {s.name: np.zeros((rows[s.level], *s.shape), s.dtype) for s in STRUCTURE_FIELDS}
        writer.write_shard(0, zeros)
        writer.commit()
    write_without_structures(open_store(tmp_path / "whole.zarr"), tmp_path / "part.zarr")
    said = "has 4 atoms in structure 'frame:0', the data of the same contents 3"
    if counts[1] == 5:
        said = "has 5 atoms in structure 'frame:1', the data of the same contents 1"
    with pytest.raises(IdentityError, match=said):
        join_store(
            open_store(tmp_path / "part.zarr"),
            dataset,
            tmp_path / "full.zarr",
            own_labels=own_labels,
        )
    assert not (tmp_path / "full.zarr").exists()


def test_zeros_of_other_signs_are_the_same_structures(part: Path, tmp_path: Path) -> None:
    data = make_dataset()
    for k, structure in enumerate(data):
        positions = structure.positions
        data[k] = replace(structure, positions=np.where(positions == 0, -0.0, positions))
    report = join_store(open_store(part), data, tmp_path / "full.zarr")
    assert (report.is_whole, report.differing) == (False, ("positions",))
    assert "all values are the sender's, but zeros of positions have other signs" in report.lines[0]
    assert "signs of zeros in positions" in report.manifest.dataset.notes[-1]
    assert verify_store(tmp_path / "full.zarr", data=make_dataset()).problems == []
    # Labels besides are another matter, and what is said is said of them alone.
    data[0] = replace(data[0], energy=7.0)
    with pytest.raises(IdentityError, match=r"^energy of the data are not those"):
        join_store(open_store(part), data, tmp_path / "own.zarr")
    report = join_store(open_store(part), data, tmp_path / "own.zarr", own_labels=True)
    assert report.lines[0].startswith("energy are the data's own")


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "lab.pem"
    make_keys(path)
    return path


def sign(store: Path, key: Path) -> None:
    sign_store(read_manifest(store), read_private_key(key), store / SIGNATURE)


def test_a_signature_of_the_part_alone_is_not_put_into_the_whole(
    part: Path, key: Path, tmp_path: Path
) -> None:
    sign(part, key)
    report = join_store(open_store(part), make_dataset(), tmp_path / "full.zarr")
    assert report.is_whole
    assert not (tmp_path / "full.zarr" / SIGNATURE).exists()
    assert report.lines[-1].startswith("the signature is left behind: it is of ")


@pytest.mark.parametrize("content", [None, b"{", b" " * 5000], ids=["old", "damaged", "large"])
def test_a_signature_that_is_not_the_stores_is_left_behind(
    content: bytes | None, copied: Path, key: Path, tmp_path: Path
) -> None:
    sign(copied, key)
    if content is None:
        before = (copied / SIGNATURE).read_bytes()
        annotate_store(copied, Annotation(creator="A. Lab"), remove_signature=True)
        content = before
    (copied / SIGNATURE).write_bytes(content)
    _, unsigned = write_without_structures(open_store(copied), tmp_path / "part.zarr")
    assert unsigned.startswith("the signature is left behind: ")
    assert not (tmp_path / "part.zarr" / SIGNATURE).exists()


def test_nothing_is_said_of_a_signature_that_goes_along_or_is_not_there(
    copied: Path, key: Path, tmp_path: Path
) -> None:
    assert write_without_structures(open_store(copied), tmp_path / "bare.zarr")[1] == ""
    sign(copied, key)
    assert write_without_structures(open_store(copied), tmp_path / "signed.zarr")[1] == ""
    content = (copied / SIGNATURE).read_bytes()
    assert (tmp_path / "signed.zarr" / SIGNATURE).read_bytes() == content


def subset_of(store: Path) -> Rewrite:
    return plan_subset(open_store(store), np.arange(2), "the first two", Here())


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_what_a_store_cannot_take_the_name_of_is_refused_at_once(
    kind: str, part: Path, finished: Path, tmp_path: Path
) -> None:
    """Not when all is written, and the unfinished store is in the way ever after."""
    output = tmp_path / "full.zarr"
    if kind == "pipe":
        os.mkfifo(output)
    else:
        (tmp_path / "elsewhere").mkdir()
        output.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StoreError, match="nothing is overwritten"):
        join_store(open_store(part), make_dataset(), output)
    with pytest.raises(StoreError, match="nothing is overwritten"):
        write_rewrite(output, subset_of(finished), Here())
    assert sorted(tmp_path.iterdir()) == before


def build(output: Path) -> None:
    """As joining does, in small."""
    with building(output, "join") as path:
        (path / ".work" / "rows").mkdir()
        (path / ".work" / "rows" / "energy").write_bytes(b"large")
        (path / "file").write_text("x")


def test_until_a_store_has_its_name_a_killed_attempt_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rename = tmp_path / "new.zarr", os.rename

    def kept(source: Path, target: Path) -> None:
        if target == output:  # what a kill would leave at this moment
            shutil.copytree(source, tmp_path / "killed")
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", kept)
        build(output)
    assert files_of(output) == {"file": b"x"}
    assert [path.name for path in output.iterdir()] == ["file"]
    # Little is left to be removed by then: who kills hits what takes long.
    assert not (tmp_path / "killed" / ".work" / "rows").exists()
    shutil.rmtree(output)
    (tmp_path / "killed").rename(tmp_path / "new.zarr.unfinished")
    build(output)
    assert files_of(output) == {"file": b"x"}
    assert [path.name for path in tmp_path.iterdir()] == ["new.zarr"]


def test_a_store_that_another_process_finished_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It held the lock while we looked for its output, and gave it back before we asked for it."""
    output, flock = tmp_path / "new.zarr", fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if not output.exists():
            output.mkdir()
            (output / "file").write_text("theirs")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(StoreError, match="nothing is overwritten"):
        build(output)
    assert files_of(output) == {"file": b"theirs"}


def test_of_two_attempts_at_once_the_second_is_refused(tmp_path: Path) -> None:
    with building(tmp_path / "new.zarr", "join") as path:
        (path / "file").write_text("x")
        with pytest.raises(StoreError, match="Another process is writing"):
            build(tmp_path / "new.zarr")
    assert files_of(tmp_path / "new.zarr") == {"file": b"x"}


def test_a_full_disk_is_an_error_and_leaves_nothing(
    part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in mapped memory would end the process with a signal."""

    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as raised:
        join_store(open_store(part), make_dataset(), tmp_path / "full.zarr")
    assert "full.zarr.unfinished/.work/rows/" in str(raised.value.filename)
    assert [path.name for path in tmp_path.iterdir()] == ["part.zarr"]


def test_a_disk_that_takes_a_few_bytes_at_a_time_gives_the_same_store(
    part: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:5], at))
    assert join_store(open_store(part), make_dataset(), tmp_path / "full.zarr").is_whole
    assert files_of(tmp_path / "full.zarr") == files_of(finished)


def test_what_could_never_be_completed_is_not_made(part: Path, finished: Path) -> None:
    store, whole = open_store(part), open_store(finished)
    said = rf"{part} was passed on without its structures.*`kdcache join {part} DATA -o FULL`"
    plans: tuple[Callable[[], Rewrite | Selection], ...] = (
        lambda: plan_subset(store, np.arange(3), "three", Here()),
        lambda: plan_conversion(store, {"node": "exact"}),
        lambda: plan_merge([whole, store], Here(), skip_repeated=True),
        lambda: plan_merge([store, whole], Here(), skip_repeated=True),
        lambda: plan_union([store, whole], rename={(1, "painn"): "second"}),
        lambda: select_rows(part, sample=3),
    )
    for plan in plans:
        with pytest.raises(StoreError, match=said):
            plan()


def test_teachers_of_a_part_go_to_a_whole_store_of_its_structures(
    part: Path, finished: Path, tmp_path: Path
) -> None:
    fields = ("node", "message")
    stores = [open_store(finished), open_store(part)]
    union = plan_union(stores, rename={(1, "painn"): "second"}, fields=fields)
    write_rewrite(tmp_path / "both.zarr", union, Here())
    assert verify_store(tmp_path / "both.zarr", data=make_dataset()).problems == []
    both = open_store(tmp_path / "both.zarr")
    for name in fields:
        ours, theirs = both.read(f"teachers/painn/{name}"), both.read(f"teachers/second/{name}")
        assert np.array_equal(ours, theirs)


def test_a_part_is_not_called_whole(part: Path, finished: Path) -> None:
    report = verify_store(part)
    assert report.left_out == ("atomic_numbers", "cell", "energy", "forces", "pbc", "positions")
    assert report.summary.startswith("what was passed on is right: ")
    assert report.summary.endswith("; left out, so not checked: " + ", ".join(report.left_out))
    assert "whole" not in report.summary
    (part / NODE).unlink()
    assert verify_store(part).summary.startswith("2 problems: ")
    report = verify_store(finished)
    assert report.left_out == ()
    assert report.summary.startswith("the store is whole: ")
    assert report.summary.endswith("structures checked")


def test_labels_alone_may_be_left_out_and_put_back(copied: Path, tmp_path: Path) -> None:
    """The format allows it: what is held stays, and is not asked of the data."""
    whole, before = open_store(copied), files_of(copied)
    values = {
        name: hashlib.sha256(whole.read(f"structures/{name}").tobytes()).hexdigest()
        for name in ("energy", "forces")
    }
    manifest, root = narrowed(whole.manifest, whole.plans, values)
    for name in values:
        shutil.rmtree(copied / "structures" / name)
    (copied / "zarr.json").write_bytes(root)
    (copied / "manifest.json").write_bytes(manifest.to_bytes())
    part = open_store(copied)
    report = verify_store(copied)
    assert (report.problems, report.left_out) == ([], ("energy", "forces"))
    assert join_store(part, make_dataset(), tmp_path / "full.zarr").is_whole
    assert files_of(tmp_path / "full.zarr") == before
    with pytest.raises(StoreError, match="without energy, forces already"):
        write_without_structures(part, tmp_path / "less.zarr")


@pytest.mark.parametrize("damage", ["edited", "missing"])
def test_a_damaged_file_is_not_copied(
    damage: str, part: Path, copied: Path, tmp_path: Path
) -> None:
    opened = open_store(part), open_store(copied)
    said = "node/c/0/0 has digest .* Its copy would be wrong"
    for path in (part, copied):
        content = bytearray((path / NODE).read_bytes())
        content[5] ^= 1
        (path / NODE).write_bytes(content)
        if damage == "missing":
            (path / NODE).unlink()
            said = "node/c/0/0 is missing"
    with pytest.raises(StoreError, match=said):
        join_store(opened[0], make_dataset(), tmp_path / "new.zarr")
    with pytest.raises(StoreError, match=said):
        write_without_structures(opened[1], tmp_path / "new.zarr")
    assert not list(tmp_path.glob("new.zarr*"))


def test_a_file_without_end_is_not_copied(part: Path, copied: Path, tmp_path: Path) -> None:
    opened = open_store(part), open_store(copied)
    for path in (part, copied):
        os.truncate(path / NODE, 2**25)
    with pytest.raises(StoreError, match=r"node/c/0/0 has \d+ bytes, at most \d+ are expected"):
        join_store(opened[0], make_dataset(), tmp_path / "new.zarr")
    with pytest.raises(StoreError, match=r"node/c/0/0 has \d+ bytes, at most \d+ are expected"):
        write_without_structures(opened[1], tmp_path / "new.zarr")
    assert not list(tmp_path.glob("new.zarr*"))


def test_a_part_that_lists_other_files_is_refused(part: Path, tmp_path: Path) -> None:
    def edit(group: str, name: str, digest: str | None) -> Callable[[dict[str, Any]], None]:
        def change(document: dict[str, Any]) -> None:
            digests = document[group]["digests"] if group else document["digests"]
            digests.pop(name) if digest is None else digests.update({name: digest})
            whole = Manifest.model_validate_json(json.dumps(document)).whole()
            document["withheld"]["root_digest"] = whole.content_digest()

        return change

    content = (part / "manifest.json").read_bytes()
    with pytest.raises(StoreError, match=r"lists other files .* 'extra'"):
        check_part(sealed(part, edit("", "extra", "0" * 64)))
    (part / "manifest.json").write_bytes(content)
    store = sealed(part, edit("withheld", "structures/forces/c/0/0", None))
    with pytest.raises(StoreError, match="without files that no dataset gives"):
        join_store(store, make_dataset(), tmp_path / "full.zarr")
