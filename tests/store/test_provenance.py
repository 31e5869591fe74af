"""What is stated of a finished store: kept apart, shown, and part of its identity."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from kdcache.errors import ConfigError, StoreError
from kdcache.store import (
    add_teacher,
    describe_store,
    format_description,
    open_store,
    read_manifest,
    verify_store,
)
from kdcache.store.annotation import Annotation, annotate_store
from kdcache.store.licences import is_spdx
from kdcache.store.signature import SIGNATURE
from kdcache.store.work import StoreLock
from tests.store.sample import TEACHER, Sample, files_of, teacher_entry, write_all

STATED = Annotation(
    creator="A. Lab, 0000-0002-1825-0097",
    citation="doi:10.1000/xyz",
    licence_structures="CC-BY-4.0",
    licence_labels="on request",
    licence_teachers={"painn": "MIT"},
)


def test_what_is_stated_reads_back_and_touches_nothing_but_the_manifest(
    copied: Path, finished: Path
) -> None:
    before = read_manifest(copied)
    manifest = annotate_store(copied, STATED)
    assert read_manifest(copied) == manifest
    dataset = manifest.dataset
    assert (dataset.creator, dataset.citation) == (STATED.creator, STATED.citation)
    assert (dataset.licences.structures, dataset.licences.labels) == ("CC-BY-4.0", "on request")
    assert manifest.teachers["painn"].licence == "MIT"
    assert manifest.root_digest != before.root_digest
    assert manifest.digests == before.digests
    ours, theirs = files_of(copied), files_of(finished)
    assert {name for name in ours if ours[name] != theirs[name]} == {"manifest.json"}
    assert verify_store(copied).problems == []


def test_statements_add_up_and_are_taken_back(copied: Path) -> None:
    before = read_manifest(copied)
    annotate_store(copied, Annotation(creator="first"))
    annotate_store(copied, Annotation(citation="second"))
    dataset = read_manifest(copied).dataset
    assert (dataset.creator, dataset.citation) == ("first", "second")
    taken = annotate_store(copied, Annotation(creator="", citation=""))
    assert taken.root_digest == before.root_digest
    assert annotate_store(copied, Annotation(licence_teachers={"painn": "CC-BY-4.0"})) == taken


def test_a_store_of_which_nothing_is_stated_has_the_manifest_of_older_programs(
    finished: Path,
) -> None:
    document = json.loads((finished / "manifest.json").read_text())
    assert {"creator", "citation"}.isdisjoint(document["dataset"])
    assert set(document) == {
        "capacities", "created", "dataset", "digests", "format_version", "graph", "n_atoms",
        "n_edges", "order", "root_digest", "structures", "teachers",
    }  # fmt: skip
    assert set(document["teachers"]["painn"]) == {
        "architecture", "digest", "errors", "fields", "graph", "licence", "model", "precision",
        "references", "software",
    }  # fmt: skip


def test_texts_are_one_line_and_not_a_book(copied: Path) -> None:
    annotate_store(copied, Annotation(citation=" A. Lab,\n  Journal \t 1 "))
    assert read_manifest(copied).dataset.citation == "A. Lab, Journal 1"
    content = files_of(copied)
    with pytest.raises(ConfigError, match=r"dataset\.citation: .*20000 characters"):
        annotate_store(copied, Annotation(citation="x" * 20_001))
    with pytest.raises(ConfigError, match=r"no teacher 'pain': did you mean painn\?"):
        annotate_store(copied, Annotation(licence_teachers={"pain": "MIT"}))
    assert files_of(copied) == content


def test_a_signed_store_is_annotated_only_where_its_signature_goes(copied: Path) -> None:
    (copied / SIGNATURE).write_text("{}")
    with pytest.raises(StoreError, match="is signed"):
        annotate_store(copied, STATED)
    annotate_store(copied, STATED, remove_signature=True)
    assert not (copied / SIGNATURE).exists()


def test_a_store_a_teacher_is_being_added_to_is_left_alone(copied: Path, sample: Sample) -> None:
    write_all(add_teacher(copied, "second", teacher_entry(), TEACHER), sample, [0])
    content = files_of(copied)
    with pytest.raises(StoreError, match="unfinished teachers/second"):
        annotate_store(copied, STATED)
    assert files_of(copied) == content


def test_what_is_stated_meanwhile_is_not_lost(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process wrote the manifest, and gave the lock back as we asked for it."""
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        manifest = read_manifest(copied)
        dataset = manifest.dataset.model_copy(update={"citation": "theirs"})
        changed = manifest.model_copy(update={"dataset": dataset}).sealed()
        (copied / "manifest.json").write_bytes(changed.to_bytes())
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    dataset = annotate_store(copied, Annotation(creator="ours")).dataset
    assert (dataset.creator, dataset.citation) == ("ours", "theirs")
    assert read_manifest(copied).dataset == dataset


def test_a_store_that_another_process_writes_to_is_not_annotated(copied: Path) -> None:
    with StoreLock(copied), pytest.raises(StoreError, match="Another process is writing"):
        annotate_store(copied, STATED)


def test_inspect_shows_provenance_units_order_and_errors(copied: Path) -> None:
    annotate_store(copied, STATED)
    description = describe_store(copied)
    text = format_description(description)
    for said in (
        "creator     A. Lab, 0000-0002-1825-0097",
        "citation    doi:10.1000/xyz",
        "structures: CC-BY-4.0; labels: on request (no SPDX identifier known here)",
        "order       numpy PCG64 permutation, seed 11",
        "computed in float32, licence: MIT",
        "software torch 2",
        "signature   none",
        "cutoff 4.5 Å, at most 20 neighbours",
    ):
        assert said in text
    (node,) = (line for line in text.splitlines() if line.startswith("  node "))
    assert node.split()[1:5] == ["atom", "5", "float32", "half"]
    assert "error " in node
    (forces,) = (line for line in text.splitlines() if line.startswith("  forces "))
    assert "eV/Å" in forces
    assert description["whole_root_digest"] == read_manifest(copied).root_digest


SPDX = (
    "MIT", "cc-by-4.0", "CC0-1.0", "GPL-2.0+", "MIT OR Apache-2.0", "(MIT AND CC-BY-4.0) OR ISC",
    "LicenseRef-our-lab", "DocumentRef-a:LicenseRef-b", "Apache-2.0 WITH LLVM-exception",
    "MIT AND (ISC OR (Zlib AND 0BSD))",
)  # fmt: skip
NOT_SPDX = (
    "", "CC BY 4.0", "on request", "MIT AND", "AND MIT", "MIT MIT", "(MIT", "MIT)", "()",
    "MIT and ISC", "CC-BY-4.0; MIT", "LicenseRef-", "MIT WITH", "MIT WITH ISC", "WITH MIT",
    "(MIT) WITH LLVM-exception", "unknown", "MIT OR OR ISC", "LLVM-exception", ") MIT (",
    "LicenseRef-a b",
)  # fmt: skip


@pytest.mark.parametrize("text", SPDX)
def test_spdx_expressions_are_known(text: str) -> None:
    assert is_spdx(text)


@pytest.mark.parametrize("text", NOT_SPDX)
def test_free_text_is_no_spdx_expression(text: str) -> None:
    assert not is_spdx(text)


def test_an_annotation_that_cannot_be_written_leaves_the_store_as_it_was(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = files_of(copied)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        annotate_store(copied, STATED)
    monkeypatch.undo()
    assert files_of(copied) == content
    assert open_store(copied).manifest == read_manifest(copied)
