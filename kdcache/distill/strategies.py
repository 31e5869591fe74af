"""Published and own ways to distill, by name: which terms, with which weights, over which time.

Data and arithmetic on configurations only; what a strategy does can be read in the resolved
configuration it returns, and changed there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from kdcache.config import (
    LossConfig,
    ProjectionConfig,
    StudentConfig,
    TermConfig,
    WeightSchedule,
    validate,
)
from kdcache.distill.published import DEFAULT_PAIR, Pair, published_weight
from kdcache.distill.schedules import constant, ramp, scaled
from kdcache.errors import ConfigError, did_you_mean

# Matin et al. 2025, Table 1: first epoch, W_A, W_F, W_E.
BORN_AGAIN_TABLE: tuple[tuple[int, float, float, float], ...] = (
    (1, 200.0, 75.0, 0.0),
    (200, 160.0, 63.0, 0.2),
    (250, 120.0, 51.0, 0.4),
    (300, 80.0, 39.0, 0.6),
    (350, 40.0, 27.0, 0.8),
    (400, 0.0, 15.0, 1.0),
)
# The last row needs time of its own: one more stage of 50 epochs, the termination patience there.
BORN_AGAIN_EPOCHS = 450

# Matin et al. 2025, appendix A.1, students without a schedule: W_A, W_F, W_E.
HIPNN_WEIGHTS = (100.0, 30.0, 1.0)

# Annealing, ours: teachers leave in a straight line while the ground truth comes in.
ANNEALED_UNTIL = 0.75
ANNEALED_START = 0.1
ANNEALED_TERMS = ("n2n", "v2v", "vanilla2")

# Student feature and teacher field of the strategies that compare features.
FEATURES = {
    "n2n": ("node", "node"),
    "e2e": ("edge", "edge"),
    "e2n": ("node", "edge_to_node"),
    "v2v": ("vector", "vector"),
}
VECTOR_OF_EDGES = "edge_to_vector"

COMBINABLE = ("n2n", "e2e", "e2n", "v2v", "vanilla1", "vanilla2")
STRATEGIES = (*COMBINABLE, "annealed", "born-again", "hipnn", "control")


def apply_strategy(
    config: StudentConfig,
    strategy: str,
    *,
    pair: Pair = DEFAULT_PAIR,
    weights: Mapping[str, float] | None = None,
    teacher_name: str | None = None,
    teacher_fields: Collection[str] | None = None,
) -> StudentConfig:
    """`config` with its terms replaced by those of a strategy, and its loss where that has one.

    Args:
        config: its loss gives L_E, L_F, alpha_E and alpha_F to the vanilla strategies.
        strategy: one of n2n, e2e, e2n, v2v, vanilla1, vanilla2; several joined by "+" or ",";
            "annealed" or "annealed:n2n+v2v" for such terms fading into the ground truth;
            "born-again", "hipnn"; "control" for no terms and no overlays.
        pair: row of Table 8 that lambda is taken from.
        weights: lambda by strategy instead.
        teacher_name: which teacher; None where the store has one.
        teacher_fields: what the store has of that teacher. Where its vectors are not among it, v2v
            learns those made of its edges (Eq. 6); None counts as having them.

    Raises:
        ConfigError: an unknown strategy, or a weight for one that is not used.

    Source: Ekström Kelvinius et al. 2023, section 3; Matin et al. 2025, Eq. 5 and Table 1.
    """
    head, _, tail = strategy.partition(":")
    annealed = head == "annealed"
    names = _split(tail or "+".join(ANNEALED_TERMS)) if annealed else _split(strategy)
    alone = [name for name in names if name not in COMBINABLE]
    if alone and (annealed or len(names) > 1):
        raise ConfigError(
            f"Strategy {alone[0]} stands alone; those that combine are {', '.join(COMBINABLE)}."
        )
    given = weights or {}
    unused = [name for name in given if name not in names]
    if unused:
        raise ConfigError(
            f"A weight for {unused[0]} is given, but strategy {strategy} has no such part; "
            f"{did_you_mean(unused[0], names)}."
        )
    changed: dict[str, object]
    if names == ["control"]:
        # What a teacher labelled is the teacher's word, too.
        changed = {"terms": (), "data": config.data.model_copy(update={"overlays": ()})}
    elif names in (["born-again"], ["hipnn"]):
        loss, term = _born_again(config) if names == ["born-again"] else _hipnn(config)
        if names[0] in given:
            term = term.model_copy(update={"weight": scaled(term.weight, given[names[0]])})
        changed = {"loss": loss, "terms": (term.model_copy(update={"teacher_name": teacher_name}),)}
    else:
        terms: list[TermConfig] = []
        for name in names:
            weight = given[name] if name in given else published_weight(name, pair)
            terms += _terms(name, weight, config.loss, teacher_name, teacher_fields)
        changed = _anneal(config, terms) if annealed else {"terms": tuple(terms)}
        if "vanilla1" in names:
            changed = _batches_as_they_come(config, changed)
    # A copy is not validated; reading its dump is.
    settings = config.model_copy(update=changed).model_dump(mode="json")
    return validate(settings, StudentConfig, f"Strategy {strategy}")


def _terms(
    strategy: str,
    weight: float,
    loss: LossConfig,
    teacher_name: str | None,
    teacher_fields: Collection[str] | None,
) -> list[TermConfig]:
    linear = ProjectionConfig(kind="linear")
    if strategy in FEATURES:
        # Eq. 4; linear maps did best in Table 15, MSE in Table 14.
        student, teacher = FEATURES[strategy]
        if strategy == "v2v" and teacher_fields is not None and teacher not in teacher_fields:
            teacher = VECTOR_OF_EDGES
        term = _term(strategy, student, "mse", constant(weight), teacher_name)
        return [term.model_copy(update={"teacher": teacher, "student_projection": linear})]
    if strategy == "vanilla2":
        # Eq. 8, with the loss of energies.
        return [_term(strategy, "atomic_energy", loss.energy, constant(weight), teacher_name)]
    # Eq. 7: the ground-truth loss once more, with the teacher in its place.
    energy_weight = scaled(loss.energy_weight, weight)
    energy = _term("vanilla1_energy", "energy", loss.energy, energy_weight, teacher_name)
    forces_weight = scaled(loss.forces_weight, weight)
    forces = _term("vanilla1_forces", "forces", loss.forces, forces_weight, teacher_name)
    return [energy.model_copy(update={"per_atom": loss.energy_per_atom}), forces]


def _term(
    name: str, field: str, loss: str, weight: WeightSchedule, teacher_name: str | None
) -> TermConfig:
    return TermConfig(
        name=name, student=field, teacher=field, teacher_name=teacher_name, loss=loss, weight=weight
    )


def _anneal(config: StudentConfig, terms: list[TermConfig]) -> dict[str, object]:
    loss = config.loss
    weights = [loss.energy_weight, loss.forces_weight, *(term.weight for term in terms)]
    if any(weight.kind != "constant" for weight in weights):
        raise ConfigError(
            "annealed sets loss.energy_weight and loss.forces_weight over time itself; "
            "give them as plain numbers, their values at the end of training."
        )

    def rising(weight: WeightSchedule) -> WeightSchedule:
        final = weight.points[0][1]
        return ramp(ANNEALED_START * final, final, ANNEALED_UNTIL)

    def fading(weight: WeightSchedule) -> WeightSchedule:
        return ramp(weight.points[0][1], 0.0, ANNEALED_UNTIL)

    truth = {
        "energy_weight": rising(loss.energy_weight),
        "forces_weight": rising(loss.forces_weight),
    }
    faded = [term.model_copy(update={"weight": fading(term.weight)}) for term in terms]
    return {"loss": loss.model_copy(update=truth), "terms": tuple(faded)}


def _batches_as_they_come(
    config: StudentConfig, changed: Mapping[str, object]
) -> dict[str, object]:
    """Settings under which a structure counts the same with and without a label.

    The teacher's energies and forces stand in for missing labels, so nothing is gained by drawing
    the few labelled structures more often: they would only be learnt by heart. With 5 % of the
    labels: 34 meV and 54 meV/Å against 41 and 64 with half of every batch labelled
    (benchmarks/study_h2combustion.py). What the configuration says itself stays.
    """
    loss, data = changed.get("loss", config.loss), config.data
    assert isinstance(loss, LossConfig)
    if "mean_over" not in config.loss.model_fields_set:
        loss = loss.model_copy(update={"mean_over": "batch"})
    if "labelled_share" not in data.model_fields_set:
        data = data.model_copy(update={"labelled_share": None})
    return {**changed, "loss": loss, "data": data}


def _born_again(config: StudentConfig) -> tuple[LossConfig, TermConfig]:
    def steps(column: int) -> WeightSchedule:
        points = [
            ((row[0] if row[0] > 1 else 0) / BORN_AGAIN_EPOCHS, row[column])
            for row in BORN_AGAIN_TABLE
        ]
        return WeightSchedule(kind="steps", points=tuple(points))

    return _hipnn_loss(config, steps(3), steps(2)), _hipnn_term(steps(1))


def _hipnn(config: StudentConfig) -> tuple[LossConfig, TermConfig]:
    atomic, forces, energy = (constant(weight) for weight in HIPNN_WEIGHTS)
    return _hipnn_loss(config, energy, forces), _hipnn_term(atomic)


def _hipnn_loss(
    config: StudentConfig, energy_weight: WeightSchedule, forces_weight: WeightSchedule
) -> LossConfig:
    changes = {
        "energy": "rmse+mae",
        "forces": "rmse+mae",
        "energy_weight": energy_weight,
        "forces_weight": forces_weight,
    }
    return config.loss.model_copy(update=changes)


def _hipnn_term(weight: WeightSchedule) -> TermConfig:
    return _term("atomic_energy", "atomic_energy", "rmse+mae", weight, None)


def _split(text: str) -> list[str]:
    names = [name.strip() for name in re.split(r"[+,]", text)]
    for name in names:
        if name not in STRATEGIES:
            raise ConfigError(f"Unknown strategy {name}; {did_you_mean(name, STRATEGIES)}.")
        if names.count(name) > 1:
            raise ConfigError(f"Strategy {text} names {name} twice. Give it one larger weight.")
    return names
