"""A card shows what the store holds, loads nothing, and runs nothing, whoever wrote the store."""

from __future__ import annotations

import ast
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from kdcache.card import write_card, write_croissant
from kdcache.card.page import MAX_TEXT
from kdcache.card.plots import bar_edges, draw
from kdcache.card.sample import Panel, read_sample
from kdcache.card.sample import Sample as CardSample
from kdcache.errors import StoreError
from kdcache.store import Store, add_teacher, create_store, open_store
from kdcache.store.signature import SIGNATURE, make_keys, read_private_key, sign_store
from kdcache.store.withholding import write_without_structures
from tests.audit.damage import damaged
from tests.card.conftest import HOSTILE
from tests.store.sample import (
    SEED,
    STRUCTURES,
    Sample,
    make_sample,
    teacher_entry,
    write_all,
    write_store,
)
from tests.store.serving import served
from tests.store.several import part, write_part

PAGE = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "section", "figure",
    "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "pre", "details", "summary",
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

    @property
    def text(self) -> str:
        return "".join(self.shown)


def card_of(store: Any, directory: Path) -> str:
    return write_card(store, directory / "card.html").read_text(encoding="utf-8")


def programs_of(page: str) -> list[str]:
    """What stands under "Loading": for kdcache, for zarr-python, for a shell."""
    loading = page.split("<h2>Loading</h2>")[1].split("</section>")[0]
    return [Page(part.partition("</pre>")[0]).text for part in loading.split("<pre>")[1:]]


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
    allowed = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert allowed in policies
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
    run_programs(path.read_text(encoding="utf-8"), taught_store, monkeypatch)


