"""Steps: torch's own schedulers as judges, and state that continues bitwise."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kdcache.config import OptimizerConfig, RateSchedule, load_config
from kdcache.distill.schedules import Clock
from kdcache.errors import ConfigError, TrainingError
from kdcache.optim import ExponentialAverage, LearningRate, build_optimizer


def schedule(**settings: object) -> RateSchedule:
    return load_config(base={"schedule": settings}).schedule


def rate(max_steps: int = 100, **settings: object) -> LearningRate:
    return LearningRate(schedule(**settings), 0.5, Clock(max_steps, steps_per_epoch=10))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(5, 3, generator=generator)
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


@given(
    step=st.integers(0, 400_000),
    warmup=st.integers(2, 10_000),
    decay=st.integers(1, 400_000),
    factor=st.floats(0.001, 1.0),
)
def test_warmup_and_decay_are_open_catalysts(
    step: int, warmup: int, decay: int, factor: float
) -> None:
    ours = rate(
        name="linear_warmup_exponential_decay",
        unit="step",
        warmup=warmup,
        decay=decay,
        factor=factor,
    ).factor(step)
    judged = min(1 / warmup + step / warmup, 1) * factor ** (step / decay)
    assert ours == pytest.approx(judged, rel=1e-12)


@pytest.mark.proof
def test_papers_coll_schedule_ends_at_a_hundredth() -> None:
    """Ekström Kelvinius et al. 2023, Table 6: warm-up 3,750 steps, decay factor 0.01."""
    coll = LearningRate(
        schedule(name="linear_warmup_exponential_decay", unit="step", warmup=3750, factor=0.01),
        1e-3,
        Clock(1_000_000),
    )
    assert coll.at(0) == pytest.approx(1e-3 / 3750)
    assert coll.at(3749) == pytest.approx(1e-3 * 0.01 ** (3749 / 1e6))
    assert coll.at(500_000) == pytest.approx(1e-4)
    assert coll.at(1_000_000) == pytest.approx(1e-5)


def test_papers_schnet_schedule_warms_up_from_a_tenth_and_steps_down() -> None:
    """Ekström Kelvinius et al. 2023, Table 5, OC20."""
    oc20 = rate(
        name="multi_step",
        unit="step",
        warmup=31250,
        warmup_factor=0.1,
        factor=0.1,
        milestones=[52083, 83333, 104166],
    )
    assert oc20.factor(0) == pytest.approx(0.1)
    assert oc20.factor(15625) == pytest.approx(0.55)
    wanted = {31250: 1.0, 52082: 1.0, 52083: 0.1, 83333: 0.01, 104166: 1e-3, 200_000: 1e-3}
    assert {step: oc20.factor(step) for step in wanted} == pytest.approx(wanted)


def test_multi_step_without_warmup_is_torchs() -> None:
    optimizer = torch.optim.SGD(network().parameters(), lr=0.5)
    judge = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 70], gamma=0.3)
    ours = rate(name="multi_step", milestones=[0.3, 0.7], factor=0.3)
    for step in range(100):
        assert ours.at(step) == pytest.approx(judge.get_last_lr()[0]), step
        optimizer.step()
        judge.step()


def test_cosine_is_torchs_after_its_warmup() -> None:
    optimizer = torch.optim.SGD(network().parameters(), lr=0.5)
    judge = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=80, eta_min=0.05)
    ours = rate(name="cosine", warmup=0.2, min_factor=0.1)
    assert ours.at(0) == pytest.approx(0.5 / 20)
    for step in range(20, 101):
        assert ours.at(step) == pytest.approx(judge.get_last_lr()[0]), step
        optimizer.step()
        judge.step()


@given(metrics=st.lists(st.floats(0.01, 100), min_size=1, max_size=40), patience=st.integers(0, 4))
def test_plateau_is_torchs_and_continues_from_its_state(
    metrics: list[float], patience: int
) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    judge = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience, threshold=1e-4, min_lr=0.05
    )
    settings = {"factor": 0.5, "patience": patience, "min_factor": 0.1}
    ours = rate(name="plateau", **settings)
    for metric in metrics:
        judge.step(metric)
        resumed = rate(name="plateau", **settings)
        resumed.load_state_dict(json.loads(json.dumps(ours.state_dict(), allow_nan=False)))
        ours = resumed
        ours.observe(metric)
        assert ours.at(7) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_constant_is_constant_and_epochs_count() -> None:
    assert {rate(name="constant").at(step) for step in range(100)} == {0.5}
    warming = rate(name="constant", unit="epoch", warmup=2)
    assert [warming.at(step) for step in (0, 9, 19, 20)] == [0.025, 0.25, 0.5, 0.5]
    with pytest.raises(ConfigError, match="steps of an epoch are not known"):
        LearningRate(schedule(name="constant", unit="epoch"), 0.5, Clock(10))


def test_apply_reaches_every_group() -> None:
    optimizer = build_optimizer([network()], OptimizerConfig(weight_decay=0.1))
    assert rate(name="constant").apply(optimizer, 3) == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize("name", ["adamw", "adam"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_optimizer_steps_as_torchs_plain_one(name: str, amsgrad: bool, weight_decay: float) -> None:
    ours, judged = network(), network()
    settings = OptimizerConfig.model_validate(
        {"name": name, "amsgrad": amsgrad, "weight_decay": weight_decay, "lr": 0.01}
    )
    optimizer = build_optimizer([ours], settings)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name]
    matrices = [p for p in judged.parameters() if p.dim() == 2]
    vectors = [p for p in judged.parameters() if p.dim() == 1]
    judge = kind(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}],
        lr=0.01,
        amsgrad=amsgrad,
        weight_decay=0.0,
        foreach=False,
        fused=False,
    )
    for step in range(20):
        take_step(ours, optimizer, step)
        take_step(judged, judge, step)
    for own, other in zip(ours.parameters(), judged.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_shared_and_frozen_parameters_are_taken_once_or_not_at_all() -> None:
    first, second = network(), network()
    second[0].weight = first[0].weight
    second[2].bias.requires_grad_(False)
    optimizer = build_optimizer([first, second], OptimizerConfig())
    taken = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(taken) == len({id(p) for p in taken}) == 6


def test_a_run_continued_from_its_state_takes_bitwise_the_same_steps() -> None:
    settings = OptimizerConfig(lr=0.01, weight_decay=0.01)

    def run(
        model: nn.Module, steps: range, state: tuple[object, ...] | None = None
    ) -> list[Tensor]:
        optimizer = build_optimizer([model], settings)
        average = ExponentialAverage(model, 0.999)
        rates = rate(name="cosine", warmup=0.1)
        if state:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            average.load_state_dict(state[2])
        for step in steps:
            rates.apply(optimizer, step)
            take_step(model, optimizer, step)
            average.update()
        saved.append(
            copy.deepcopy((model.state_dict(), optimizer.state_dict(), average.state_dict()))
        )
        return [*model.parameters(), *average.state_dict().values()]

    saved: list[tuple[object, ...]] = []
    undisturbed = run(network(), range(30))
    run(network(), range(13))
    resumed = run(network(seed=9), range(13, 30), saved[-1])
    assert all(torch.equal(a, b) for a, b in zip(undisturbed, resumed, strict=True))


def test_average_is_the_recursion_written_out() -> None:
    model = network()
    average = ExponentialAverage(model, 0.9)
    judged = [p.detach().double() for p in model.parameters()]
    for update in range(1, 200):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(update)))
        average.update()
        decay = min(0.9, (1 + update) / (10 + update))
        judged = [
            decay * old + (1 - decay) * p.detach().double()
            for old, p in zip(judged, model.parameters(), strict=True)
        ]
    state = average.state_dict()
    assert int(state.pop("updates")) == 199
    for ours, theirs in zip(state.values(), judged, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def test_swapping_lends_the_average_and_gives_the_weights_back() -> None:
    model = network()
    average = ExponentialAverage(model, 0.5)
    start = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    own = [p.detach().clone() for p in model.parameters()]

    def borrow() -> None:
        with average.swapped():
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start, strict=True))
            raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError):
        borrow()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), own, strict=True))
    off = ExponentialAverage(model, None)
    off.update()
    with off.swapped():
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), own, strict=True))


def test_average_of_another_model_is_refused() -> None:
    state = ExponentialAverage(network(), 0.9).state_dict()
    with pytest.raises(TrainingError, match="have 4 tensors, this model 2"):
        ExponentialAverage(nn.Linear(3, 8), 0.9).load_state_dict(state)


def test_average_follows_a_short_run() -> None:
    """Without its warm start, 300 updates of 0.999 would keep 74 % of the random weights."""
    model = nn.Linear(1, 1)
    average = ExponentialAverage(model, 0.999)
    first = model.weight.item()
    with torch.no_grad():
        model.weight.fill_(first + 1)
    for _ in range(300):
        average.update()
    moved = average.state_dict()["average.weight"].item() - first
    assert moved > 0.99
    assert math.isfinite(moved)
