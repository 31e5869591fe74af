from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdcache.checkpoint import load_potential
from kdcache.errors import ConfigError, DataError
from kdcache.fit_scales import fit_scale_factors, sample_batches, write_scale_factors
from kdcache.models import Model, build_model
from kdcache.models.gemnet_oc import GemNetOC
from tests.chain import structures
from tests.cli.commands import kdcache, refused, write_structures
from tests.models.cases import golden_case

# A GemNet-OC of a few thousand weights, as --set takes it.
TINY = {
    "num_spherical": 3, "num_radial": 6, "num_blocks": 1, "emb_size_atom": 8, "emb_size_edge": 8,
    "emb_size_trip_in": 4, "emb_size_trip_out": 4, "emb_size_quad_in": 4, "emb_size_quad_out": 4,
    "emb_size_aint_in": 4, "emb_size_aint_out": 4, "emb_size_rbf": 4, "emb_size_cbf": 4,
    "emb_size_sbf": 4, "num_atom": 1, "cutoff": 3.0, "cutoff_qint": 3.0, "cutoff_aeaint": 3.0,
    "cutoff_aint": 3.0,
}  # fmt: skip


def tiny(**choices: object) -> Model:
    return build_model({"name": "gemnet-oc", **TINY, **choices}).double()


class Variances:
    """Listens to a factor and keeps both variances, rows counted one by one."""

    def __init__(self) -> None:
        self.output, self.reference, self.rows = 0.0, 0.0, 0

    def __call__(
        self, scaled: Tensor, reference: Tensor, times: Tensor | None, counted: Tensor | None
    ) -> None:
        scaled, reference = scaled.detach(), reference.detach()
        scaled = scaled if counted is None else scaled[counted]
        if times is not None:
            reference = reference.repeat_interleave(times.long(), dim=0)
        if min(len(scaled), len(reference)) > 1:
            self.output += len(scaled) * float(scaled.var(0).mean())
            self.reference += len(scaled) * float(reference.var(0).mean())


@pytest.mark.parametrize("direct", [True, False])
def test_fitted_layers_have_the_variance_of_their_references(direct: bool) -> None:
    model = tiny(direct_forces=direct, num_blocks=2)
    assert isinstance(model, GemNetOC)
    batches = sample_batches(model, structures(12), n_structures=12, batch_size=5)
    assert [batch.n_structures for batch in batches] == [5, 5, 2]
    factors = fit_scale_factors(model, batches)
    modules = model.scale_modules()
    assert set(factors) == set(modules)
    listeners = {name: Variances() for name in modules}
    for name, module in modules.items():
        assert module.observer is None
        assert float(module.scale_factor) == pytest.approx(factors[name])
        module.observer = listeners[name]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for name, found in listeners.items():
        assert found.output == pytest.approx(found.reference, rel=1e-8), name


@pytest.mark.proof
def test_factors_are_fitted_in_the_published_order_and_of_the_published_size(shared: Path) -> None:
    golden = golden_case(shared / "golden" / "gemnet_oc" / "molecule", torch.float64)
    config = json.loads((golden.directory / "config.json").read_text())
    factors = fit_scale_factors(golden.model, [golden.batch])
    assert list(factors) == config["scale_fit_order"]
    # Published ones were fitted on structures that are not among the golden files.
    for name, published in config["scale_factors"].items():
        assert 0.3 < factors[name] / published < 4.0, name


def test_fitting_again_gives_the_same() -> None:
    model = tiny()
    batches = sample_batches(model, structures(6), n_structures=6, batch_size=6)
    first = fit_scale_factors(model, batches)
    assert fit_scale_factors(model, batches) == first


def test_a_sample_has_every_structure_at_most_once() -> None:
    model = tiny()
    numbered = [replace(s, energy=float(k)) for k, s in enumerate(structures(30))]
    (batch,) = sample_batches(model, numbered, n_structures=10, batch_size=10, seed=3)
    assert batch.energy is not None
    assert len(set(batch.energy.tolist())) == 10
    (other,) = sample_batches(model, numbered, n_structures=10, batch_size=10, seed=4)
    assert other.energy is not None
    assert batch.energy.tolist() != other.energy.tolist()
    with pytest.raises(DataError, match="no structures to fit"):
        sample_batches(model, [], n_structures=10, batch_size=10)


def test_a_model_without_such_factors_is_refused() -> None:
    model = build_model({"name": "schnet"})
    with pytest.raises(ConfigError, match="schnet has no scale factors to fit"):
        fit_scale_factors(model, [])


def test_what_no_structure_reaches_is_refused() -> None:
    model = tiny()
    pairs = [s for s in structures(40) if s.n_atoms == 2 and not s.pbc.any()]
    batches = sample_batches(model, pairs, n_structures=4, batch_size=4)
    with pytest.raises(DataError, match=r"no structure reaches int_blocks.*switch that"):
        fit_scale_factors(model, batches)


def test_a_training_starts_with_the_factors_of_a_file(tmp_path: Path) -> None:
    data = write_structures(tmp_path / "data.extxyz", structures(14))
    chosen = [f"model.{name}={value}" for name, value in TINY.items()]
    chosen += ["training.threads=1", "training.max_steps=1", "training.batch_size=4"]
    settings = [part for text in chosen for part in ("--set", text)]
    scales, run = tmp_path / "scales.json", tmp_path / "run"
    said = kdcache("fit-scales", data, "-o", scales, "--preset", "gemnet-oc", *settings)
    factors = json.loads(scales.read_text())
    assert factors.pop("comment") == "gemnet-oc, 14 structures"
    assert f"{len(factors)} factors" in said
    kdcache(
        "train-student", data, "-o", run, "--preset", "gemnet-oc", *settings,
        "--set", f"model.scale_factors={scales}",
    )  # fmt: skip
    scales.unlink()  # a trained model keeps the numbers, not the path
    model = load_potential(run).model
    assert isinstance(model, GemNetOC)
    found = {name: float(m.scale_factor) for name, m in model.scale_modules().items()}
    assert found == pytest.approx(factors, rel=1e-6)


def test_a_run_and_a_model_without_factors_are_one_line(tmp_path: Path) -> None:
    data = write_structures(tmp_path / "data.extxyz", structures(3))
    line = refused("fit-scales", data, "-o", tmp_path / "s.json", "--preset", "painn")
    assert "painn has no scale factors to fit" in line
    write_scale_factors(tmp_path / "deep" / "s.json", {"a": 1.0})
    assert json.loads((tmp_path / "deep" / "s.json").read_text()) == {"a": 1.0}