def run_programs(page: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, public, shell = programs_of(page)
    monkeypatch.chdir(Path(str(store.path)).parent)
    for program, read in ((ours, "values"), (public, "rows")):
        names: dict[str, object] = {}
        exec(program, names)
        assert read in names
    assert shlex.split(shell) == ["kdcache", "verify", store.path.name]


@pytest.mark.parametrize("teachers", [(), ("painn",)], ids=["no teacher", "a teacher"])
def test_the_lines_to_load_what_was_passed_on_without_structures_load_it(
    teachers: tuple[str, ...], sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_store(write_store(tmp_path / "whole.zarr", make_sample(), teachers))
    write_without_structures(whole, tmp_path / "part.zarr")
    store = open_store(tmp_path / "part.zarr")
    page = card_of(store.path, tmp_path)
    assert "Left out of this copy: atomic_numbers" in page
    assert whole.manifest.root_digest in page
    run_programs(page, store, monkeypatch)
    write_croissant(store.path, tmp_path / "metadata.json")


def test_no_name_becomes_a_command(taught_store: Store, tmp_path: Path) -> None:
    name = "a\"\nimport os\n$(touch x) '`id`\u202e"
    shutil.copytree(str(taught_store.path), tmp_path / name)
    ours, public, shell = programs_of(card_of(tmp_path / name, tmp_path))
    plain = "a\" import os $(touch x) '`id`?"
    for program in (ours, public):
        parsed = ast.parse(program)
        imported = [n for n in ast.walk(parsed) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert len(imported) == 1
        said = [n.value for n in ast.walk(parsed) if isinstance(n, ast.Constant)]
        assert plain in said
    assert shlex.split(shell) == ["kdcache", "verify", plain]
    assert "\n" not in shell.strip()


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
    node = np.asarray(zarr.open_group(taught_store.path, mode="r")["teachers/teacher/node"])
    norms = np.linalg.norm(node.astype(np.float64), axis=1)
    ours = np.sort(panels["teacher/node, norm per row"])
    np.testing.assert_allclose(ours, np.sort(norms)[-len(ours) :], rtol=1e-12)


def test_examples_are_the_first_structures(taught_store: Store) -> None:
    for row, example in enumerate(read_sample(taught_store, 1).examples):
        structure = taught_store.structure(row)
        assert example.structure_id == structure.structure_id
        values, n_of_row, n_values = example.fields["positions"]
        assert values == structure.positions[0].tolist()
        assert n_of_row == 3
        assert n_values == structure.positions.size
        values, n_of_row, _ = example.fields["teacher/vector"]
        assert (len(values), n_of_row) == (6, 36)


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


def test_what_is_cut_and_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.card.sample.EXAMPLES", 5)
    page = card_of(write_store(tmp_path / "s.zarr", make_sample((1,) * 5)), tmp_path)
    examples = page.split("<h2>Examples")[1].split("</section>")[0].split("<h3>")[1:]
    assert len(examples) == 5
    for example in examples:
        number = int(Page(example).text.split(",")[0].removeprefix("frame:"))
        assert f"<td>{10 + number} 0 0 0 11 0 …</td>" in example
        # The last of five has no labels.
        assert ("<td>energy</td><td>none</td>" in example) == (number == 4)


@pytest.mark.parametrize("size", [1, 3])
def test_a_store_of_one_structure_has_a_card(size: int, tmp_path: Path) -> None:
    # A single atom has no edges, but a teacher of it has a feature of edges.
    store = open_store(write_store(tmp_path / "s.zarr", make_sample((size,))))
    page = Page(card_of(store.path, tmp_path)).text
    assert f"1 of {size} atoms, 1 labelled" in page
    assert ("frame:0, 1 atom" if size == 1 else "frame:0, 3 atoms") in page
    assert "Of all structures; counts" in page


def test_a_page_bears_so_many_plots_and_says_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_store(tmp_path / "s.zarr", make_sample(), ["a", "b", "c"])
    whole = read_sample(open_store(store), 100)
    assert whole.n_left_out == 0
    monkeypatch.setattr("kdcache.card.sample.MAX_PANELS", 4)
    found = read_sample(open_store(store), 100)
    # Atoms per structure are counted by the index.
    assert [panel.title for panel in found.panels] == [p.title for p in whole.panels[:5]]
    assert found.n_left_out == len(whole.panels) - 5
    assert f"{found.n_left_out} further quantities are left out" in card_of(store, tmp_path)


@pytest.mark.parametrize(
    ("values", "edges"),
    [
        (np.array([3, 3, 5]), [2.5, 3.5, 4.5, 5.5]),
        (np.array([7]), [6.5, 7.5]),
        (np.array([0.0, 40.0]), np.arange(41.0)),
        (np.array([4.0, 4.0]), np.linspace(2, 6, 41)),
        (np.array([0.0]), np.linspace(-0.5, 0.5, 41)),
        (np.array([1000.0, np.nextafter(1000, 2000)]), np.linspace(500, 1500, 41)),
        (np.array([0, 80]), np.linspace(0, 80, 41)),
    ],
    ids=["whole", "one", "range", "equal", "zero", "nearly equal", "many whole"],
)
def test_every_value_is_in_a_bar(values: np.ndarray, edges: Any) -> None:
    panel = Panel("x", "", values)
    found = bar_edges(panel)
    np.testing.assert_allclose(found, edges, rtol=1e-12)
    assert np.histogram(values, found)[0].sum() == len(values)


@pytest.mark.parametrize(
    "values", [[-9e299, 9e299], [1e-320, 5e-324], [1e300], [-1e-300, 0.0]], ids=str
)
def test_the_largest_and_the_smallest_numbers_are_drawn(values: list[float]) -> None:
    drawn = draw(CardSample(1, np.zeros(0, np.int64), [Panel("x", "", np.array(values))]))
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_values_that_no_axis_holds_are_left_out(tmp_path: Path) -> None:
    store = open_store(write_store(tmp_path / "s.zarr", make_sample((1,) * 20), ()))
    odd = np.array([1.79e308, -1.79e308, np.inf])

    def spoil(values: np.ndarray) -> np.ndarray:
        values[:3] = odd if values.ndim == 1 else odd[:, None]
        return values

    for name in ("energy", "forces"):
        store = damaged(store, tmp_path / name, f"structures/{name}", spoil, whole=False)
    panels = {panel.title: panel.values for panel in read_sample(store, 100).panels}
    for title in ("energy per atom", "forces norm"):
        assert len(panels[title]) >= 10
        assert np.abs(panels[title]).max() < 1e3
    assert "energy per atom" in card_of(store.path, tmp_path)


def test_long_names_fit_above_their_plots() -> None:
    panel = Panel("n" * 60 + "/" + "m" * 60, "", np.arange(3.0))
    drawn = draw(CardSample(1, np.zeros(0, np.int64), [panel]))
    assert "n" * 22 + "…" + "m" * 23 + "<" in drawn


def test_a_strangers_text_is_shown_in_part_and_in_its_order(tmp_path: Path) -> None:
    sample = make_sample()
    entry = sample.entry.model_copy(
        update={"notes": ["n" * 15_000] * 40, "citation": "abc\u202edef\u2066"}
    )
    writer = create_store(
        tmp_path / "s.zarr",
        index=sample.index,
        plan=sample.plan,
        fields=STRUCTURES,
        dataset=entry,
        graph=sample.graph,
        seed=SEED,
    )
    write_all(writer, sample)
    described = teacher_entry(architecture={"a": ["x" * 100] * 1000}, fields=())
    write_all(add_teacher(tmp_path / "s.zarr", "t", described, ()), sample)
    page = card_of(tmp_path / "s.zarr", tmp_path)
    text = page.split("<body>")[1].split("<svg")[0] + page.split("</svg>")[1]
    assert len(text) < 3 * MAX_TEXT
    assert "abc\ufffddef\ufffd" in page
    assert "cutoff 4.5 Å, the nearest 20 of an atom" in page


def test_a_signature_is_named_and_not_believed(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s.zarr", make_sample())
    assert "<dt>signature</dt><dd>none</dd>" in card_of(store, tmp_path)
    _, fingerprint = make_keys(tmp_path / "lab.pem")
    signed = read_private_key(tmp_path / "lab.pem")
    sign_store(open_store(store).manifest, signed, store / SIGNATURE)
    (tmp_path / "card.html").unlink()
    page = card_of(store, tmp_path)
    assert fingerprint in page
    assert "This page does not check it" in page
    (store / SIGNATURE).write_text("<script>")
    (tmp_path / "card.html").unlink()
    assert "<script>" not in card_of(store, tmp_path)
