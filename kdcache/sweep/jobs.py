"""The runs of a sweep, each with its whole configuration, worked out and checked before any begins.

Invariant: the name of a run depends on its own choices alone, so a sweep that is given further
values finds the runs it has made.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kdcache.config import StudentConfig, change_config, load_config, merge, read_yaml
from kdcache.devices import find_device
from kdcache.distill.published import DEFAULT_PAIR, nearest_pair, parse_pair
from kdcache.distill.schedules import Clock
from kdcache.distill.strategies import apply_strategy
from kdcache.errors import ConfigError, KdcacheError
from kdcache.graphs import GraphRule
from kdcache.models import build_model
from kdcache.models.potential import Normalizer, Potential
from kdcache.models.presets import find_preset
from kdcache.selection import n_trained_on
from kdcache.store import Store
from kdcache.student import build_store_terms
from kdcache.sweep.settings import Grid, StrategySettings, SweepConfig

SEED = "training.seed"
Choices = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a sweep.

    Attributes:
        name: of its directory.
        strategy: name, "" where the base's own terms are used.
        weights: lambda by part of the strategy, where the sweep gives any.
        choices: setting to value, of every grid it is part of.
        shared: those of the choices that all strategies make.
        config: everything that decides its result.
    """

    name: str
    strategy: str
    weights: Mapping[str, float]
    choices: Choices
    shared: Choices
    config: StudentConfig


def plan_jobs(sweep: SweepConfig, store: Store, overrides: Sequence[str] = ()) -> list[Job]:
    """All runs of a sweep, in the order they are started.

    Settings of `terms` are changed after a strategy has set them, all others before, since a
    strategy may build on the loss.

    Args:
        sweep: as read.
        store: its store.
        overrides: "a.b=c" texts laid on the base of every run.

    Raises:
        ConfigError: a setting, strategy, model or term that does not exist or does not fit, naming
            the run; two runs that are the same.
    """
    base = _base(sweep, store)
    load_config(base=base, overrides=overrides)
    jobs = []
    for strategy in sweep.strategies or (None,):
        weights = strategy.weights if strategy is not None else {}
        own: Grid = strategy.grid if strategy is not None else {}
        twice = sorted({*own} & {*sweep.grid})
        if twice:
            raise ConfigError(
                f"{twice[0]} stands in the grid and in that of one strategy. Leave one out."
            )
        for chosen, shared, mine in itertools.product(
            _combinations(weights), _combinations(sweep.grid), _combinations(own)
        ):
            jobs.append(_job(base, overrides, sweep, strategy, shared, mine, chosen, store))
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"The sweep has {name} twice. Name each value and strategy once.")
    return jobs


def check_jobs(jobs: Sequence[Job], store: Store) -> dict[str, GraphRule]:
    """Refuse what would stop a run at its start: hyperparameters, fields of terms, devices.

    Returns:
        The neighbour lists the runs need, each once, by a name of their own.

    Raises:
        ConfigError: naming the run.
    """
    seen: set[str] = set()
    rules: dict[str, GraphRule] = {}
    for job in jobs:
        settings = job.config.model_dump(mode="json")
        key = json.dumps([settings["model"], settings["terms"], settings["training"]["device"]])
        if key in seen:
            continue
        seen.add(key)
        try:
            potential = _untrained(job.config)
            build_store_terms(store, job.config, potential, Clock(job.config.training.max_steps, 1))
            find_device(job.config.training.device, "training.device")
        except KdcacheError as error:
            raise ConfigError(f"{job.name}: {error}") from error
        for rule in (potential.graph_rule, *potential.further_graphs.values()):
            rules[json.dumps(rule.to_json())] = rule
    return rules


def _untrained(config: StudentConfig) -> Potential:
    model = build_model({"name": config.model.name, **config.model.hyperparameters}, seed=0)
    return Potential(model, Normalizer(), {})


def _base(sweep: SweepConfig, store: Store) -> dict[str, object]:
    """Preset and base, laid over each other."""
    settings = read_yaml(sweep.base) if isinstance(sweep.base, str) else dict(sweep.base)
    preset = sweep.preset
    if preset is None and not settings:
        preset = "painn-small"
    layer = find_preset(preset).config(n_trained_on(store)) if preset is not None else {}
    return merge(layer, settings)


def _combinations(grid: Mapping[str, Sequence[object]]) -> Iterator[dict[str, object]]:
    """Every choice of one value per key, the last key running fastest."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _job(
    base: Mapping[str, object],
    overrides: Sequence[str],
    sweep: SweepConfig,
    strategy: StrategySettings | None,
    shared: Choices,
    mine: Choices,
    weights: Mapping[str, object],
    store: Store,
) -> Job:
    label = strategy.name if strategy is not None else ""
    lambdas = {part: float(str(value)) for part, value in weights.items()}
    choices = {**shared, **mine}
    name = _name(label, lambdas, choices)
    texts = {key: f"{key}={json.dumps(value)}" for key, value in choices.items()}
    before = [text for key, text in texts.items() if key.split(".")[0] != "terms"]
    after = [text for key, text in texts.items() if key.split(".")[0] == "terms"]
    try:
        config = load_config(base=base, overrides=[*overrides, *before])
        if strategy is not None:
            # Published weights are told apart by a preset's name, which says the dataset as well.
            own_model = any(key.split(".")[0] == "model" for key in choices)
            student = config.model.name if own_model else sweep.preset or config.model.name
            config = _with_strategy(config, strategy, lambdas, store, student)
        config = change_config(config, after) if after else config
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    return Job(name, label, lambdas, choices, shared, config)


def _with_strategy(
    config: StudentConfig,
    strategy: StrategySettings,
    weights: Mapping[str, float],
    store: Store,
    student: str,
) -> StudentConfig:
    pair = None if strategy.published is None else parse_pair(strategy.published)
    name = strategy.teacher_name or next(iter(store.teachers), "")
    fields = None
    if name in store.teachers:  # the terms say so when they are bound
        pair = pair or nearest_pair(store.teachers[name].model, student)
        fields = list(store.teachers[name].fields)
    return apply_strategy(
        config,
        strategy.name,
        pair=pair or DEFAULT_PAIR,
        weights=weights,
        teacher_name=strategy.teacher_name,
        teacher_fields=fields,
    )


def _name(strategy: str, weights: Mapping[str, float], choices: Choices) -> str:
    """ "n2n,lambda.n2n=100,training.seed=0", fit for a directory."""
    parts = [strategy] if strategy else []
    parts += [f"lambda.{part}={value:g}" for part, value in weights.items()]
    parts += [f"{key}={shown(value)}" for key, value in choices.items()]
    return ",".join(parts).replace("/", "_").replace(" ", "") or "base"


def shown(value: object) -> str:
    """A value in a name or a table: as it is when short, else by a digest."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = json.dumps(value)
    plain = isinstance(value, str | int | float | bool) or value is None
    if plain and len(text) <= 40:
        return text
    return hashlib.sha256(text.encode()).hexdigest()[:8]
