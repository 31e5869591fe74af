"""verify finds every kind of damage, and only damage."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import StoreError
from kdcache.store import manifest, verify_store
from kdcache.store.failures import FAILURES
from kdcache.store.shards import publish_file, write_shard_file
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
    from kdcache.store import open_store

    store = open_store(path)
    blocks = store.plan.shard_blocks(shard)
    values = [store.read(field, [block]) for block in blocks]
    values[0][row] = value
    spec = store.spec(field)
    file = path / field / "c" / str(shard) / "0"
    write_shard_file(
        file,
        "attempt",
        values,
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
    problems = verify_store(tmp_path / "store.zarr").problems
    assert "names structures that are not those of the index" in problems[0]
