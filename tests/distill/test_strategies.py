"""Strategies by name: the terms they make, and the tables they are taken from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kdcache.config import StudentConfig, dump_config, load_config
from kdcache.distill.published import (
    DEFAULT_PAIR,
    PUBLISHED_WEIGHTS,
    Pair,
    nearest_pair,
    parse_pair,
    published_weight,
)
from kdcache.distill.schedules import Clock, weight_at
from kdcache.distill.strategies import BORN_AGAIN_EPOCHS, STRATEGIES, apply_strategy
from kdcache.errors import ConfigError

DEFAULT = StudentConfig()
# Strategies on edges need a teacher that has some.
PAIR_WITH = {
    "e2n": Pair("gemnet-oc", "painn", "coll"),
    "e2e": Pair("gemnet-oc", "gemnet-oc-small", "oc20"),
}


def names(strategy: str) -> list[str]:
    return [term.name for term in apply_strategy(DEFAULT, strategy).terms]


@pytest.mark.proof
def test_published_weights_are_table_8(shared: Path) -> None:
    """Every row of Ekström Kelvinius et al. 2023, Table 8, read from the paper's text."""
    paper = (shared / "papers" / "kd-molecular-gnns-neurips2023.txt").read_text()
    table = paper[paper.index("Table 8: Choice") :]
    row = re.compile(
        r"^(GemNet-OC|PaiNN) (\S+) (Vanilla \([12]\)|n2n|e2n|e2e|v2v) (\S+) (\S+)$", re.MULTILINE
    )
    printed: dict[Pair, dict[str, float]] = {}
    for teacher, student, protocol, *values in row.findall(table[: table.index(" B Full")]):
        name = protocol.lower().replace(" (", "").replace(")", "")
        for dataset, value in zip(("oc20", "coll"), values, strict=True):
            if value != "-":
                pair = Pair(teacher.lower(), student.lower(), dataset)
                printed.setdefault(pair, {})[name] = float(value)
    assert printed == PUBLISHED_WEIGHTS


def test_with_the_teachers_labels_all_structures_count_the_same_unless_told_otherwise() -> None:
    config = apply_strategy(DEFAULT, "vanilla1+v2v")
    assert config.data.labelled_share is None
    assert config.loss.mean_over == "batch"
    given = load_config(overrides=["data.labelled_share=0.3", "loss.mean_over=labelled"])
    kept = apply_strategy(given, "vanilla1")
    assert (kept.data.labelled_share, kept.loss.mean_over) == (0.3, "labelled")
    assert apply_strategy(DEFAULT, "n2n").data == DEFAULT.data


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_a_configuration_that_reads_back(
    strategy: str, tmp_path: Path
) -> None:
    config = apply_strategy(DEFAULT, strategy, pair=PAIR_WITH.get(strategy, DEFAULT_PAIR))
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert bool(config.terms) == (strategy != "control")


def test_combinations_join_by_plus_or_comma() -> None:
    assert names("n2n+v2v") == names("n2n, v2v") == ["n2n", "v2v"]
    assert names("vanilla1") == ["vanilla1_energy", "vanilla1_forces"]


def test_weights_come_from_the_table_or_from_the_caller() -> None:
    pair = Pair("painn", "schnet", "oc20")
    first, second = apply_strategy(
        DEFAULT, "n2n+vanilla2", pair=pair, weights={"vanilla2": 5.0}, teacher_name="t"
    ).terms
    assert (first.weight.points, second.weight.points) == (((0.0, 1000.0),), ((0.0, 5.0),))
    assert {first.teacher_name, second.teacher_name} == {"t"}


@pytest.mark.parametrize("pair", PUBLISHED_WEIGHTS, ids="/".join)
def test_every_row_of_the_table_is_reached_by_its_names(pair: Pair) -> None:
    assert parse_pair("/".join(pair)) == pair
    assert nearest_pair(pair.teacher, f"{pair.student}-{pair.dataset}") == pair
    for strategy, weight in PUBLISHED_WEIGHTS[pair].items():
        terms = apply_strategy(DEFAULT, strategy, pair=pair).terms
        assert terms[-1].weight.points[0][1] in (weight, 100 * weight)  # vanilla 1: alpha_F too


@pytest.mark.parametrize(
    ("teacher", "student", "row"),
    [
        ("gemnet-oc", "painn-small", "gemnet-oc/painn/coll"),
        ("gemnet-oc", "painn-small-oc20", "gemnet-oc/painn/oc20"),
        ("gemnet-oc", "gemnet-oc", "gemnet-oc/gemnet-oc-small/oc20"),
        ("gemnet-oc", "gemnet-oc-small-coll", "gemnet-oc/gemnet-oc-small/oc20"),
        ("painn", "painn", "painn/painn-small/coll"),
        ("painn", "schnet-oc20", "painn/schnet/oc20"),
        ("schnet", "painn", "schnet/painn/coll"),
    ],
)
def test_the_nearest_row_is_of_the_same_kind_of_student(
    teacher: str, student: str, row: str
) -> None:
    assert "/".join(nearest_pair(teacher, student)) == row


@pytest.mark.parametrize(
    ("strategy", "student", "teacher"),
    [("n2n", "node", "node"), ("e2e", "edge", "edge"), ("e2n", "node", "edge_to_node"),
     ("v2v", "vector", "vector")],
)  # fmt: skip
def test_features_are_compared_through_a_linear_map_of_the_students(
    strategy: str, student: str, teacher: str
) -> None:
    """Eq. 4, on the features that section 3 names."""
    (term,) = apply_strategy(DEFAULT, strategy, weights={strategy: 1.0}).terms
    assert (term.name, term.student, term.teacher) == (strategy, student, teacher)
    assert (term.loss, term.student_projection.kind) == ("mse", "linear")
    assert term.teacher_projection.kind == "identity"


