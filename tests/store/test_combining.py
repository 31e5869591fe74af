"""What merged, united and chosen stores say of themselves, and what cannot be put together."""

from __future__ import annotations

import doctest
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.cluster import Here
from kdcache.errors import ConfigError, IdentityError, StoreError
from kdcache.store import (
    Store,
    add_teacher,
    create_store,
    open_store,
    provenance,
    verify_store,
)
from kdcache.store.choosing import Choice, choose_rows
from kdcache.store.combining import plan_merge, plan_subset
from kdcache.store.rewrite import Rewrite, write_rewrite
from kdcache.store.uniting import plan_union
from tests.store.sample import (
    STRUCTURES,
    TEACHER,
    Sample,
    begin_structures,
    teacher_entry,
    write_all,
)
from tests.store.several import assert_same_rows, by_id, part, write_part

HERE = Here()


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [part(range(12), 2), part(range(30, 38), 3)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, samples: list[Sample]) -> list[Store]:
    directory = tmp_path_factory.mktemp("parts")
    first = write_part(directory / "first.zarr", samples[0], edges=False)
    second = write_part(
        directory / "second.zarr", samples[1], edges=False, licence="MIT", software={"torch": "3"}
    )
    return [first, second]


def write(path: Path, rewrite: Rewrite) -> Store:
    write_rewrite(path, rewrite, HERE)
    return open_store(path)


def test_examples_worked_by_hand() -> None:
    assert doctest.testmod(provenance).failed == 0


def test_a_merge_is_the_dataset_of_all_stores_one_after_another(
    stores: list[Store], samples: list[Sample], tmp_path: Path
) -> None:
    merged = write(tmp_path / "merged.zarr", plan_merge(stores, HERE, seed=1))
    whole = samples[0].dataset + samples[1].dataset
    hashes = [structure.content_hash() for structure in whole]
    merged.check_dataset(hashes, [structure.structure_id for structure in whole])
    with pytest.raises(IdentityError, match="another order"):
        merged.check_dataset(hashes[::-1], ["" for _ in whole])
    report = verify_store(merged.path, data=whole)
    assert (report.problems, report.n_compared) == ([], len(whole))
    dataset = merged.manifest.dataset
    assert dataset.n_labelled == sum(s.energy is not None for s in whole)
    assert dataset.sources == ["first.extxyz", "second.extxyz"]
    assert dataset.licences.structures == "of first; of second"
    assert dataset.licences.labels == ""
    roots = [store.manifest.root_digest for store in stores]
    assert dataset.notes[0] == f"merge of {roots[0]}, {roots[1]}, riffled with seed 1"
    entry = merged.teachers["painn"]
    assert (entry.licence, entry.software) == ("CC-BY-4.0; MIT", {"torch": "2, 3"})
    assert entry.digest == stores[0].teachers["painn"].digest
    assert merged.graph == stores[0].graph
    assert merged.graph is not None
    assert merged.graph.truncated is False
    by_row = {s.structure_id: s for s in whole}
    for row, structure_id in enumerate(merged.index.structure_id):
        expected = by_row[structure_id]
        assert merged.index.split[row] == expected.split
        assert merged.index.group[row] == expected.group
        assert merged.index.weight[row] == expected.weight


