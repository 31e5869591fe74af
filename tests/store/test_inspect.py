"""inspect tells what is there, licences apart, without reading features."""

from __future__ import annotations

import json
from pathlib import Path

from kdcache.store import add_teacher, describe_store, format_description
from tests.store.sample import STRUCTURES, TEACHER, Sample, files_of, teacher_entry, write_all


def test_counts_sizes_and_fields_are_those_of_the_store(finished: Path, sample: Sample) -> None:
    description = json.loads(json.dumps(describe_store(finished)))
    assert description["n_structures"] == len(sample.dataset)
    assert description["n_labelled"] == 16
    assert description["n_atoms"] == sum(s.n_atoms for s in sample.dataset)
    assert (description["smallest"], description["largest"]) == (1, 12)
    assert description["splits"] == {"train": 15, "val": 5}
    assert set(description["structures"]) == {spec.name for spec in STRUCTURES}
    fields = description["teachers"]["painn"]["fields"]
    assert set(fields) == {spec.name for spec in TEACHER}
    assert fields["node"]["relative"] > 0
    shards = {k: len(v) for k, v in files_of(finished).items() if "/c/" in k}
    assert description["n_bytes"] == sum(shards.values())
    vector = sum(n for k, n in shards.items() if k.startswith("teachers/painn/vector"))
    assert fields["vector"]["n_bytes"] == vector


def test_people_see_licences_of_all_three_apart(finished: Path) -> None:
    text = format_description(describe_store(finished))
    assert "structures: unknown; labels: unknown" in text
    assert "licence: CC-BY-4.0" in text
    assert "cutoff 4.5 Å, at most 20 neighbours" in text


def test_a_teacher_being_added_is_shown(copied: Path, sample: Sample) -> None:
    write_all(add_teacher(copied, "second", teacher_entry(), TEACHER), sample, [0, 1])
    assert describe_store(copied)["unfinished"] == {"teachers/second": 2}
    assert "unfinished: teachers/second, 2 of" in format_description(describe_store(copied))
