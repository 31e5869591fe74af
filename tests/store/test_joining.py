"""A store without its structures, and the receiver's own put back: byte for byte, or it is said."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from kdcache.errors import IdentityError, StoreError
from kdcache.fields import FIXED, STRUCTURE_FIELDS, TAGS, FieldSpec
from kdcache.store import (
    Store,
    add_teacher,
    create_store,
    index_from_plan,
    open_store,
    plan_blocks,
    read_manifest,
    verify_store,
)
from kdcache.store.annotation import Annotation, annotate_store
from kdcache.store.joining import join_store
from kdcache.store.manifest import Manifest
from kdcache.store.withholding import (
    GROUND_TRUTH,
    building,
    check_part,
    withheld,
    write_without_structures,
)
from kdcache.structures import Structure
from tests.store.sample import (
    TEACHER,
    Sample,
    files_of,
    make_dataset,
    make_structure,
    teacher_entry,
    write_all,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Store:
    """What another lab is given; read only."""
    path = tmp_path_factory.mktemp("shared") / "shared.zarr"
    write_without_structures(open_store(finished), path)
    return open_store(path)


def shuffled(dataset: Sequence[Structure], seed: int = 5) -> list[Structure]:
    order = np.random.default_rng(seed).permutation(len(dataset))
    return [dataset[int(i)] for i in order]


def test_what_is_passed_on_is_a_store_that_names_no_atom(finished: Path, shared: Store) -> None:
    assert verify_store(shared.path).problems == []
    check_part(shared)
    whole, part = files_of(finished), files_of(Path(str(shared.path)))
    left_out = withheld(open_store(finished)).left_out
    assert left_out == {n for n in whole if n.split("/")[1:2] and n.split("/")[1] in GROUND_TRUTH}
    assert whole.keys() - part.keys() == left_out
    changed = {name for name in part if part[name] != whole[name]}
    assert changed == {"manifest.json", "zarr.json"}
    # A public reader meets no array that would read as zeros.
    arrays = {name for name, _ in zarr.open_group(shared.path, mode="r")["structures"].arrays()}  # type: ignore[union-attr]
    assert arrays == {"edge_index", "edge_shift"}


def test_features_are_those_of_the_whole_store(finished: Path, shared: Store) -> None:
    whole = open_store(finished)
    for name in ("teachers/painn/node", "teachers/painn/message", "structures/edge_index"):
        assert np.array_equal(shared.read(name), whole.read(name))
    assert shared.graph == whole.graph


def test_what_needs_structures_says_how_to_put_them_back(shared: Store) -> None:
    with pytest.raises(StoreError, match=r"positions.*kdcache join .* DATA -o FULL"):
        next(shared.structures())


@pytest.mark.parametrize("source", ["shuffled", "store", "more"])
def test_a_joined_store_is_the_senders_byte_for_byte(
    source: str, finished: Path, shared: Store, tmp_path: Path
) -> None:
    data = {
        "shuffled": shuffled(make_dataset()),
        "store": open_store(finished).structures("store"),
        "more": [make_structure(70, 3), *make_dataset(), make_structure(71, 2)],
    }[source]
    report = join_store(shared, data, tmp_path / "full.zarr")
    assert files_of(tmp_path / "full.zarr") == files_of(finished)
    assert report.is_whole
    assert report.manifest.root_digest == read_manifest(finished).root_digest
    assert (report.n_superfluous, report.first_superfluous) == (
        (2, "frame:70") if source == "more" else (0, "")
    )
    assert [file.name for file in tmp_path.iterdir()] == ["full.zarr"]


def laid_out(dataset: list[Structure]) -> Sample:
    order = np.random.default_rng(8).permutation(len(dataset))
    ordered = [dataset[i] for i in order]
    plan = plan_blocks([s.n_atoms for s in ordered], atom_capacity=12, blocks_per_shard=2)
    index = index_from_plan(
        plan,
        structure_id=[s.structure_id for s in ordered],
        content_hash=[s.content_hash() for s in ordered],
        source_index=order,
    )
    return Sample(dataset, order, plan, index)


def written(path: Path, sample: Sample, extra: dict[FieldSpec, str] | None = None) -> Store:
    """A store of labelled structures without edges, and of what `extra` names beside."""
    fields = (*STRUCTURE_FIELDS, *(extra or {}))
    with create_store(
        path, index=sample.index, plan=sample.plan, fields=fields, dataset=sample.entry
    ) as writer:
        for shard in writer.pending_shards():
            rows = sample.source_index[sample.plan.shard_structures(shard)]
            arrays = sample.shard(STRUCTURE_FIELDS, shard)
            for spec, name in (extra or {}).items():
                said = [getattr(sample.dataset[int(i)], name) for i in rows]
                arrays[spec.name] = np.concatenate(said)
            writer.write_shard(shard, arrays)
        writer.commit()
    return open_store(path)


def test_structures_that_occur_twice_keep_their_own_labels(tmp_path: Path) -> None:
    dataset = make_dataset((3, 1, 5, 2, 4))
    # Three of one content and other energies; ids tell two of them from the rest.
    copies = [replace(dataset[3], structure_id=f"copy:{k}", energy=-9.0 - k) for k in range(2)]
    whole = written(tmp_path / "whole.zarr", laid_out([copies[0], *dataset, copies[1]]))
    write_without_structures(whole, tmp_path / "part.zarr")
    part = open_store(tmp_path / "part.zarr")
    for seed in range(3):
        data = shuffled([*dataset, *copies], seed)
        output = tmp_path / f"{seed}.zarr"
        assert join_store(part, data, output).is_whole
        assert files_of(output) == files_of(tmp_path / "whole.zarr")
    # Without ids they are in the order of the sender's dataset.
    data = [replace(s, structure_id="") for s in [copies[0], *dataset, copies[1]]]
    assert join_store(part, data, tmp_path / "unnamed.zarr").is_whole


def test_one_copy_stands_for_all_that_are_equal(tmp_path: Path) -> None:
    dataset = make_dataset((3, 1, 5, 2))
    twice = [*dataset, replace(dataset[2], structure_id="again")]
    whole = written(tmp_path / "whole.zarr", laid_out(twice))
    write_without_structures(whole, tmp_path / "part.zarr")
    report = join_store(open_store(tmp_path / "part.zarr"), dataset, tmp_path / "full.zarr")
    assert report.is_whole
    more = [*twice, replace(dataset[2], structure_id="third")]
    report = join_store(open_store(tmp_path / "part.zarr"), more, tmp_path / "more.zarr")
    assert (report.n_superfluous, report.first_superfluous) == (1, "third")
    other = [replace(dataset[0], energy=-7.0), *dataset[1:]]
    part = open_store(tmp_path / "part.zarr")
    report = join_store(part, other, tmp_path / "own.zarr", own_labels=True)
    assert report.manifest.dataset.n_labelled == 5
    assert verify_store(tmp_path / "own.zarr").problems == []


def test_fixed_atoms_are_put_back_and_compared(tmp_path: Path) -> None:
    dataset = [replace(s, fixed=np.arange(s.n_atoms) == 0) for s in make_dataset((3, 1, 2))]
    whole = written(tmp_path / "whole.zarr", laid_out(dataset), {FIXED: "fixed"})
    write_without_structures(whole, tmp_path / "part.zarr")
    part = open_store(tmp_path / "part.zarr")
    assert join_store(part, dataset, tmp_path / "full.zarr").is_whole
    with pytest.raises(IdentityError, match="fixed of the data are not those of"):
        join_store(part, make_dataset((3, 1, 2)), tmp_path / "free.zarr")


def test_atoms_of_which_nothing_is_said_have_the_senders_tags(tmp_path: Path) -> None:
    tags = [np.full(n, 2, np.uint8) for n in (3, 1, 2)]
    tags[0][0] = 0
    dataset = [replace(s, tags=t) for s, t in zip(make_dataset((3, 1, 2)), tags, strict=True)]
    whole = written(tmp_path / "whole.zarr", laid_out(dataset), {TAGS: "tags"})
    write_without_structures(whole, tmp_path / "part.zarr")
    part = open_store(tmp_path / "part.zarr")
    data = [dataset[0], *make_dataset((3, 1, 2))[1:]]
    assert join_store(part, data, tmp_path / "full.zarr").is_whole
    with pytest.raises(IdentityError, match="1 of 3 structures are not in it"):
        join_store(part, make_dataset((3, 1, 2)), tmp_path / "bare.zarr")


def test_missing_and_edited_structures_are_told_by_count_and_id(
    shared: Store, tmp_path: Path
) -> None:
    data = make_dataset()
    del data[4]
    positions = data[8].positions.copy()
    positions[-1, 0] = np.nextafter(positions[-1, 0], 99)
    data[8] = replace(data[8], positions=positions)
    data.append(make_structure(50, 1))
    with pytest.raises(IdentityError) as raised:
        join_store(shared, shuffled(data), tmp_path / "full.zarr")
    said = str(raised.value)
    assert "data of 20 structures: 2 of 20 structures are not in it, the first is 'frame:4'" in said
    assert "1 of these are there under the same id with other contents" in said
    assert "the first is 'frame:9'" in said
    assert "2 structures of it are not in the store, the first is 'frame:" in said
    assert not list(tmp_path.iterdir())


def test_other_labels_are_refused_or_kept_under_another_digest(
    finished: Path, shared: Store, tmp_path: Path
) -> None:
    data = make_dataset()
    data[3] = replace(data[3], energy=-1.25)
    with pytest.raises(IdentityError, match="energy of the data are not those of") as raised:
        join_store(shared, data, tmp_path / "full.zarr")
    assert "--own-labels" in str(raised.value)
    report = join_store(shared, data, tmp_path / "own.zarr", own_labels=True)
    assert report.differing == ("energy",)
    assert not report.is_whole
    whole = read_manifest(finished)
    assert report.manifest.root_digest != whole.root_digest
    assert whole.root_digest in report.manifest.dataset.notes[-1]
    assert verify_store(tmp_path / "own.zarr", data=data).problems == []
    differ = {
        name
        for name, content in files_of(tmp_path / "own.zarr").items()
        if content != files_of(finished)[name]
    }
    assert {name.rpartition("/c/")[0] for name in differ} == {"", "structures/energy"}


def test_data_without_labels_is_refused_or_counted(shared: Store, tmp_path: Path) -> None:
    data = [replace(structure, energy=None, forces=None) for structure in make_dataset()]
    with pytest.raises(IdentityError, match=r"0 of 20 structures have labels, there 16"):
        join_store(shared, data, tmp_path / "full.zarr")
    report = join_store(shared, data, tmp_path / "own.zarr", own_labels=True)
    assert report.differing == ("energy", "forces")
    assert report.manifest.dataset.n_labelled == 0
    assert verify_store(tmp_path / "own.zarr").problems == []
    # An energy alone is no label, as everywhere.
    data = [replace(structure, forces=None) for structure in make_dataset()]
    report = join_store(shared, data, tmp_path / "energies.zarr", own_labels=True)
    assert report.differing == ("forces",)
    assert report.manifest.dataset.n_labelled == 0
    assert verify_store(tmp_path / "energies.zarr").problems == []


def test_the_same_values_compressed_otherwise_are_told_from_others(
    copied: Path, tmp_path: Path
) -> None:
    """The sender's compressor wrote other bytes of the same values."""
    store = open_store(copied)
    part = withheld(store)
    assert part.manifest.withheld is not None
    name = "structures/forces/c/0/0"
    digests = part.manifest.withheld.digests | {name: "0" * 64}
    other = part.manifest.withheld.model_copy(update={"digests": digests})
    whole = part.manifest.model_copy(update={"withheld": other}).whole()
    other = other.model_copy(update={"root_digest": whole.content_digest()})
    write_without_structures(store, tmp_path / "part.zarr")
    manifest = part.manifest.model_copy(update={"withheld": other}).sealed()
    (tmp_path / "part.zarr" / "manifest.json").write_bytes(manifest.to_bytes())
    report = join_store(open_store(tmp_path / "part.zarr"), make_dataset(), tmp_path / "full.zarr")
    assert (report.is_whole, report.differing) == (False, ())
    assert "compressed otherwise" in report.lines[-1]
    assert verify_store(tmp_path / "full.zarr", data=make_dataset()).problems == []


