"""A real browser draws the card, asks for nothing else, runs nothing, and needs no scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from kdcache.card import write_card
from kdcache.store import Store
from tests.card.browser import (
    Look,
    Seen,
    find_chromium,
    has_qt,
    look_with_chromium,
    look_with_qt,
)
from tests.card.conftest import HOSTILE

# What a card must not be able to do, done: otherwise a browser that sees nothing would pass.
CARELESS = """<!DOCTYPE html><title>careless</title><p>shown
<img src="http://127.0.0.1:9/picture.png"><script>alert("ran"); console.log("said");
document.querySelector("p").append(" by a script");</script>"""


@pytest.fixture(scope="module", params=["chromium", "qt"])
def seen(
    request: pytest.FixtureRequest,
    hostile: Path,
    taught_store: Store,
    tmp_path_factory: pytest.TempPathFactory,
) -> Mapping[str, Seen]:
    if request.param == "chromium" and find_chromium() is None:
        pytest.skip("no chromium or chrome is on PATH")
    if request.param == "qt" and not has_qt():
        pytest.skip("PySide6 with QtWebEngine is not installed")
    directory = tmp_path_factory.mktemp("browser")
    card = write_card(taught_store.path, directory / "card.html")
    strange = write_card(hostile, directory / "hostile.html")
    careless = directory / "careless.html"
    careless.write_text(CARELESS)
    looks = {
        "card": Look(card),
        "card, narrow": Look(card, width=420),
        "card, no scripts": Look(card, scripts=False),
        "hostile": Look(strange),
        "hostile, narrow": Look(strange, width=420),
        "careless": Look(careless),
        "careless, no scripts": Look(careless, scripts=False),
    }
    look = look_with_chromium if request.param == "chromium" else look_with_qt
    return dict(zip(looks, look(list(looks.values())), strict=True))


def test_a_browser_would_see_what_is_forbidden(seen: Mapping[str, Seen]) -> None:
    found = seen["careless"]
    assert "http://127.0.0.1:9/picture.png" in found.requests
    assert {"dialog ran", "said"} <= set(found.said)
    assert found.measured["text"].endswith("by a script")
    assert "by a script" not in seen["careless, no scripts"].measured["text"]


@pytest.mark.parametrize("page", ["card", "card, no scripts", "hostile", "hostile, narrow"])
def test_it_asks_for_nothing_and_says_nothing(page: str, seen: Mapping[str, Seen]) -> None:
    found = seen[page]
    assert len(found.requests) == 1
    assert found.requests[0].startswith("file:///")
    assert found.said == []
    assert found.measured["scripts"] == 0
    assert found.measured["handlers"] == []


@pytest.mark.parametrize("page", ["card", "card, narrow", "card, no scripts", "hostile"])
def test_plots_are_drawn(page: str, seen: Mapping[str, Seen]) -> None:
    measured = seen[page].measured
    ((width, height),) = measured["plots"]
    assert width > 300
    assert height > 300
    titles = [text for text, *_ in measured["titles"] if "norm" in text or "atoms" in text]
    assert len(titles) >= 5
    assert all(w > 0 and h > 0 for _, w, h in measured["titles"])
    # A path or more of bars to every panel, drawn to some size.
    assert len(measured["bars"]) >= len(titles)
    assert all(w > 0 and h > 0 for w, h in measured["bars"])


def test_what_a_stranger_wrote_is_read_as_text(seen: Mapping[str, Seen]) -> None:
    shown = " ".join(seen["hostile"].measured["text"].split())
    for words in HOSTILE:
        assert " ".join(words.split()) in shown
    assert "before��[31m�after" in shown


def test_it_is_readable_without_scripts(seen: Mapping[str, Seen], taught_store: Store) -> None:
    assert seen["card, no scripts"].measured == seen["card"].measured
    text = seen["card, no scripts"].measured["text"]
    for words in (
        taught_store.manifest.root_digest,
        "Licences",
        "Distributions",
        "zarr.open_group",
        str(taught_store.index.structure_id[0]),
    ):
        assert words in text
    (architecture,) = seen["card"].measured["closed"]
    assert '"name": "painn"' in architecture


@pytest.mark.parametrize("page", ["card", "card, narrow", "hostile", "hostile, narrow"])
def test_nothing_sticks_out_of_the_window(page: str, seen: Mapping[str, Seen]) -> None:
    assert seen[page].measured["overflow"] <= 0
