"""What a manifest's entries record, and what they refuse to."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from kdcache.graphs import GraphRule
from kdcache.store import DatasetEntry, GraphEntry, TeacherEntry, read_manifest
from tests.store.sample import TEACHER, teacher_entry


def test_a_teacher_reads_back_as_it_was_described(finished: Path) -> None:
    described = teacher_entry(references={26: -3.25, 1: 0.1 + 0.2})
    text = described.model_dump_json()
    assert TeacherEntry.model_validate_json(text) == described
    stored = read_manifest(finished).teachers["painn"]
    assert [stored.fields[s.name].spec(s.name) for s in TEACHER] == list(TEACHER)
    assert stored.references == {1: -13.6}


def test_an_entry_is_equal_to_the_rule_it_describes() -> None:
    rule = GraphRule(5.0, 50, symmetric=True)
    entry = GraphEntry.describe(rule, truncated=True)
    assert entry == rule
    assert rule == entry
    assert entry != GraphRule(5.0, 50)
    assert entry != GraphRule(6.0, 50, symmetric=True)
    assert entry == GraphEntry.describe(rule, truncated=False)
    assert entry != "a rule"


def test_paths_do_not_get_into_a_store() -> None:
    for name in ("/data/frames.xyz", "frames\\a.xyz", ""):
        with pytest.raises(ValidationError):
            DatasetEntry(digest="0" * 64, n_structures=1, n_labelled=0, sources=[name])


def test_values_json_cannot_hold_are_refused() -> None:
    with pytest.raises(ValidationError):
        teacher_entry(references={1: float("nan")})
    with pytest.raises((TypeError, ValueError)):
        teacher_entry(architecture={"cutoff": float("inf")})