def test_a_part_is_not_changed(shared: Store, tmp_path: Path, sample: Sample) -> None:
    """Another teacher or licence would make it a part of nothing."""
    with pytest.raises(StoreError, match=r"was passed on without atomic_numbers, .* already"):
        write_without_structures(shared, tmp_path / "part.zarr")
    with pytest.raises(StoreError, match="would no longer be part of"):
        annotate_store(Path(str(shared.path)), Annotation(creator="me"))
    with pytest.raises(StoreError, match="Put them back first"):
        shared.manifest.with_teacher("second", shared.teachers["painn"])


def edited(store: Store, change: dict[str, object]) -> Manifest:
    return Manifest.model_validate_json(
        json.dumps(json.loads(store.manifest.to_bytes()) | change)
    ).sealed()


def test_a_part_that_is_not_one_of_its_whole_is_refused(shared: Store, tmp_path: Path) -> None:
    document = json.loads(shared.manifest.to_bytes())
    document["withheld"]["digests"]["structures/forces/c/0/0"] = "1" * 64
    path = tmp_path / "part.zarr"
    path.mkdir()
    edit = edited(shared, {"withheld": document["withheld"]})
    (path / "manifest.json").write_bytes(edit.to_bytes())
    with pytest.raises(StoreError, match="says it is part of store"):
        read_manifest(path)