def test_v2v_learns_vectors_of_edges_where_the_teacher_has_none_of_its_own() -> None:
    def taught(*fields: str) -> str:
        config = apply_strategy(DEFAULT, "n2n+v2v", teacher_fields=fields)
        return config.terms[1].teacher

    assert taught("node", "vector", "edge_to_vector") == "vector"
    assert taught("node", "edge_to_vector") == taught("node") == "edge_to_vector"


def test_strategies_on_edges_join_others_under_the_weights_of_their_row() -> None:
    pair = Pair("gemnet-oc", "painn", "oc20")
    terms = apply_strategy(DEFAULT, "n2n,e2n,v2v", pair=pair, teacher_fields=["node"]).terms
    assert [term.weight.points[0][1] for term in terms] == [10_000, 1_000, 50_000]
    annealed = apply_strategy(DEFAULT, "annealed", pair=pair, teacher_fields=["node"]).terms
    assert [term.teacher for term in annealed] == ["node", "edge_to_vector", "atomic_energy"]


def test_vanilla1_repeats_the_ground_truth_loss_whatever_its_schedule() -> None:
    """Eq. 7 has the alphas, the losses and the per-atom division of Eq. 1."""
    ramp = {"kind": "linear", "points": [[0, 1], [1, 3]]}
    base = StudentConfig.model_validate(
        {"loss": {"energy": "huber", "forces": "mse", "energy_weight": ramp,
                  "forces_weight": 20, "energy_per_atom": True}}
    )  # fmt: skip
    energy, forces = apply_strategy(base, "vanilla1", weights={"vanilla1": 0.5}).terms
    clock = Clock(10)
    assert [weight_at(energy.weight, step, clock) for step in (0, 5)] == [0.5, 1.0]
    assert weight_at(forces.weight, 3, clock) == 10
    assert (energy.loss, energy.per_atom, forces.loss, forces.per_atom) == (
        "huber", True, "mse", False,
    )  # fmt: skip


@pytest.mark.proof
@pytest.mark.parametrize(
    ("epoch", "atomic", "forces", "energy"),
    [
        (1, 200, 75, 0.0),
        (199, 200, 75, 0.0),
        (200, 160, 63, 0.2),
        (250, 120, 51, 0.4),
        (300, 80, 39, 0.6),
        (350, 40, 27, 0.8),
        (400, 0, 15, 1.0),
        (449, 0, 15, 1.0),
    ],
)
def test_born_again_is_table_1(epoch: int, atomic: float, forces: float, energy: float) -> None:
    """Matin et al. 2025, Table 1, for a training of 10 steps an epoch."""
    config = apply_strategy(DEFAULT, "born-again")
    clock = Clock(10 * BORN_AGAIN_EPOCHS)
    (term,) = config.terms
    schedules = (term.weight, config.loss.forces_weight, config.loss.energy_weight)
    weights = [weight_at(schedule, 10 * epoch, clock) for schedule in schedules]
    assert weights == [atomic, forces, energy]
    assert {term.loss, config.loss.energy, config.loss.forces} == {"rmse+mae"}
    assert (term.student, term.teacher) == ("atomic_energy", "atomic_energy")


def test_annealed_ends_with_the_ground_truth_alone() -> None:
    config = apply_strategy(DEFAULT, "annealed:n2n+vanilla1")
    clock = Clock(100)
    starts = [weight_at(term.weight, 0, clock) for term in config.terms]
    assert starts == [published_weight("n2n"), 1.0, 100.0]
    assert [weight_at(term.weight, 99, clock) for term in config.terms] == [0, 0, 0]
    forces = config.loss.forces_weight
    assert weight_at(forces, 0, clock) < weight_at(forces, 50, clock) < 100
    assert weight_at(forces, 99, clock) == 100
    assert names("annealed") == ["n2n", "v2v", "vanilla2"]


@pytest.mark.parametrize(
    ("strategy", "weights", "message"),
    [
        ("n2m", {}, "Unknown strategy n2m; did you mean n2n"),
        ("n2n+born-again", {}, "born-again stands alone"),
        ("annealed:control", {}, "control stands alone"),
        ("annealed:hipnn", {}, "hipnn stands alone"),
        ("n2n", {"v2v": 1.0}, "A weight for v2v is given, but strategy n2n has no such part"),
        ("n2n+n2n", {}, "names n2n twice"),
    ],
)
def test_strategies_that_make_no_sense_are_refused(
    strategy: str, weights: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_strategy(DEFAULT, strategy, weights=weights)


def test_annealing_weights_that_already_move_is_refused() -> None:
    moving = apply_strategy(DEFAULT, "born-again")
    with pytest.raises(ConfigError, match="as plain numbers"):
        apply_strategy(moving, "annealed")


def test_a_weight_the_table_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="No published weight of v2v for painn/schnet/coll"):
        apply_strategy(DEFAULT, "v2v", pair=Pair("painn", "schnet", "coll"))
    with pytest.raises(ConfigError, match="did you mean painn/schnet/coll"):
        published_weight("n2n", Pair("painn", "schnet", "cool"))


@pytest.mark.parametrize("text", ["gemnet-oc/painn", "gemnet-oc/painn/coal", "a/b/c/d", ""])
def test_a_row_that_is_not_in_the_table_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"No published weights for .*known: gemnet-oc/gemnet"):
        parse_pair(text)
