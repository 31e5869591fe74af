"""Two processes train what one does: batches shared out, losses, checkpoints, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdcache.checkpoint import load_potential, load_state
from kdcache.config import TrainingConfig, dump_config
from kdcache.distill.losses import GroundTruthLoss
from kdcache.distill.schedules import Clock
from kdcache.distill.shared import check_shareable
from kdcache.distributed import ALONE, World
from kdcache.errors import ConfigError
from kdcache.progress import silent
from kdcache.store import Store, open_store
from kdcache.train import Trainer, train_student
from tests.chain import dump, loss_curve, make_store, make_teacher, student
from tests.several_processes import RESUMED, RUNS, STOP, config

ROOT = Path(__file__).parents[1]


def started(*command: object) -> subprocess.Popen[str]:
    """Python with our packages and one thread."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Without a graph of its own: neighbour lists are searched, by one process for all."""
    directory = tmp_path_factory.mktemp("store")
    made = make_store(directory)
    dump(made, make_teacher(directory))
    return open_store(made.path)


@pytest.fixture(scope="module")
def both(store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """All runs by one process, and by two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for case in RESUMED:
        train_student(store.path, two / "taken" / case, config(case), stop_after=STOP)
    processes = [started("tests/several_processes.py", k, store.path, two) for k in (0, 1)]
    for case in RUNS:
        train_student(store.path, one / case, config(case))
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return one, two


@pytest.fixture(scope="module")
def one(both: tuple[Path, Path]) -> Path:
    return both[0]


@pytest.fixture(scope="module")
def two(both: tuple[Path, Path]) -> Path:
    return both[1]


def assert_same_numbers(ours: Path, theirs: Path) -> None:
    """Every column of every row but the time, and the weights of the last checkpoint."""
    header = (theirs / "metrics.csv").read_text().splitlines()[0].split(",")
    assert (ours / "metrics.csv").read_text().splitlines()[0].split(",") == header
    for column in set(header) - {"seconds"}:
        found, expected = (
            np.array([float(v or "nan") for v in loss_curve(run, column)]) for run in (ours, theirs)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12, err_msg=column)
    states = [load_state(run) for run in (ours, theirs)]
    assert states[0] is not None
    assert states[1] is not None
    for part, tensors in states[1].tensors.items():
        assert states[0].tensors[part].keys() == tensors.keys()
        for name, value in tensors.items():
            found = states[0].tensors[part][name].numpy()
            np.testing.assert_allclose(found, value.numpy(), rtol=1e-5, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("case", RUNS)
def test_two_processes_train_what_one_does(case: str, one: Path, two: Path) -> None:
    assert_same_numbers(two / "whole" / case, one / case)
    kept, expected = (load_potential(run / case) for run in (two / "whole", one))
    for ours, theirs in zip(kept.parameters(), expected.parameters(), strict=True):
        np.testing.assert_allclose(
            ours.detach().numpy(), theirs.detach().numpy(), rtol=1e-5, atol=1e-9
        )


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_goes_on_with_another_number_of_processes(
    case: str, store: Store, one: Path, two: Path
) -> None:
    assert_same_numbers(two / "taken" / case, one / case)
    left = two / "left" / case
    if (state := load_state(left)) and state.step == STOP:
        train_student(store.path, left, config(case))
    assert_same_numbers(left, one / case)


def test_processes_share_every_batch_without_overlap(
    store: Store, two: Path, tmp_path: Path
) -> None:
    made = Trainer(store, tmp_path, config("few labels"), tmp_path / "graph", silent)
    held = [(two / f"rows-{rank}").read_text().splitlines() for rank in (0, 1)]
    alone = 0
    for step, lines in enumerate(zip(*held, strict=True)):
        parts = [[int(row) for row in line.split()] for line in lines]
        whole = np.concatenate([sampler.batch_rows(step) for sampler in made.samplers])
        assert sorted(parts[0] + parts[1]) == sorted(whole.tolist())
        assert len(parts[0]) == len(parts[1]) == 3
        labelled = [sum(made.selection.labelled[row] for row in part) for part in parts]
        alone += labelled[0] != labelled[1]
    assert alone  # else the normalisation of losses was not put to the test


def test_a_process_that_is_gone_ends_the_one_that_waits(two: Path) -> None:
    assert "Another process of this run is gone" in (two / "said").read_text()


def test_the_command_line_under_torchrun_speaks_once(store: Store, tmp_path: Path) -> None:
    settings = ("training.max_steps=3", "training.batch_size=4")
    (tmp_path / "config.yaml").write_text(dump_config(student(*settings)))
    several = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone")
    command = ("-m", "kdcache_cli", "train-student", store.path, "-o", tmp_path / "run")
    process = started(*several, *command, "--config", tmp_path / "config.yaml")
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert said.count("3 steps") == 1
    assert loss_curve(tmp_path / "run", "step") == ["1", "2", "3"]


TWO = World(rank=1, size=2, local_rank=1)


def test_a_batch_that_cannot_be_shared_equally_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size is 5, .* 2 of them .* Say 4"):
        TWO.check_batches(TrainingConfig(batch_size=5), 5)
    with pytest.raises(ConfigError, match=r"only 1 structures, and there are 2 processes"):
        TWO.check_batches(TrainingConfig(batch_size=5, max_atoms=20), 1)
    TWO.check_batches(TrainingConfig(batch_size=5, max_atoms=20), 2)
    TWO.check_batches(TrainingConfig(batch_size=4), 4)


def test_one_gpu_for_all_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match="cuda:1, one GPU for 2 processes"):
        TWO.device_name("cuda:1")
    assert TWO.device_name("cuda") == "cuda:1"
    assert TWO.device_name("cpu") == "cpu"
    assert ALONE.device_name("cuda:1") == "cuda:1"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("terms=[{name: c, student: node, teacher: node, loss: cka}]",), "Term c: cka"),
        (("loss.forces=rmse+mae",), "loss.forces: rmse_mae"),
    ],
)
def test_a_loss_that_is_no_sum_over_structures_is_refused(
    settings: tuple[str, ...], named: str, store: Store, tmp_path: Path
) -> None:
    made = Trainer(store, tmp_path, student(*settings), tmp_path / "graph", silent)
    with pytest.raises(ConfigError, match=named):
        check_shareable(made.truth, made.terms)


def test_a_loss_that_does_not_count_is_not_refused(store: Store, tmp_path: Path) -> None:
    chosen = student("loss.forces=rmse+mae", "loss.forces_weight=0")
    made = Trainer(store, tmp_path, chosen, tmp_path / "graph", silent)
    check_shareable(GroundTruthLoss(chosen.loss, Clock(10)), made.terms)
