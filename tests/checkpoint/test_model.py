"""Models on disk: what is written comes back, what is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdcache.checkpoint import load_potential, potential_digest, save_potential
from kdcache.errors import TrainingError
from kdcache.stream.window import collate
from tests.chain import PAINN, SCHNET, make_potential, structures


@pytest.mark.parametrize("model", [PAINN, SCHNET], ids=["painn", "schnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f4", "f8"])
def test_a_saved_potential_predicts_the_same(
    model: dict[str, object], dtype: torch.dtype, tmp_path: Path
) -> None:
    potential = make_potential(model, dtype=dtype)
    save_potential(tmp_path, potential, {"step": 7})
    loaded = load_potential(tmp_path)
    assert not loaded.training
    assert loaded.references == potential.references
    assert loaded.normalizer == potential.normalizer
    assert potential_digest(loaded) == potential_digest(potential)
    batch = collate(structures(12), potential.graph_rule).to("cpu", dtype)
    expected, found = potential.predict(batch), loaded.predict(batch)
    assert torch.equal(found.energy, expected.energy)
    assert torch.equal(found.forces, expected.forces)
    assert json.loads((tmp_path / "model.json").read_text())["notes"] == {"step": 7}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def damaged(directory: Path, **changes: object) -> None:
    save_potential(directory, make_potential())
    card = json.loads((directory / "model.json").read_text())
    (directory / "model.json").write_text(json.dumps({**card, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"digest": "0" * 64}, "its card says 000000000000…"),
        ({"dtype": "set_num_threads"}, "describes no model"),
        ({"normalizer": {"energy_scale": -1.0}}, "describes no model"),
        ({"model": 3}, "describes no model"),
        ({"model": {"name": "painn", "hidden_channels": 7}}, "describes no model"),
        ({"references": {"H": 1.0}}, "describes no model"),
        ({"references": {"1": 0.5}}, "changed or damaged"),
    ],
)
def test_a_card_that_was_changed_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    damaged(tmp_path, **changes)
    with pytest.raises(TrainingError, match=message):
        load_potential(tmp_path)


def test_weights_that_were_changed_are_refused(tmp_path: Path) -> None:
    save_potential(tmp_path, make_potential())
    weights = tmp_path / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    with pytest.raises(TrainingError, match="changed or damaged"):
        load_potential(tmp_path)
    weights.write_bytes(whole[:-100])
    with pytest.raises(TrainingError, match="does not fit the model"):
        load_potential(tmp_path)
    save_potential(tmp_path / "other", make_potential({**PAINN, "hidden_channels": 4}))
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(TrainingError, match="does not fit the model"):
        load_potential(tmp_path)


def test_a_card_that_is_no_json_or_missing_is_refused(tmp_path: Path) -> None:
    save_potential(tmp_path, make_potential())
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(TrainingError, match="describes no model"):
        load_potential(tmp_path)
    (tmp_path / "model.json").unlink()
    with pytest.raises(TrainingError, match="holds no trained model"):
        load_potential(tmp_path)
