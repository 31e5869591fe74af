"""A student before its first step: references, units, and terms that fit the store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from kdcache.checkpoint import load_potential
from kdcache.config import StudentConfig
from kdcache.errors import ConfigError, DataError, KdcacheError
from kdcache.models.taps import Tap, Taps
from kdcache.progress import silent
from kdcache.store import Store
from kdcache.stream.loader import Loader
from kdcache.train import Trainer, train_student
from tests.chain import PAINN, SCHNET, loss_curve, make_store, student


@pytest.fixture(scope="module")
def store(taught_store: Store) -> Store:
    """Forty labelled structures and a teacher."""
    return taught_store


def trainer(store: Store, run: Path, config: StudentConfig) -> Trainer:
    return Trainer(store, run, config, run / "graph", silent)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("{name: a, student: node, teacher: nodes}", "has no field nodes"),
        ("{name: a, student: nodes, teacher: node}", "student has no nodes"),
        ("{name: a, student: node, teacher: node, teacher_name: t}", "no teacher t"),
        ("{name: a, student: node, teacher: node, teacher_name: t, normalise: rms}", "no teacher"),
        ("{name: a, student: node, teacher: vector}", "symmetry"),
    ],
)
def test_terms_that_do_not_fit_the_store_are_refused(
    term: str, message: str, store: Store, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_student(store.path, tmp_path / "run", student(f"terms=[{term}]"))
    assert not (tmp_path / "run" / "state").exists()


def test_a_store_without_teacher_is_refused_with_terms(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="store has no teacher"):
        train_student(make_store(tmp_path).path, tmp_path / "run", student(strategy="n2n"))


def test_energies_are_normalised_by_what_references_leave(store: Store, tmp_path: Path) -> None:
    term = "{name: e, student: energy, teacher: energy, normalise: rms}"
    config = student(f"terms=[{term}, {{name: n, student: node, teacher: node, normalise: rms, "
                     "student_projection: linear}]")  # fmt: skip
    made = trainer(store, tmp_path, config)
    references = made.potential.references
    numbers = store.read("structures/atomic_numbers").tolist()
    left = store.read("teachers/teacher/energy").copy()
    atom = 0
    for row, n_atoms in enumerate(store.index.n_atoms[: len(left)]):
        left[row] -= sum(references[n] for n in numbers[atom : atom + n_atoms])
        atom += n_atoms
    blocks = store.index.block < 4
    rms = {term.settings.name: float(term.rms) for term in made.terms.terms}  # type: ignore
    assert rms["e"] == pytest.approx(float((left[blocks] ** 2).mean() ** 0.5), rel=1e-6)
    node = store.read("teachers/teacher/node", [0, 1, 2, 3]).astype(float)
    assert rms["n"] == pytest.approx(float((node**2).mean() ** 0.5), rel=1e-6)


def test_references_come_from_where_the_configuration_says(store: Store, tmp_path: Path) -> None:
    single = tmp_path / "atoms.extxyz"
    single.write_text(
        "".join(
            f'1\nProperties=species:S:1:pos:R:3 energy={energy} pbc="F F F"\n{symbol} 0 0 0\n'
            for symbol, energy in (("H", -1.5), ("C", -2.5), ("O", -3.5))
        )
    )
    (tmp_path / "given.yaml").write_text("H: -1.25\nC: -2\nO: -3\n")
    expected = {
        "{mode: none}": {},
        "{mode: given, values: {H: -1, C: -2, O: -3}}": {1: -1.0, 6: -2.0, 8: -3.0},
        f"{{mode: given, file: {tmp_path / 'given.yaml'}}}": {1: -1.25, 6: -2.0, 8: -3.0},
        f"{{mode: isolated, file: {single}}}": {1: -1.5, 6: -2.5, 8: -3.5},
    }
    for text, references in expected.items():
        made = trainer(store, tmp_path, student(f"references={text}"))
        assert made.potential.references == references
        train_student(store.path, tmp_path / str(len(text)), student(f"references={text}"))
    fitted = trainer(store, tmp_path, student()).potential.references
    assert fitted.keys() == {1, 6, 8}
    assert fitted[8] == pytest.approx(-2041.75, abs=5.0)


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ("{mode: given, values: {H: -1, C: -2}}", "holds O, and there are reference energies for"),
        ("{mode: isolated, file: FILE}", "no isolated atom of C, O"),
        ("{mode: given, file: BAD}", "not an energy in eV"),
    ],
)
def test_an_element_without_reference_is_refused(
    references: str, message: str, store: Store, tmp_path: Path
) -> None:
    single, bad = tmp_path / "atoms.extxyz", tmp_path / "bad.yaml"
    single.write_text('1\nProperties=species:S:1:pos:R:3 energy=-1.5 pbc="F F F"\nH 0 0 0\n')
    bad.write_text("H: much\n")
    text = references.replace("FILE", str(single)).replace("BAD", str(bad))
    with pytest.raises(KdcacheError, match=message):
        train_student(store.path, tmp_path / "run", student(f"references={text}"))


def test_isolated_atoms_of_the_published_data_are_read(
    shared: Path, store: Store, tmp_path: Path
) -> None:
    file = shared / "data" / "3bpa" / "iso_atoms.extxyz"
    config = student(f"references={{mode: isolated, file: {file}}}")
    found = trainer(store, tmp_path, config).potential.references
    assert found[6] == pytest.approx(-1029.4889999855063)
    assert found[1] == pytest.approx(-13.587222780835477)


def test_an_element_the_model_cannot_embed_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds O, and the model has embeddings up to C"):
        train_student(store.path, tmp_path / "run", student("model.num_elements=6"))


PROJECTED = "student_projection: linear"


@pytest.mark.parametrize(
    ("model", "tap", "field"),
    [
        (PAINN, "node/msg0=message_layers.0", "node"),
        (PAINN, "vector/upd0=update_layers.0", "vector"),
        (PAINN, "node/start=atom_emb", "node"),
        (SCHNET, "node/int0=interactions.0", "node"),
        (SCHNET, "node/state0=states.0", "node"),
    ],
)
def test_a_feature_inside_the_student_is_compared_and_taught(
    model: Mapping[str, object], tap: str, field: str, store: Store, tmp_path: Path
) -> None:
    term = f"{{name: inner, student: {tap}, teacher: {field}, {PROJECTED}}}"
    config = student(f"terms=[{term}]", "loss.energy_weight=0", "loss.forces_weight=0", model=model)
    made = trainer(store, tmp_path, config)
    with Loader(made.stream) as loader:
        batch = next(iter(loader))
    output = made.stepped(batch)
    taught = Tap.parse(tap)
    with Taps(made.potential.model, [taught]) as tapped:
        plain = made.potential(batch)
        inner = tapped.outputs(batch)[taught.field]
    assert torch.equal(output.features[taught.field], inner)
    assert torch.equal(output.forces, plain.forces)
    loss = made.terms(output, batch, 0)
    (projection,) = (bound.student_projection for bound in made.terms.terms)
    expected = (projection(inner) - batch.teacher[f"teacher/{field}"].float()).square().mean()  # type: ignore[operator]
    torch.testing.assert_close(loss.total, expected)
    loss.total.backward()
    first, last = "atom_emb.embeddings.weight", "update_layers.1.vec_proj.weight"
    if model is SCHNET:
        first, last = "embedding.weight", "interactions.1.mlp.0.weight"
    assert made.potential.model.get_parameter(first).grad is not None
    assert made.potential.model.get_parameter(last).grad is None


def test_training_with_a_tap_lowers_its_term_and_exports_the_plain_student(
    store: Store, tmp_path: Path
) -> None:
    tap = f"{{name: inner, student: node/m=message_layers.0, teacher: node, {PROJECTED}}}"
    same = "{name: again, student: node/m=message_layers.0, teacher: node, loss: cka}"
    config = student(
        f"terms=[{tap}, {same}]", "optimizer.lr=0.01", "loss.energy_weight=0",
        "loss.forces_weight=0",
    )  # fmt: skip
    train_student(store.path, tmp_path / "run", config)
    curve = [float(value) for value in loss_curve(tmp_path / "run", "train_inner")]
    assert curve[-1] < 0.7 * curve[0]
    exported = load_potential(tmp_path / "run").state_dict()
    assert exported.keys() == trainer(store, tmp_path, student()).potential.state_dict().keys()


@pytest.mark.parametrize("loss", ["lsp", "gsp", "cka"])
def test_losses_of_relations_train_without_a_projection(
    loss: str, store: Store, tmp_path: Path
) -> None:
    settings = f"terms=[{{name: r, student: node, teacher: node, loss: {loss}, weight: 100}}]"
    train_student(store.path, tmp_path / "run", student(settings, "training.max_steps=2"))
    assert all(float(value) > 0 for value in loss_curve(tmp_path / "run", "train_r"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["{student: node/a=message_layer.0}"], "did you mean message_layers.0"),
        (["{student: vector/a=atom_emb}"], r"returned \[3, 8\], and vector needs"),
        (["{student: node/a=message_layers.0, student_projection: identity}"], "8 channels"),
        (["{student: nodes/a=message_layers.0}"], "unknown kind 'nodes'"),
        (
            ["{student: node/a=message_layers.0}", "{student: node/a=message_layers.1}"],
            "two taps fill node_a",
        ),
    ],
)
def test_taps_that_do_not_fit_the_student_are_refused(
    settings: list[str], message: str, store: Store, tmp_path: Path
) -> None:
    terms = [
        f"{{name: t{k}, teacher: node, {PROJECTED}, {text[1:]}"
        if "identity" not in text
        else f"{{name: t{k}, teacher: node, {text[1:]}"
        for k, text in enumerate(settings)
    ]
    with pytest.raises(ConfigError, match=message):
        trainer(store, tmp_path, student(f"terms=[{', '.join(terms)}]"))
