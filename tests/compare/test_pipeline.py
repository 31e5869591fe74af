"""Comparisons of stores and runs: whose layers, on which structures, with which numbers."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.checkpoint import save_potential
from kdcache.compare import Comparison, compare_layers, draw, write_csv
from kdcache.distill.similarity import linear_cka
from kdcache.errors import ConfigError, DataError, IdentityError, KdcacheError
from kdcache.graphs import GraphRule
from kdcache.models.taps import Tap
from kdcache.store import Store
from kdcache.store.records import iterate_structures
from kdcache.stream.window import collate
from kdcache.train import train_student
from tests.chain import (
    CUTOFF,
    PAINN,
    SCHNET,
    dump,
    make_potential,
    make_store,
    make_teacher,
    read_options,
    structures,
    student,
    write_xyz,
)

FILTERS = "edge/filters=message_layers.0.rbf_proj"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, taught_store: Store) -> Path:
    """A directory of runs: a student of the store's teacher, its control, and two others."""
    directory = tmp_path_factory.mktemp("runs")
    term = "{name: n, student: node/m=update_layers.1, teacher: node, student_projection: linear}"
    fast = ("optimizer.lr=0.01", "training.eval_every=12", "training.max_steps=12")
    train_student(taught_store.path, directory / "kd", student(f"terms=[{term}]", *fast))
    train_student(taught_store.path, directory / "control", student(*fast))
    save_potential(directory / "schnet", make_potential(SCHNET))
    save_potential(directory / "wider", make_potential({**PAINN, "cutoff": 4.5}))
    return directory


def values(comparison: Comparison) -> dict[tuple[str, str], float]:
    return {(pair.a, pair.b): pair.cka for pair in comparison.pairs}


@pytest.mark.proof
def test_store_against_run_is_the_direct_formula_on_the_same_structures(
    taught_store: Store, runs: Path
) -> None:
    """Every pair, in many batches, against all rows at once."""
    from kdcache.teachers.native import load_native

    found = compare_layers(taught_store.path, runs / "kd", max_atoms=20)
    rows = np.arange(len(taught_store))
    model = load_native(str(runs / "kd"), device="cpu", dtype=torch.float32)
    batch = collate(list(iterate_structures(taught_store, rows)), model.graph_rule)
    computed = model.compute(batch)
    for field in ("node", "vector"):
        theirs = torch.from_numpy(taught_store.read(f"teachers/teacher/{field}")).double()
        judged = linear_cka(theirs, computed[field].double()).item()
        assert values(found)[field, field] == pytest.approx(judged, rel=1e-6)
    assert found.n_structures == len(taught_store)
    assert {pair.n_rows for pair in found.pairs} == {len(batch.positions)}


def test_every_block_of_a_run_is_a_layer_and_only_like_compares_with_like(
    taught_store: Store, runs: Path
) -> None:
    found = compare_layers(taught_store.path, runs / "kd")
    blocks = [f"{part}_layers_{k}" for k in (0, 1) for part in ("message", "update")]
    nodes = ["node", *(f"node_{block}" for block in blocks)]
    vectors = ["vector", *(f"vector_{block}" for block in blocks)]
    assert found.b_layers == (*nodes, *vectors)
    assert set(values(found)) == {
        *(("node", name) for name in nodes),
        *(("vector", name) for name in vectors),
    }
    # The student was taught in its last update block, which is its node feature as well.
    assert [pair.b for pair in found.pairs if pair.taught] == ["node_update_layers_1"]


def test_a_model_compared_with_itself_is_one_on_the_diagonal(runs: Path, tmp_path: Path) -> None:
    data = write_xyz(tmp_path / "data.extxyz", structures(12))
    run = runs / "kd"
    found = compare_layers(run, run, data=[str(data)], read=read_options())
    assert all(pair.cka == pytest.approx(1) for pair in found.pairs if pair.a == pair.b)
    assert all(pair.cka_unbiased == pytest.approx(1) for pair in found.pairs if pair.a == pair.b)
    assert values(found)["node", "node_update_layers_1"] == pytest.approx(1)
    mirrored = {(y, x): cka for (x, y), cka in values(found).items()}
    assert values(found) == pytest.approx(mirrored)


def test_gain_is_what_the_student_has_beyond_its_control(taught_store: Store, runs: Path) -> None:
    taps = [Tap.parse("node/m=message_layers.0")]
    found = compare_layers(taught_store.path, runs / "kd", control=runs / "control", taps=taps)
    alone = compare_layers(taught_store.path, runs / "control", taps=taps)
    for pair in found.pairs:
        assert pair.control == pytest.approx(values(alone)[pair.a, pair.b])
        assert pair.control is not None
        assert pair.gain == pytest.approx(pair.cka - pair.control)
    taught = next(pair for pair in found.pairs if (pair.a, pair.b) == ("node", "node"))
    assert taught.gain is not None
    assert taught.gain > 0.01
    with pytest.raises(ConfigError, match="have different layers"):
        compare_layers(taught_store.path, runs / "kd", control=runs / "schnet")


def test_only_so_many_structures_are_looked_at(
    taught_store: Store, runs: Path, tmp_path: Path
) -> None:
    few = compare_layers(taught_store.path, runs / "kd", max_structures=7)
    assert few.n_structures == 7
    assert few.pairs[0].n_rows == taught_store.index.n_atoms[:7].sum()
    data = str(write_xyz(tmp_path / "data.extxyz", structures(12)))
    one, again = (
        compare_layers(
            runs / "kd", runs / "schnet", data=[data], read=read_options(), max_structures=5
        )
        for _ in range(2)
    )
    assert one == again
    assert one.n_structures == 5


