"""`kdcache card` writes a page, metadata or both, and says which."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.commands import kdcache, refused


def test_a_page_and_metadata_are_written(features: Path, tmp_path: Path) -> None:
    page, metadata = tmp_path / "card.html", tmp_path / "metadata.json"
    url = "https://example.org/features.zarr"
    shown = kdcache("card", features, "-o", page, "--croissant", metadata, "--url", url)
    assert shown.split() == [str(metadata), str(page)]
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert json.loads(metadata.read_text())["url"] == url
    assert "nothing is overwritten" in refused("card", features, "-o", page)


def test_a_card_needs_to_know_what_to_write(features: Path) -> None:
    assert "-o card.html" in refused("card", features)
    assert "--croissant" in refused("card", features, "-o", "a.html", "--url", "https://a")