def test_the_error_of_a_merge_is_that_of_all_its_values(
    stores: list[Store], tmp_path: Path
) -> None:
    merged = write(tmp_path / "merged.zarr", plan_merge(stores, HERE))
    errors = [store.teachers["painn"].errors["node"].relative for store in stores]
    squares = [np.square(s.read("teachers/painn/node").astype(float)).sum() for s in stores]
    expected = np.sqrt(np.dot(np.square(errors), squares) / np.sum(squares))
    assert merged.teachers["painn"].errors["node"].relative == pytest.approx(expected, rel=5e-3)
    assert min(errors) < expected < max(errors)


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory: pytest.TempPathFactory, samples: list[Sample]) -> Store:
    """Structures 9 to 11 of the first store, called otherwise, and three others."""
    sample = part([9, 50, 10, 51, 11, 52], 4)
    ids = [f"again:{i}" for i in sample.index.structure_id]
    named = Sample(
        sample.dataset, sample.source_index, sample.plan,
        replace(sample.index, structure_id=np.array(ids, object)),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("overlapping") / "again.zarr"
    return write_part(path, named, edges=False)


def test_a_structure_in_two_stores_is_refused_or_counts_once(
    stores: list[Store], overlapping: Store, tmp_path: Path
) -> None:
    both = [stores[0], overlapping]
    with pytest.raises(StoreError, match=r"both hold structure 'again:frame:\d+' .*first of 3 "):
        plan_merge(both, HERE)
    rewrite = plan_merge(both, HERE, skip_repeated=True)
    assert rewrite.notes[0].startswith("3 structures of later stores repeat an earlier one's")
    merged = write(tmp_path / "merged.zarr", rewrite)
    assert len(merged) == 15
    assert len({row.tobytes() for row in merged.index.content_hash}) == 15
    again = [i for i in merged.index.structure_id if i.startswith("again:")]
    assert sorted(again) == ["again:frame:50", "again:frame:51", "again:frame:52"]
    first = merged.index.structure_id[merged.index.source_order][:12]
    assert first.tolist() == stores[0].index.structure_id[stores[0].index.source_order].tolist()


def test_one_id_for_two_structures_is_refused(stores: list[Store], tmp_path: Path) -> None:
    sample = part([60, 61], 1)
    ids = np.array(["frame:3", "frame:61"], object)
    named = Sample(sample.dataset, sample.source_index, sample.plan,
                   replace(sample.index, structure_id=ids))  # fmt: skip
    other = write_part(tmp_path / "other.zarr", named, edges=False)
    with pytest.raises(StoreError, match="call different structures 'frame:3'"):
        plan_merge([stores[0], other], HERE, skip_repeated=True)


@pytest.mark.parametrize(
    ("entry", "fields", "message"),
    [
        ({"digest": "cd" * 32}, TEACHER, "has digest ababab.* are not one model"),
        ({"references": {1: -1.0}}, TEACHER, "has references .* are not one model"),
        ({}, TEACHER[1:], "Field node of teacher 'painn' is missing from one of them"),
        ({}, (replace(TEACHER[0], codec="exact"), *TEACHER[1:]), "codec half and exact"),
        ({}, (replace(TEACHER[0], shape=(5, 1)), *TEACHER[1:]), r"shape \(5,\) and \(5, 1\)"),
    ],
)
def test_one_name_for_two_teachers_is_refused(
    stores: list[Store], tmp_path: Path, entry: dict[str, Any], fields: Any, message: str
) -> None:
    path, sample = tmp_path / "other.zarr", part(range(30, 34), 3)
    write_all(begin_structures(path, sample), sample)
    write_all(add_teacher(path, "painn", teacher_entry(**entry), fields), sample)
    both = [stores[0], open_store(path)]
    with pytest.raises(StoreError, match=message):
        plan_merge(both, HERE)
    assert not plan_merge(both, HERE, teachers=[]).teachers


def test_a_teacher_that_one_store_lacks_is_refused(
    stores: list[Store], samples: list[Sample], tmp_path: Path
) -> None:
    more = write_part(tmp_path / "more.zarr", part(range(20, 26), 3))
    with pytest.raises(StoreError, match=r"first.zarr has no teacher 'edges'.*--teachers painn"):
        plan_merge([stores[0], more], HERE)
    assert list(plan_merge([stores[0], more], HERE, teachers=["painn"]).teachers) == ["painn"]
    with pytest.raises(StoreError, match="no teacher 'pain': did you mean painn"):
        plan_merge(stores, HERE, teachers=["pain"])
    with pytest.raises(StoreError, match="has a field 'nod': did you mean node"):
        plan_merge(stores, HERE, fields=["nod"])
    with pytest.raises(StoreError, match="none of the fields edge"):
        plan_merge([more, stores[1]], HERE, teachers=["painn"], fields=["edge"])


def test_stores_of_different_graphs_are_merged_without_neighbours(
    stores: list[Store], tmp_path: Path
) -> None:
    path, sample = tmp_path / "wider.zarr", part(range(30, 34), 3)
    wider = sample.graph.model_copy(update={"cutoff": 9.0})
    writer = create_store(
        path, index=sample.index, plan=sample.plan, fields=STRUCTURES, dataset=sample.entry,
        graph=wider,
    )  # fmt: skip
    write_all(writer, sample)
    write_all(add_teacher(path, "painn", teacher_entry(), TEACHER), sample)
    both = [stores[0], open_store(path)]
    with pytest.raises(StoreError, match=r"message of teacher 'painn' has a row for every edge"):
        plan_merge(both, HERE)
    rewrite = plan_merge(both, HERE, fields=["node", "atomic_energy"])
    assert "neighbour lists are left out" in rewrite.notes[0]
    merged = write(tmp_path / "merged.zarr", rewrite)
    assert merged.graph is None
    assert merged.manifest.n_edges == 0
    assert "edge_index" not in merged.fields("structures")
    node = "teachers/painn/node"
    assert_same_rows(
        by_id(merged.path, node),  # type: ignore[arg-type]
        by_id(both[0].path, node) | by_id(both[1].path, node),  # type: ignore[arg-type]
    )
    assert verify_store(merged.path).problems == []


def test_a_store_is_not_merged_with_itself_or_alone(stores: list[Store]) -> None:
    with pytest.raises(StoreError, match=r"first.zarr is named twice"):
        plan_merge([stores[0], stores[1], stores[0]], HERE)
    with pytest.raises(StoreError, match="1 store is given"):
        plan_merge(stores[:1], HERE)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, samples: list[Sample]) -> list[Store]:
    """The dataset of the first store: in another order and layout; reversed as a dataset."""
    directory = tmp_path_factory.mktemp("others")
    same = part(range(12), 8, atom_capacity=20, blocks_per_shard=1)
    reverse = part(range(11, -1, -1), 9)
    return [
        write_part(directory / "same.zarr", same, digest="cd" * 32),
        write_part(directory / "reverse.zarr", reverse, edges=False, digest="de" * 32),
    ]