def test_a_root_document_of_somebody_elses_is_found(finished: Path, tmp_path: Path) -> None:
    """The one file whose digest the whole manifest does not hold follows from it."""
    path = tmp_path / "part.zarr"
    write_without_structures(open_store(finished), path)
    root = (path / "zarr.json").read_bytes().replace(b"float16", b"int16  ")
    (path / "zarr.json").write_bytes(root)
    digests = read_manifest(path).digests | {"zarr.json": hashlib.sha256(root).hexdigest()}
    manifest = edited(open_store(finished), {}).model_copy(
        update=read_manifest(path).model_copy(update={"digests": digests}).__dict__
    )
    (path / "manifest.json").write_bytes(manifest.sealed().to_bytes())
    with pytest.raises(StoreError, match="is not what is left of store"):
        check_part(open_store(path))


def resealed(path: Path, change: dict[str, object]) -> Store:
    """A store whose author wrote something else into its manifest, digests fitting."""
    manifest = Manifest.model_validate_json(
        json.dumps(json.loads((path / "manifest.json").read_bytes()) | change)
    )
    if manifest.withheld is not None:
        root = manifest.whole().content_digest()
        part = manifest.withheld.model_copy(update={"root_digest": root})
        manifest = manifest.model_copy(update={"withheld": part})
    (path / "manifest.json").write_bytes(manifest.sealed().to_bytes())
    return open_store(path)


