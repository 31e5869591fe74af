"""The manifest's record of a store, and its root digest."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from kdcache.graphs import GraphRule
from kdcache.store import DatasetEntry, GraphEntry, TeacherEntry, read_manifest
from tests.store.sample import TEACHER, teacher_entry


def test_the_root_digest_is_that_of_the_format_description(finished: Path) -> None:
    """Computed by the words of FORMAT.md alone: the file's text without two members and spaces."""
    text = (finished / "manifest.json").read_text()
    tight = re.sub(r'("(?:[^"\\]|\\.)*")|\s+', lambda m: m.group(1) or "", text)
    tight = re.sub(r'"root_digest":"[0-9a-f]{64}",', "", tight)
    tight = re.sub(r'"created":"[^"]*",', "", tight)
    said = json.loads(text)["root_digest"]
    assert hashlib.sha256(tight.encode()).hexdigest() == said
    assert read_manifest(finished).root_digest == said


def test_everything_but_the_date_counts_for_the_root_digest(finished: Path) -> None:
    manifest = read_manifest(finished)
    assert manifest.model_copy(update={"created": "later"}).sealed() == manifest.model_copy(
        update={"created": "later"}
    )
    assert manifest.model_copy(update={"n_edges": 1}).content_digest() != manifest.root_digest


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


def test_manifests_of_older_programs_keep_their_digests(finished: Path) -> None:
    """Written before creator, citation, withheld and n_failed were thought of."""
    golden = Path(__file__).parent / "manifest_of_format_1.json"
    assert "creator" not in golden.read_text()
    (finished.parent / "old").mkdir()
    (finished.parent / "old" / "manifest.json").write_bytes(golden.read_bytes())
    manifest = read_manifest(finished.parent / "old")
    assert manifest.to_bytes() == golden.read_bytes()
    assert manifest.whole() is manifest