def test_teachers_of_one_dataset_are_united_whatever_its_order(
    stores: list[Store], others: list[Store], samples: list[Sample], tmp_path: Path
) -> None:
    rename = {(1, "painn"): "second", (2, "painn"): "third"}
    united = write(tmp_path / "united.zarr", plan_union([stores[0], *others], rename=rename))
    first = stores[0]
    assert list(united.teachers) == ["edges", "painn", "second", "third"]
    assert np.array_equal(united.index.content_hash, first.index.content_hash)
    assert united.manifest.capacities == first.manifest.capacities
    assert united.manifest.order == first.manifest.order
    for teacher, store, old in (
        ("second", others[0], "painn"), ("third", others[1], "painn"),
        ("edges", others[0], "edges"), ("painn", first, "painn"),
    ):  # fmt: skip
        assert united.teachers[teacher].digest == store.teachers[old].digest
        for name, spec in store.fields(f"teachers/{old}").items():
            if spec.codec != "compact":
                found = by_id(united.path, f"teachers/{teacher}/{name}")  # type: ignore[arg-type]
                assert_same_rows(found, by_id(store.path, f"teachers/{old}/{name}"))  # type: ignore[arg-type]
    assert verify_store(united.path, data=samples[0].dataset).problems == []


def test_teachers_of_one_name_are_not_united_unless_they_are_one(
    stores: list[Store], others: list[Store], tmp_path: Path, samples: list[Sample]
) -> None:
    with pytest.raises(StoreError, match=r"both have a teacher 'painn'.*--rename 2:painn=NEW"):
        plan_union([stores[0], others[0]])
    assert list(plan_union([stores[0], others[0]], teachers=["edges"]).teachers) == ["edges"]
    with pytest.raises(StoreError, match="no teacher 'painn2' to be renamed"):
        plan_union([stores[0], others[0]], rename={(1, "painn2"): "x", (1, "painn"): "y"})
    with pytest.raises(StoreError, match="cannot name a teacher"):
        plan_union([stores[0], others[0]], rename={(1, "painn"): "../x"})
    twin = write_part(tmp_path / "twin.zarr", samples[0], edges=False)
    rewrite = plan_union([stores[0], twin])
    assert list(rewrite.teachers) == ["painn"]
    assert rewrite.notes[-1].endswith("is there already")