def test_nothing_is_written_outside_the_new_store(
    copied: Path, shared: Store, tmp_path: Path
) -> None:
    (tmp_path / "evil").write_text("mine")
    digest = hashlib.sha256(b"mine").hexdigest()
    path = Path(shutil.copytree(str(shared.path), tmp_path / "part.zarr"))
    for name in ("../evil", "../full.zarr.unfinished/../evil", "extra"):
        store = resealed(path, {"digests": shared.manifest.digests | {name: digest}})
        with pytest.raises(StoreError):
            join_store(store, make_dataset(), tmp_path / "full.zarr")
        store = resealed(copied, {"digests": read_manifest(copied).digests | {name: digest}})
        with pytest.raises(StoreError, match="lists other files"):
            write_without_structures(store, tmp_path / "other.zarr")
        resealed(copied, {"digests": shared.manifest.whole().digests})
    assert (tmp_path / "evil").read_text() == "mine"
    assert {file.name for file in tmp_path.iterdir()} == {"evil", "part.zarr", "copied.zarr"}


def test_values_are_told_of_exactly_what_is_withheld(shared: Store, tmp_path: Path) -> None:
    path = Path(shutil.copytree(str(shared.path), tmp_path / "part.zarr"))
    part = json.loads(shared.manifest.to_bytes())["withheld"]
    del part["values"]["forces"]
    with pytest.raises(StoreError, match="and tells values of"):
        resealed(path, {"withheld": part})


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("positions", "shape", [2**24, 2**24]),
        ("energy", "dtype", "float32"),
        ("energy", "level", "atom"),
        ("charges", "codec", "exact"),
    ],
)
def test_fields_that_no_dataset_gives_are_not_made_room_for(
    name: str, key: str, value: object, shared: Store, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(str(shared.path), tmp_path / "part.zarr"))
    part = json.loads(shared.manifest.to_bytes())["withheld"]
    part["structures"][name] = part["structures"].get(name, part["structures"]["energy"]) | {
        key: value
    }
    part["values"].setdefault(name, "0" * 64)
    store = resealed(path, {"withheld": part})
    with pytest.raises(StoreError, match="no dataset gives"):
        join_store(store, make_dataset(), tmp_path / "full.zarr")


