"""Structures on disk between reading and writing: rows come back in any order, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdcache.fields import GRAPH_FIELDS, STRUCTURE_FIELDS, FieldSpec
from kdcache.graphs import Edges, GraphRule, neighbor_list
from kdcache.spool import SPOOL_FIELDS, Spool, SpoolWriter, open_spool
from kdcache.structures import Structure
from tests.readers.identity import numbered_structure

IDENTITY = {"files": ["a.extxyz"], "seed": 3}
SPECS = {spec.name: spec for spec in SPOOL_FIELDS}
# A cyclic shift with a fixed point: not its own inverse.
ORDER = np.array([4, 1, 0, 5, 2, 3])


def fill(directory: Path, structures: list[Structure], rule: GraphRule | None = None) -> Spool:
    with SpoolWriter(directory) as writer:
        for s in structures:
            edges = neighbor_list(s.positions, s.cell, s.pbc, rule) if rule else None
            writer.append(s, edges)
        return writer.finish(IDENTITY, ["a note"], {"energy": "E"})


@pytest.mark.parametrize("spec", STRUCTURE_FIELDS, ids=lambda spec: spec.name)
def test_rows_come_back_in_the_order_asked_for(tmp_path: Path, spec: FieldSpec) -> None:
    structures = [numbered_structure(s) for s in range(6)]
    spool = fill(tmp_path / "spool", structures)
    found = spool.read(spec, ORDER)
    parts = [np.asarray(getattr(structures[s], spec.name)) for s in ORDER]
    expected = np.concatenate([p if spec.level == "atom" else p[None] for p in parts])
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.dtype(spec.dtype)


def test_columns_come_back_in_dataset_order(tmp_path: Path) -> None:
    structures = [numbered_structure(s) for s in range(6)]
    structures[2].group, structures[3].split, structures[4].weight = "bulk", "val", 0.25
    structures[1].forces = None
    structures[5].energy = None
    spool = fill(tmp_path / "spool", structures)
    assert len(spool) == 6
    assert spool.structure_id.tolist() == [s.structure_id for s in structures]
    assert spool.group.tolist() == ["", "", "bulk", "", "", ""]
    assert spool.split.tolist() == ["", "", "", "val", "", ""]
    assert spool.weight.tolist() == [1, 1, 1, 1, 0.25, 1]
    assert spool.labelled.tolist() == [True, False, True, True, True, False]
    assert [h.tobytes() for h in spool.content_hash] == [s.content_hash() for s in structures]
    assert spool.notes == ("a note",)
    assert spool.keys == {"energy": "E"}
    assert np.isnan(spool.read(SPECS["forces"], np.array([1]))).all()
    assert np.isnan(spool.read(SPECS["energy"], np.array([5]))).all()


def test_neighbour_lists_come_back_with_their_structures(tmp_path: Path) -> None:
    rule = GraphRule(1.5)
    structures = [numbered_structure(s) for s in range(6)]
    spool = fill(tmp_path / "spool", structures, rule)
    lists: list[Edges] = [neighbor_list(s.positions, s.cell, s.pbc, rule) for s in structures]
    # One atom, or atoms too far apart: no edges in between others with edges.
    assert [e.n_edges for e in lists] == spool.n_edges.tolist()
    assert 0 in spool.n_edges
    index, shift = (spool.read(SPECS[spec.name], ORDER) for spec in GRAPH_FIELDS)
    np.testing.assert_array_equal(index, np.concatenate([lists[s].edge_index.T for s in ORDER]))
    np.testing.assert_array_equal(shift, np.concatenate([lists[s].edge_shift for s in ORDER]))
    assert not spool.truncated
    narrow = fill(tmp_path / "narrow", structures, GraphRule(1.5, max_neighbors=1))
    assert narrow.truncated


def test_no_edges_at_all_and_no_rows_asked_for(tmp_path: Path) -> None:
    spool = fill(tmp_path / "spool", [numbered_structure(1)])
    assert spool.read(SPECS["edge_index"], np.array([0])).shape == (0, 2)
    assert spool.read(SPECS["positions"], np.array([], int)).shape == (0, 3)


def test_only_a_complete_spool_of_the_same_import_is_used_again(tmp_path: Path) -> None:
    directory = tmp_path / "spool"
    assert open_spool(directory, IDENTITY) is None
    with SpoolWriter(directory) as writer:
        writer.append(numbered_structure(0), None)
    assert open_spool(directory, IDENTITY) is None
    fill(directory, [numbered_structure(s) for s in range(3)])
    assert open_spool(directory, {**IDENTITY, "seed": 4}) is None
    again = open_spool(directory, IDENTITY)
    assert again is not None
    assert len(again) == 3