def test_two_runs_on_a_store_are_two_runs_on_its_file(
    taught_store: Store, runs: Path, tmp_path: Path
) -> None:
    file = write_xyz(tmp_path / "data.extxyz", structures(40))
    pair = runs / "kd", runs / "schnet"
    on_store = compare_layers(*pair, data=[str(taught_store.path)])
    on_file = compare_layers(*pair, data=[str(file)], read=read_options())
    assert values(on_store) == pytest.approx(values(on_file), rel=1e-5)
    assert "vector: the other model has no vector feature of level atom." in on_file.notes


def test_stores_of_one_dataset_in_two_orders_meet_by_structure(
    taught_store: Store, tmp_path: Path
) -> None:
    other = make_store(tmp_path, seed=5)
    assert other.index.source_index.tolist() != taught_store.index.source_index.tolist()
    dump(other, make_teacher(tmp_path), codec="half")
    found = compare_layers(taught_store.path, other.path, max_atoms=24)
    assert values(found)["node", "node"] == pytest.approx(1, rel=1e-6)
    assert values(found)["vector", "vector"] == pytest.approx(1, rel=1e-6)


def test_several_teachers_of_a_store_are_told_apart(tmp_path: Path) -> None:
    store = make_store(tmp_path, 8)
    dump(store, make_teacher(tmp_path), name="one")
    dump(store, make_teacher(tmp_path, model=SCHNET), name="two")
    found = compare_layers(store.path, store.path)
    assert found.a_layers == ("one/node", "two/node", "one/vector")
    assert values(found)["one/node", "one/node"] == pytest.approx(1)
    assert values(found)["one/node", "two/node"] < 0.999


def test_edge_features_compare_on_equal_edges_and_are_left_out_on_others(
    runs: Path, tmp_path: Path
) -> None:
    store = make_store(tmp_path, 12, graph=GraphRule(CUTOFF))
    dump(store, make_teacher(tmp_path, taps=[FILTERS]), fields=["node", "edge_filters"])
    filters = [Tap.parse(FILTERS)]
    found = compare_layers(store.path, runs / "kd", taps=filters, max_atoms=8)
    pair = next(pair for pair in found.pairs if pair.level == "edge")
    assert (pair.a, pair.b) == ("edge_filters", "edge_filters")
    assert pair.n_rows == store.index.n_edges.sum()
    same = compare_layers(runs / "kd", runs / "kd", data=[str(store.path)], taps=filters,
                          taps_a=filters)  # fmt: skip
    assert values(same)["edge_filters", "edge_filters"] == pytest.approx(1)
    wider = compare_layers(store.path, runs / "wider", taps=filters, max_atoms=8)
    assert not [pair for pair in wider.pairs if pair.level == "edge"]
    assert "edge_filters and edge_filters are of different edges" in wider.notes[-1]
    assert values(wider)["node", "node"] > 0


def test_other_structures_are_refused(taught_store: Store, runs: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path, 12)
    dump(other, make_teacher(tmp_path))
    with pytest.raises(IdentityError, match="12 structures against 40"):
        compare_layers(taught_store.path, other.path)
    file = write_xyz(tmp_path / "data.extxyz", list(reversed(structures(40))))
    with pytest.raises(IdentityError, match="the same structures in another order"):
        compare_layers(taught_store.path, runs / "kd", data=[str(file)], read=read_options())


@pytest.mark.parametrize(
    ("a", "b", "options", "error", "message"),
    [
        ("kd", "schnet", {}, DataError, "hold no structures to compare on"),
        ("STORE", "kd", {"taps_a": [Tap("node", "x", "y")]}, ConfigError, "is a store, and a tap"),
        ("STORE", "kd", {"taps": [Tap("node", "x", "y")]}, ConfigError, "no module of the model"),
        ("EMPTY", "kd", {}, ConfigError, "holds no features to compare"),
        ("STORE", "nothing", {}, KdcacheError, "nothing"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    a: str,
    b: str,
    options: dict[str, list[Tap]],
    error: type[KdcacheError],
    message: str,
    taught_store: Store,
    runs: Path,
    tmp_path: Path,
) -> None:
    named = {"STORE": taught_store.path}
    if a == "EMPTY":
        named["EMPTY"] = make_store(tmp_path, 4).path
    first, second = (named.get(name, runs / name) for name in (a, b))
    with pytest.raises(error, match=message) as caught:
        compare_layers(first, second, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_table_and_picture_hold_every_pair(taught_store: Store, runs: Path, tmp_path: Path) -> None:
    taps = [Tap.parse("vector/m=message_layers.0")]
    found = compare_layers(taught_store.path, runs / "kd", control=runs / "control", taps=taps)
    write_csv(found, tmp_path / "out" / "cka.csv")
    draw(found, tmp_path / "out" / "cka.png")
    with (tmp_path / "out" / "cka.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(found.pairs) == 3
    assert float(lines[0]["gain"]) == found.pairs[0].gain
    with_control = (tmp_path / "out" / "cka.png").read_bytes()
    assert with_control.startswith(b"\x89PNG")
    draw(compare_layers(taught_store.path, runs / "kd", taps=taps), tmp_path / "alone.png")
    assert len((tmp_path / "alone.png").read_bytes()) < len(with_control)
