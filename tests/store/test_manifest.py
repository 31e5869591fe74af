"""The manifest's record of a store, and its root digest."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from kdcache.store import read_manifest


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


def test_manifests_of_older_programs_keep_their_digests(finished: Path) -> None:
    """Written before creator, citation, withheld and n_failed were thought of."""
    golden = Path(__file__).parent / "manifest_of_format_1.json"
    assert "creator" not in golden.read_text()
    (finished.parent / "old").mkdir()
    (finished.parent / "old" / "manifest.json").write_bytes(golden.read_bytes())
    manifest = read_manifest(finished.parent / "old")
    assert manifest.to_bytes() == golden.read_bytes()
    assert manifest.whole() is manifest
