"""Some structures of a store on a server: which, and for how many bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.cluster import Here
from kdcache.errors import ConfigError, StoreError
from kdcache.fields import FieldSpec
from kdcache.sharing import select_rows
from kdcache.store import (
    add_teacher,
    create_store,
    index_from_plan,
    open_store,
    plan_blocks,
    read_manifest,
    verify_store,
)
from kdcache.store.choosing import Choice, choose_rows
from kdcache.store.index import INDEX
from kdcache.store.manifest import MANIFEST
from kdcache.store.shards import index_size
from tests.sharing.counting import CountingServer, counted
from tests.store.sample import (
    STRUCTURES,
    Sample,
    make_dataset,
    make_sample,
    teacher_entry,
    write_all,
    write_store,
)

N_STRUCTURES = 1500
NODE = (FieldSpec("node", "atom", (256,), codec="half"), FieldSpec("energy", "structure"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,500 structures in some 110 blocks of at most 80 atoms, 16 blocks to a shard."""
    generator = np.random.default_rng(5)
    dataset = make_dataset(generator.integers(1, 12, N_STRUCTURES).tolist())
    order = generator.permutation(N_STRUCTURES)
    ordered = [dataset[k] for k in order]
    n_atoms = [one.n_atoms for one in ordered]
    plan = plan_blocks(
        n_atoms, [2 * n if n > 1 else 0 for n in n_atoms], atom_capacity=80, blocks_per_shard=16
    )
    index = index_from_plan(
        plan,
        structure_id=[one.structure_id for one in ordered],
        content_hash=[one.content_hash() for one in ordered],
        source_index=order,
        split=[one.split for one in ordered],
    )
    made = Sample(dataset, order, plan, index)
    path = tmp_path_factory.mktemp("large") / "large.zarr"
    fields = STRUCTURES
    write_all(
        create_store(path, index=index, plan=plan, fields=fields, dataset=made.entry,
                     graph=made.graph),
        made,
    )  # fmt: skip
    write_all(add_teacher(path, "painn", teacher_entry(fields=NODE), NODE), made)
    return path


@pytest.fixture
def server(large: Path) -> Iterator[CountingServer]:
    with counted(large.parent) as running:
        yield running


@pytest.fixture
def url(server: CountingServer) -> str:
    return f"{server.url}/large.zarr"


