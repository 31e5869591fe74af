"""States on disk: the newest comes back whole, and belongs to its run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdcache.checkpoint import (
    State,
    check_identity,
    load_state,
    save_state,
    state_directories,
    training_seconds,
)
from kdcache.errors import TrainingError


def state(step: int) -> State:
    tensors = {"model": {"w": torch.full((2, 2), float(step))}, "terms": {}}
    return State(step, tensors, {"seconds": 0.5 * step, "identity": {}})


def test_the_newest_state_comes_back_and_two_are_kept(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    assert training_seconds(tmp_path) != training_seconds(tmp_path)  # NaN
    for step in (0, 8, 9, 10, 100):
        save_state(tmp_path, state(step))
    assert [path.name for path in state_directories(tmp_path)] == [
        "step-000000010",
        "step-000000100",
    ]
    found = load_state(tmp_path)
    assert found is not None
    assert found.step == 100
    assert found.tensors["terms"] == {}
    assert torch.equal(found.tensors["model"]["w"], torch.full((2, 2), 100.0))
    assert found.values == {"seconds": 50.0, "identity": {}}
    assert training_seconds(tmp_path) == 50.0


def test_a_state_that_was_being_written_does_not_count(tmp_path: Path) -> None:
    save_state(tmp_path, state(3))
    half = tmp_path / "state" / "step-000000004.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    found = load_state(tmp_path)
    assert found is not None
    assert found.step == 3
    save_state(tmp_path, state(5))
    assert not half.exists()


def test_a_setting_that_is_null_counts_as_left_out() -> None:
    run = Path("run")
    had = State(0, {}, {"identity": {"store": "a", "configuration": "{x: {y: 1, old: null}}"}})
    check_identity(run, had, {"store": "a", "configuration": "{x: {y: 1, new: null}}"})
    with pytest.raises(TrainingError, match=r"x\.y = 1, now it is None"):
        check_identity(run, had, {"store": "a", "configuration": "{x: {}}"})
    with pytest.raises(TrainingError, match=r"x\.z = None, now it is 0"):
        check_identity(run, had, {"store": "a", "configuration": "{x: {z: 0, y: 1}}"})


@pytest.mark.parametrize("step", [4, -3, True, 3.0, None, "3", 10**30])
def test_a_state_that_says_another_step_than_its_name_is_refused(
    step: object, tmp_path: Path
) -> None:
    """Else the next states would be counted from there, and the wrong ones dropped."""
    save_state(tmp_path, state(3))
    path = tmp_path / "state" / "step-000000003" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": step}))
    with pytest.raises(TrainingError, match=r"state\.json says step .*delete"):
        load_state(tmp_path)


@pytest.mark.parametrize("seconds", [10**400, "1", None, [1.0]])
def test_a_time_that_is_none_is_not_known(seconds: object, tmp_path: Path) -> None:
    save_state(tmp_path, state(3))
    path = tmp_path / "state" / "step-000000003" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": seconds}))
    assert training_seconds(tmp_path) != training_seconds(tmp_path)  # NaN
