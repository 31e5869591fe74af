"""verify finds every kind of damage, and only damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.cluster import Here
from kdcache.errors import StoreError
from kdcache.store import manifest, open_store, verify_store
from kdcache.store.failures import FAILURES
from kdcache.store.scan import made_only_of
from kdcache.store.shards import publish_file, write_shard_file
from kdcache.store.statistics import store_statistics
from tests.store.sample import Sample, files_of, make_dataset
from tests.store.several import part, write_part


def test_a_whole_store_has_no_problems(finished: Path, sample: Sample) -> None:
    report = verify_store(finished, data=sample.dataset)
    assert report.problems == []
    assert report.n_files == len(files_of(finished)) - 1
    assert report.n_structures == report.n_compared == len(sample.dataset)
    assert report.summary.startswith("the store is whole")


def test_any_flipped_bit_in_any_file_is_found(copied: Path) -> None:
    rng = np.random.default_rng(1)
    files = files_of(copied)
    # One shard of each array stands for its others.
    chosen = [name for name in files if "/c/" not in name or "/c/1" in name]
    for name in chosen[::2]:
        content = files[name]
        damaged = bytearray(content)
        damaged[rng.integers(len(damaged))] ^= 4
        (copied / name).write_bytes(damaged)
        if name == "manifest.json":
            with pytest.raises(StoreError):
                verify_store(copied)
        else:
            assert any(name in problem for problem in verify_store(copied).problems), name
        (copied / name).write_bytes(content)
    assert verify_store(copied).problems == []


def test_all_damaged_files_are_listed(copied: Path) -> None:
    names = ["structures/forces/c/0/0", "teachers/painn/node/c/1/0"]
    for name in names:
        (copied / name).write_bytes(bytes(10))
    problems = verify_store(copied).problems
    assert all(any(name in problem for problem in problems) for name in names)


def reseal(path: Path) -> None:
    """Make digests fit the files, as an author who edits a store would."""
    document = json.loads((path / "manifest.json").read_text())
    for name, content in files_of(path).items():
        if name != "manifest.json":
            document["digests"][name] = hashlib.sha256(content).hexdigest()
    parsed = manifest.Manifest.model_validate_json(json.dumps(document))
    (path / "manifest.json").write_bytes(parsed.sealed().to_bytes())


def rewrite(path: Path, sample: Sample, field: str, shard: int, row: int, value: float) -> None:
    """Change a value of an atom field and keep every checksum and digest right."""
    store = open_store(path)
    blocks = store.plan.shard_blocks(shard)
    values = [store.read(field, [block]) for block in blocks]
    values[0][row] = value
    spec = store.spec(field)
    file = (path / field / "c" / str(shard)).joinpath(*["0"] * len(spec.shape))
    write_shard_file(
        file,
        "attempt",
        [[block] for block in values],
        store.plan.capacity(spec.level),
        store.plan.blocks_per_shard,
        spec.codec == "exact",
    )
    publish_file(file, "attempt")
    reseal(path)


def test_positions_that_are_not_those_of_the_index_are_found(copied: Path, sample: Sample) -> None:
    rewrite(copied, sample, "structures/positions", 1, 0, 0.25)
    problems = verify_store(copied).problems
    assert len(problems) == 1
    assert "1 structures are not those the index was made of" in problems[0]
    first = sample.plan.block_structures(sample.plan.shard_blocks(1).start).start
    assert repr(str(sample.index.structure_id[first])) in problems[0]


def test_features_that_are_not_finite_are_found(copied: Path, sample: Sample) -> None:
    rewrite(copied, sample, "teachers/painn/node", 1, 0, np.nan)
    (problem,) = verify_store(copied).problems
    assert "teachers/painn/node, block 3: 5 values are not finite" in problem


def test_edges_to_atoms_that_are_not_there_are_found(copied: Path, sample: Sample) -> None:
    rewrite(copied, sample, "structures/edge_index", 1, 0, 30)
    (problem,) = verify_store(copied).problems
    assert "names an atom its structure lacks" in problem


def test_a_digest_too_many_or_too_few_is_found(copied: Path) -> None:
    document = json.loads((copied / "manifest.json").read_text())
    document["digests"].pop("structures/forces/c/0/0")
    document["digests"]["../outside"] = "0" * 64
    parsed = manifest.Manifest.model_validate_json(json.dumps(document))
    (copied / "manifest.json").write_bytes(parsed.sealed().to_bytes())
    problems = "\n".join(verify_store(copied).problems)
    assert "structures/forces/c/0/0 has no digest" in problems
    assert "../outside, which is no file of this store" in problems
    assert "names ../outside, which is outside the store" in problems


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda nodes: nodes["structures/forces"].update(shape=[12, 3]), "structures/forces shape"),
        (lambda nodes: nodes["teachers/painn/node"].update(data_type="int16"), "node data_type"),
        (lambda nodes: nodes.pop("teachers/painn/vector.scale"), "vector.scale nothing"),
        (lambda nodes: nodes.update(evil=nodes["structures/forces"]), "metadata evil"),
        (lambda nodes: nodes["structures"]["attributes"].update(n=1), "attributes n 1"),
    ],
)
def test_a_root_document_that_says_otherwise_than_the_nodes_is_found(
    copied: Path, change: Callable[[dict[str, Any]], object], place: str
) -> None:
    """Another reader takes shapes and dtypes from the copy in the root alone."""
    document = json.loads((copied / "zarr.json").read_text())
    change(document["consolidated_metadata"]["metadata"])
    (copied / "zarr.json").write_text(json.dumps(document))
    reseal(copied)
    open_store(copied)
    (problem,) = verify_store(copied).problems
    assert f"{copied / 'zarr.json'} has consolidated_metadata metadata " in problem
    assert place in problem


def test_the_attributes_of_the_root_are_held_against_the_manifest(copied: Path) -> None:
    document = json.loads((copied / "zarr.json").read_text())
    document["attributes"]["kdcache"]["atom_capacity"] += 1
    (copied / "zarr.json").write_text(json.dumps(document))
    reseal(copied)
    (problem,) = verify_store(copied).problems
    assert "has attributes kdcache atom_capacity 13, the manifest gives 12" in problem


def test_a_root_document_that_is_spelled_otherwise_is_none(copied: Path) -> None:
    document = json.loads((copied / "zarr.json").read_text())
    (copied / "zarr.json").write_text(json.dumps(document, indent=7))
    reseal(copied)
    assert verify_store(copied).problems == []


@pytest.mark.parametrize("name", ["structures", "teachers", "teachers/painn"])
@pytest.mark.parametrize("content", [b"{}", b"[1]", b"no json", b'{"zarr_format": 2}'])
def test_a_group_that_is_none_is_found(copied: Path, name: str, content: bytes) -> None:
    (copied / name / "zarr.json").write_bytes(content)
    reseal(copied)
    (problem,) = verify_store(copied).problems
    assert problem.startswith(f"{copied / name / 'zarr.json'} ")


def test_edges_out_of_order_are_found(copied: Path, sample: Sample) -> None:
    """Readers rely on the order that the format gives."""
    first = sample.plan.shard_blocks(1).start
    assert sample.plan.n_edges[sample.plan.block_structures(first)][0] > 2
    rewrite(copied, sample, "structures/edge_index", 1, 2, 0)
    (problem,) = verify_store(copied).problems
    assert f"structures/edge_index, block {first}: edge " in problem
    assert "is not behind the one before it" in problem


@pytest.mark.parametrize("number", [0, 119, 255])
def test_atoms_of_no_element_are_found(copied: Path, sample: Sample, number: int) -> None:
    rewrite(copied, sample, "structures/atomic_numbers", 1, 0, number)
    problems = verify_store(copied).problems
    assert f"structures/atomic_numbers, block 3: {number} is no element" in problems[0]
    with pytest.raises(StoreError, match=f"{number} is no element"):
        made_only_of(open_store(copied), [1, 6], Here())
    with pytest.raises(StoreError, match=f"{number} is no element"):
        store_statistics(open_store(copied))


def test_a_flag_that_is_neither_0_nor_1_is_found(copied: Path, sample: Sample) -> None:
    store = open_store(copied)
    blocks = store.plan.shard_blocks(1)
    values = [store.read("teachers/painn/flag", [block]).view(np.uint8) for block in blocks]
    values[1][-1] = 2
    file = copied / "teachers" / "painn" / "flag" / "c" / "1"
    capacity, per_shard = store.plan.atom_capacity, store.plan.blocks_per_shard
    write_shard_file(file, "attempt", [[v] for v in values], capacity, per_shard, True)
    publish_file(file, "attempt")
    reseal(copied)
    (problem,) = verify_store(copied).problems
    assert problem == f"teachers/painn/flag, block {blocks[1]}: a flag is neither 0 nor 1"


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("structure_id", "frame:0", "1 structures of index.parquet have the id of another one"),
        ("split", "training", "1 splits of index.parquet are none, such as 'training'"),
        ("weight", np.nan, "1 weights of index.parquet are negative or not finite"),
        ("weight", -0.5, "1 weights of index.parquet are negative or not finite"),
    ],
)
def test_columns_of_the_index_that_cannot_be_are_found(
    copied: Path, sample: Sample, column: str, value: object, said: str
) -> None:
    row = int(np.argmax(sample.index.structure_id != "frame:0"))
    changed = getattr(sample.index, column).copy()
    changed[row] = value
    index = replace(sample.index, **{column: changed})
    (copied / "index.parquet").write_bytes(index.to_bytes())
    reseal(copied)
    assert verify_store(copied).problems == [said]


def test_labels_edited_in_place_are_found(finished: Path) -> None:
    dataset = make_dataset()
    dataset[6].energy = -2.5
    (problem,) = verify_store(finished, data=dataset).problems
    assert "structure 6, 'frame:6', has energy -2.5 eV, in the store -2.0 eV" in problem
    dataset = make_dataset()
    assert dataset[8].forces is not None
    dataset[8].forces[1, 2] += 1e-9
    (problem,) = verify_store(finished, data=dataset).problems
    assert "structure 8, 'frame:8', has forces" in problem


def test_another_dataset_is_a_problem(finished: Path) -> None:
    (problem,) = verify_store(finished, data=make_dataset()[::-1]).problems
    assert "in another order" in problem


def test_what_is_no_store_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is no kdcache store"):
        verify_store(tmp_path)


def test_structures_a_teacher_failed_on_may_hold_nothing_others_may_not(tmp_path: Path) -> None:
    sample = part(range(20), 2)
    store = write_part(tmp_path / "store.zarr", sample)
    assert store.teachers["edges"].n_failed > 2
    assert np.isnan(store.read("teachers/edges/node")).any()
    assert verify_store(tmp_path / "store.zarr").problems == []
    blocks = [store.plan.shard_blocks(shard).start for shard in range(store.plan.n_shards)]
    first = [int(store.plan.block_structures(block).start) for block in blocks]
    shard = next(k for k, row in enumerate(first) if row not in store.failures("edges").row)
    rewrite(tmp_path / "store.zarr", sample, "teachers/edges/node", shard, 0, np.nan)
    (problem,) = verify_store(tmp_path / "store.zarr").problems
    assert f"teachers/edges/node, block {blocks[shard]}: 3 values are not finite" in problem


def test_a_list_of_failures_that_names_others_is_found(tmp_path: Path) -> None:
    store = write_part(tmp_path / "store.zarr", part(range(20), 2))
    failures = store.failures("edges")
    moved = replace(failures, row=failures.row - 1)
    (tmp_path / "store.zarr" / "teachers" / "edges" / FAILURES).write_bytes(moved.to_bytes())
    reseal(tmp_path / "store.zarr")
    (problem,) = verify_store(tmp_path / "store.zarr").problems
    assert "names structures that are not those of the index" in problem