def store_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_a_sample_of_a_hundredth_costs_some_hundredths_of_the_traffic(
    url: str, large: Path, server: CountingServer, tmp_path: Path
) -> None:
    selection = select_rows(url, sample=N_STRUCTURES // 100)
    selection.write(tmp_path / "sample.zarr")
    every_look = (large / INDEX).stat().st_size + (large / MANIFEST).stat().st_size
    # All of it: index, manifest, documents, headers of answers, and rows.
    assert server.sent <= 0.03 * store_bytes(large) + every_look
    assert selection.cost.n_blocks <= 2
    # What is said before is what is read, but for documents, indices of shards and headers.
    assert server.sent - selection.cost.n_bytes < 0.02 * store_bytes(large)


def test_a_sample_is_whole_and_holds_the_first_rows(url: str, large: Path, tmp_path: Path) -> None:
    select_rows(url, sample=37).write(tmp_path / "sample.zarr", jobs=4)
    assert verify_store(tmp_path / "sample.zarr").problems == []
    whole, part = open_store(large), open_store(tmp_path / "sample.zarr")
    assert part.index.structure_id.tolist() == whole.index.structure_id[:37].tolist()
    n_atoms = int(whole.index.n_atoms[:37].sum())
    name = "teachers/painn/node"
    np.testing.assert_array_equal(part.read(name), whole.read(name)[:n_atoms])
    labelled = np.isfinite(whole.read("structures/energy")[:37]).sum()
    assert part.manifest.dataset.n_labelled == labelled < 37


def test_a_sample_with_a_seed_is_that_of_a_subset(large: Path, tmp_path: Path) -> None:
    store = open_store(large)
    few = np.flatnonzero(store.index.n_atoms < 6)
    for condition, rows in ((None, None), ("n_atoms < 6", few.tolist())):
        options: dict[str, Any] = {"condition": condition, "sample": 40}
        drawn = select_rows(large, seed=3, **options)
        wanted = choose_rows(store, Choice(rows=rows, sample=40, seed=3), Here())
        np.testing.assert_array_equal(drawn.rows, wanted)
        assert drawn.description.endswith("a sample of 40 with seed 3")
        assert set(drawn.rows) != set(select_rows(large, seed=4, **options).rows)
        assert drawn.cost.n_blocks > 2 * select_rows(large, **options).cost.n_blocks
    drawn.write(tmp_path / "drawn.zarr")
    assert verify_store(tmp_path / "drawn.zarr").problems == []
    with pytest.raises(StoreError, match="and nothing is overwritten"):
        select_rows(large, seed=4, sample=40).write(tmp_path / "drawn.zarr")


def test_all_rows_cost_all_chunks(finished: Path) -> None:
    """Those of scales, too, to the byte: files of shards without the index at their ends."""
    tail = index_size(open_store(finished).plan.blocks_per_shard)
    shards = [file for file in finished.rglob("c/**/*") if file.is_file()]
    chunks = sum(file.stat().st_size - tail for file in shards)
    small = (finished / INDEX).stat().st_size + (finished / MANIFEST).stat().st_size
    assert select_rows(finished).cost.n_bytes == chunks + small


def test_a_structure_with_an_energy_alone_is_not_labelled(tmp_path: Path) -> None:
    made = make_sample()
    without = [one for one in made.dataset if one.energy is not None][1]
    changed = [replace(one, forces=None) if one is without else one for one in made.dataset]
    path = write_store(tmp_path / "some.zarr", replace(made, dataset=changed))
    select_rows(path, sample=20).write(tmp_path / "all.zarr")
    labelled = [one for one in changed if one.energy is not None and one.forces is not None]
    assert read_manifest(tmp_path / "all.zarr").dataset.n_labelled == len(labelled)


def test_rows_of_all_blocks_cost_all_blocks_and_it_is_said_before(
    url: str, large: Path, server: CountingServer, tmp_path: Path
) -> None:
    selection = select_rows(url, condition="n_atoms == 1", fields=["node"])
    said = selection.cost
    assert server.sent < 0.15 * store_bytes(large)
    assert said.share > 0.75
    assert said.n_bytes > 0.6 * store_bytes(large)
    server.sent = 0
    selection.write(tmp_path / "one.zarr")
    assert server.sent == pytest.approx(said.n_bytes, rel=0.15)
    assert (open_store(tmp_path / "one.zarr").index.n_atoms == 1).all()


def test_a_sample_of_what_satisfies_a_condition_ends_with_its_last_row(url: str) -> None:
    selection = select_rows(url, condition="n_atoms == 5", sample=10)
    assert (selection.store.index.n_atoms[selection.rows] == 5).all()
    assert len(selection.rows) == 10
    assert selection.cost.share < 0.2


def test_rows_go_on_where_they_were_interrupted(
    url: str, server: CountingServer, tmp_path: Path
) -> None:
    target = tmp_path / "sample.zarr"
    path = "large.zarr/teachers/painn/node/c/1/0"
    server.status[path] = 403
    with pytest.raises(StoreError, match="denies access"):
        select_rows(url, sample=300)
    server.status.clear()
    selection = select_rows(url, sample=300)
    server.fail_gets[path] = 403
    with pytest.raises(StoreError, match="denies access"):
        selection.write(target)
    assert not target.exists()
    server.fail_gets.clear()
    server.ranges_asked.clear()
    select_rows(url, sample=300).write(target)
    assert verify_store(target).problems == []
    assert len(server.ranges_asked["large.zarr/structures/forces/c/0/0"]) <= 3


def test_rows_of_two_stores_are_never_mixed(copied: Path, tmp_path: Path, finished: Path) -> None:
    target = tmp_path / "sample.zarr"
    with counted(copied.parent) as server:

        def exchange() -> None:
            manifest = open_store(copied).manifest
            changed = manifest.model_copy(update={"n_atoms": manifest.n_atoms + 1}).sealed()
            (copied / MANIFEST).write_bytes(changed.to_bytes())

        selection = select_rows(f"{server.url}/copied.zarr", sample=9)
        server.before["copied.zarr/teachers/painn/node/c/0/0"] = exchange
        with pytest.raises(StoreError, match=r"was replaced while it was read"):
            selection.write(target)
    assert not target.exists()
    select_rows(finished, sample=9).write(target)
    assert verify_store(target).problems == []


def test_what_a_kill_between_two_names_left_is_made_again(finished: Path, tmp_path: Path) -> None:
    target, left = tmp_path / "sample.zarr", tmp_path / "sample.zarr.chosen"
    select_rows(finished, sample=5).write(target)
    os.rename(target, left)
    with pytest.raises(StoreError, match="was begun with other rows"):
        select_rows(finished, sample=6).write(target)
    select_rows(finished, sample=5).write(target)
    assert verify_store(target).problems == []
    assert not left.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"condition": "n_atoms > 99"}, "holds for none of the 20 structures"),
        ({"sample": 21}, "A sample of 21 is asked for, 20 structures"),
        ({"condition": "n_atoms < 6", "sample": 15}, "A sample of 15 is asked for, 13 structures"),
        ({"condition": "n_atoms < 6", "sample": 15, "seed": 1}, "A sample of 15 is asked for, 13"),
        ({"condition": "n_atoms < 6", "seed": 1}, "A seed draws a sample"),
        ({"sample": 3, "fields": ["nod"]}, "did you mean node"),
        ({"sample": 3, "teachers": ["pain"]}, "did you mean painn"),
    ],
)
def test_what_cannot_be_chosen_is_said(
    finished: Path, tmp_path: Path, options: dict[str, object], said: str
) -> None:
    with pytest.raises((ConfigError, StoreError), match=said):
        select_rows(finished, **options).write(tmp_path / "x.zarr")  # type: ignore[arg-type]