def test_a_whole_store_and_one_of_unknown_origin_are_not_joined(
    finished: Path, tmp_path: Path, sample: Sample
) -> None:
    with pytest.raises(StoreError, match="holds its structures"):
        join_store(open_store(finished), [], tmp_path / "full.zarr")
    writer = create_store(
        tmp_path / "bare.zarr",
        index=sample.index,
        plan=sample.plan,
        fields=(),
        dataset=sample.entry,
    )
    write_all(writer, sample)
    write_all(add_teacher(tmp_path / "bare.zarr", "t", teacher_entry(), TEACHER[:1]), sample)
    with pytest.raises(StoreError, match="does not say which store it is a part of"):
        join_store(open_store(tmp_path / "bare.zarr"), make_dataset(), tmp_path / "full.zarr")
    with pytest.raises(StoreError, match="holds no structures that could be left out"):
        write_without_structures(open_store(tmp_path / "bare.zarr"), tmp_path / "part.zarr")


def test_nothing_that_is_there_is_overwritten(shared: Store, tmp_path: Path) -> None:
    (tmp_path / "full.zarr").mkdir()
    (tmp_path / "full.zarr" / "mine").write_text("x")
    with pytest.raises(StoreError, match="nothing is overwritten"):
        join_store(shared, make_dataset(), tmp_path / "full.zarr")
    (tmp_path / "other.zarr.unfinished").mkdir()
    (tmp_path / "other.zarr.unfinished" / "mine").write_text("x")
    with pytest.raises(StoreError, match="was not left by this command"):
        join_store(shared, make_dataset(), tmp_path / "other.zarr")
    assert (tmp_path / "other.zarr.unfinished" / "mine").read_text() == "x"


def test_what_a_killed_attempt_left_is_begun_anew(
    finished: Path, shared: Store, tmp_path: Path
) -> None:
    output = tmp_path / "full.zarr"
    left = tmp_path / "full.zarr.unfinished"
    (left / ".work").mkdir(parents=True)
    (left / ".work" / "join").touch()
    (left / ".work" / "rows").mkdir()
    (left / ".work" / "rows" / "energy.npy").write_bytes(b"half")
    (left / "structures").mkdir()
    (left / "structures" / "junk").write_bytes(b"half")
    join_store(shared, make_dataset(), output)
    assert files_of(output) == files_of(finished)
    assert not left.exists()


def test_an_attempt_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    def stopped() -> None:
        with building(tmp_path / "no.zarr", "join") as path:
            (path / "file").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not list(tmp_path.iterdir())