def test_stores_of_other_structures_are_not_united(stores: list[Store], overlapping: Store) -> None:
    with pytest.raises(IdentityError, match=r"not hold the same structures: e.g. 'frame:\d+'"):
        plan_union([stores[0], overlapping])


def test_a_subset_is_the_chosen_part_of_its_dataset(
    stores: list[Store], samples: list[Sample], tmp_path: Path
) -> None:
    rows = choose_rows(stores[0], Choice(splits=["train"], max_atoms=5), HERE)
    rewrite = plan_subset(stores[0], rows, "small", HERE, teachers=["painn"], fields=["node"])
    found = write(tmp_path / "subset.zarr", rewrite)
    chosen = [s for s in samples[0].dataset if s.split == "train" and s.n_atoms <= 5]
    found.check_dataset([s.content_hash() for s in chosen], [s.structure_id for s in chosen])
    assert list(found.fields("teachers/painn")) == ["node"]
    root = stores[0].manifest.root_digest
    assert found.manifest.dataset.notes == [
        f"subset of {root}: {len(chosen)} of 12 structures (small)"
    ]
    assert found.manifest.dataset.n_labelled == sum(s.energy is not None for s in chosen)
    assert found.plan.blocks_per_shard == min(3, found.plan.n_blocks)
    assert verify_store(found.path, data=chosen).problems == []


def test_what_is_chosen_is_what_was_asked_for(stores: list[Store], samples: list[Sample]) -> None:
    store = stores[0]
    ids = store.index.structure_id
    by_name = {s.structure_id: s for s in samples[0].dataset}

    def chosen(**wishes: Any) -> list[str]:
        return [str(ids[row]) for row in choose_rows(store, Choice(**wishes), HERE)]

    def those(keep: Any) -> list[str]:
        return [str(i) for i in ids if keep(by_name[i])]

    assert chosen() == ids.tolist()
    assert chosen(splits=["val"]) == those(lambda s: s.split == "val")
    assert chosen(origins=["rattled"]) == those(lambda s: s.n_atoms == 1)
    assert chosen(ids=["frame:3", "frame:7"]) == those(lambda s: s.structure_id[-1] in "37")
    assert chosen(rows=[4, 2]) == ids[[2, 4]].tolist()
    elements = set(range(1, 30))
    kept = those(lambda s: set(s.atomic_numbers) <= elements)
    assert 0 < len(kept) < 12
    assert chosen(elements=sorted(elements)) == kept
    sample = chosen(sample=5, seed=3, splits=["train"])
    assert (
        sample
        == chosen(sample=5, seed=3, splits=["train"])
        != chosen(sample=5, seed=4, splits=["train"])
    )
    assert sample == [i for i in chosen(splits=["train"]) if i in sample]


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"splits": ["trian"]}, "has no split 'trian': did you mean train"),
        ({"origins": ["syn"]}, "has no origin 'syn'"),
        ({"ids": ["frame:3", "x"]}, "has no structure 'x'. Leave it out"),
        ({"ids": ["y", "x"]}, "has no structure 'y', nor 1 more of 2 ids"),
        ({"rows": [12]}, r"has rows 0…11, not 12"),
        ({"sample": 13}, "A sample of 13 is asked for, 12 structures"),
        ({"sample": 0}, "A sample of 0 is none"),
        ({"sample": -3}, "A sample of -3 is none"),
        ({"elements": [1, 119]}, "119 is no element"),
        ({"elements": [-1]}, "-1 is no element"),
        (
            {"splits": ["val"], "max_atoms": 1, "elements": [2]},
            "split 3, at most 1 atoms .*are lef",
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused(
    stores: list[Store], wishes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_rows(stores[0], Choice(**wishes), HERE)
