"""A card shows what the store holds, loads nothing, and runs nothing, whoever wrote the store."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import zarr

from kdcache.card import write_card
from kdcache.card.sample import read_sample
from kdcache.errors import StoreError
from kdcache.store import Store, open_store
from tests.card.conftest import HOSTILE
from tests.store.sample import Sample
from tests.store.serving import served
from tests.store.several import part, write_part

PAGE = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "section", "figure",
    "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "pre",
}  # fmt: skip
DRAWING = {"svg", "g", "path", "defs", "use", "text", "rect", "clippath", "tspan"}


class Page(HTMLParser):
    """What a browser would be told to make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.shown: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


@pytest.fixture(scope="module")
def text(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "card.html"
    return write_card(hostile, path).read_text(encoding="utf-8")


def test_nothing_of_a_hostile_store_becomes_markup(text: str) -> None:
    page = Page(text)
    assert set(page.tags) <= PAGE | DRAWING
    assert page.tags.count("style") == 2  # ours, and matplotlib's
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "action", "data", "formaction", "srcset"), (tag, name)
        if name.endswith("href"):
            assert value.startswith("#"), value
        if name == "style":
            assert "alert" not in value
            assert all(part.startswith("#") for part in value.split("url(")[1:])


def test_hostile_texts_are_shown_as_they_are(text: str, hostile: Path, sample: Sample) -> None:
    shown = "".join(Page(text).shown)
    for words in HOSTILE:
        assert words in shown
    assert hostile.name in shown
    assert str(sample.index.structure_id[0]) in shown
    assert "before��[31m�after" in shown
    assert "a--b" in shown


def test_the_page_may_load_and_run_nothing(text: str) -> None:
    policies = [value for tag, name, value in Page(text).attributes if name == "content"]
    assert "default-src 'none'; style-src 'unsafe-inline'" in policies
    assert "<script" not in text.lower()
    # Names of XML namespaces are the only addresses outside of what the store said.
    tags = [value for _, name, value in Page(text).attributes if "://" in value]
    assert all(value.startswith("http://www.w3.org/") for value in tags)


def test_the_page_is_html_to_the_letter(text: str) -> None:
    html5lib = pytest.importorskip("html5lib")
    html5lib.HTMLParser(strict=True).parse(text)


def test_ids_are_there_once_and_links_lead_to_them(text: str) -> None:
    attributes = Page(text).attributes
    ids = [value for _, name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for _, name, value in attributes if name.endswith("href")} <= set(ids)


def test_what_is_inside_is_said(taught_store: Store, tmp_path: Path) -> None:
    path = write_card(taught_store.path, tmp_path / "card.html")
    shown = "".join(Page(path.read_text(encoding="utf-8")).shown)
    manifest = taught_store.manifest
    assert manifest.root_digest in shown
    assert manifest.teachers["teacher"].digest in shown
    for name, error in manifest.teachers["teacher"].errors.items():
        assert f"teachers/teacher/{name}" in shown
        assert not error.relative or f"{error.relative:.1e}" in shown
    assert "unknown: ask before you pass it on" in shown
    assert 'zarr.open_group("store.zarr", mode="r")' in shown
    assert str(tmp_path) not in shown
    assert str(Path(str(taught_store.path)).parent) not in shown
    with pytest.raises(StoreError, match="nothing is overwritten"):
        write_card(taught_store.path, path)


def test_the_lines_to_load_it_load_it(
    taught_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_card(taught_store.path, tmp_path / "card.html")
    page = path.read_text(encoding="utf-8")
    programs = [part.partition("</pre>")[0] for part in page.split("<pre>")[-2:]]
    monkeypatch.chdir(Path(str(taught_store.path)).parent)
    for program in programs:
        names: dict[str, object] = {}
        exec("".join(Page(f"<pre>{program}</pre>").shown), names)
        assert "values" in names or "rows" in names


def test_distributions_are_those_of_the_values(taught_store: Store) -> None:
    found = read_sample(taught_store, 10**6)
    assert found.n_structures == len(taught_store)
    panels = {panel.title: panel.values for panel in found.panels}
    forces = np.concatenate(
        [s.forces for s in taught_store.structures("store") if s.forces is not None]
    )
    expected = np.sort(np.linalg.norm(forces, axis=1))
    np.testing.assert_allclose(np.sort(panels["forces norm"]), expected, rtol=1e-12)
    energies = [
        s.energy / s.n_atoms for s in taught_store.structures("store") if s.energy is not None
    ]
    np.testing.assert_allclose(np.sort(panels["energy per atom"]), np.sort(energies), rtol=1e-12)
    numbers = np.concatenate([s.atomic_numbers for s in taught_store.structures()])
    np.testing.assert_array_equal(found.elements, np.bincount(numbers, minlength=119))
    # Another reader's word on the features; padding of its arrays is zero.
    node = np.asarray(zarr.open_group(taught_store.path, mode="r")["teachers/teacher/node"])  # type: ignore[arg-type]
    norms = np.linalg.norm(node.astype(np.float64), axis=1)
    ours = np.sort(panels["teacher/node, norm per row"])
    np.testing.assert_allclose(ours, np.sort(norms)[-len(ours) :], rtol=1e-12)


def test_examples_are_the_first_structures(taught_store: Store) -> None:
    for row, example in enumerate(read_sample(taught_store, 1).examples):
        structure = taught_store.structure(row)
        assert example.structure_id == structure.structure_id
        values, n_values = example.fields["positions"]
        assert values == structure.positions[0].tolist()
        assert n_values == structure.positions.size


def test_a_card_of_an_address_reads_a_bounded_part(taught_store: Store, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    assert taught_store.plan.n_shards > 4
    root = Path(str(taught_store.path))
    with served(root.parent) as server:
        path = write_card(f"{server.url}/{root.name}", tmp_path / "card.html", sample=3)
        touched = {p for method, p in server.requests if method == "GET" and "node/c/" in p}
    assert len(touched) == 1
    page = path.read_text(encoding="utf-8")
    assert f" {len(taught_store)} structures, which stand in random order" in page
    assert server.url not in page


def test_structures_a_teacher_failed_on_are_left_out(tmp_path: Path) -> None:
    store = write_part(tmp_path / "store.zarr", part(range(20), 2))
    assert store.teachers["edges"].n_failed
    write_card(store.path, tmp_path / "card.html")
    for panel in read_sample(open_store(tmp_path / "store.zarr"), 100).panels:
        assert np.isfinite(panel.values).all()
