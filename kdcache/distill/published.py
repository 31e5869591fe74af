"""The weights that strategies were published with, by teacher, student and dataset.

Data and look-up only; what a strategy does with its weight is `strategies`'. Invariant: every
number is one of the paper's table, and a row that is not there is refused, never made up.
"""

from __future__ import annotations

from typing import NamedTuple

from kdcache.errors import ConfigError, did_you_mean


class Pair(NamedTuple):
    """Whom a published weight was tuned for, in Open Catalyst's names."""

    teacher: str
    student: str
    dataset: str


# lambda of Ekström Kelvinius et al. 2023, Table 8. They hold for that teacher's feature scale, so
# for another teacher they are a first guess.
PUBLISHED_WEIGHTS: dict[Pair, dict[str, float]] = {
    Pair("gemnet-oc", "painn", "oc20"): {
        "vanilla1": 1.0,
        "vanilla2": 500.0,
        "n2n": 10_000.0,
        "e2n": 1_000.0,
        "v2v": 50_000.0,
    },
    Pair("gemnet-oc", "painn", "coll"): {
        "vanilla1": 0.2,
        "vanilla2": 100.0,
        "n2n": 1_000.0,
        "e2n": 10.0,
        "v2v": 100.0,
    },
    Pair("gemnet-oc", "gemnet-oc-small", "oc20"): {
        "vanilla1": 0.2,
        "vanilla2": 10.0,
        "n2n": 1_000.0,
        "e2e": 100_000.0,
    },
    Pair("painn", "painn-small", "oc20"): {
        "vanilla1": 1.0,
        "vanilla2": 200.0,
        "n2n": 100.0,
        "v2v": 1_000.0,
    },
    Pair("painn", "painn-small", "coll"): {
        "vanilla1": 1.0,
        "vanilla2": 100.0,
        "n2n": 100.0,
        "v2v": 10_000.0,
    },
    Pair("painn", "schnet", "oc20"): {"vanilla1": 0.1, "vanilla2": 0.1, "n2n": 1_000.0},
    Pair("painn", "schnet", "coll"): {"vanilla1": 1.0, "vanilla2": 100.0, "n2n": 100.0},
}
DEFAULT_PAIR = Pair("painn", "painn-small", "coll")
# Whom the paper taught by each teacher, by the family of the student: its size here is another.
_STUDENTS = {
    "gemnet-oc": {"gemnet-oc": "gemnet-oc-small", "painn": "painn"},
    "painn": {"painn": "painn-small", "schnet": "schnet"},
}


def published_weight(strategy: str, pair: Pair = DEFAULT_PAIR) -> float:
    """lambda of Table 8.

    Raises:
        ConfigError: the table has no such row.

    Source: Ekström Kelvinius et al. 2023, Table 8.
    """
    weights = _row(pair, f"Give one yourself (--weight {strategy}=…).")
    if strategy not in weights:
        raise ConfigError(
            f"No published weight of {strategy} for {'/'.join(pair)}; "
            f"{did_you_mean(strategy, weights)}. Give one yourself (--weight {strategy}=…)."
        )
    return weights[strategy]


def nearest_pair(teacher: str, student: str) -> Pair:
    """The row of Table 8 that fits a teacher and a student best; it may not exist.

    Args:
        teacher: its model, as a store's manifest names it.
        student: a model or a preset; one that ends in "-oc20" or "-coll" was made for that dataset,
            any other counts as made for COLL, whose structures are small.

    Example:
        >>> "/".join(nearest_pair("gemnet-oc", "painn-small-oc20"))
        'gemnet-oc/painn/oc20'
    """
    datasets = ["coll", "oc20"]
    for dataset in datasets:
        if student.endswith(f"-{dataset}"):
            student = student.removesuffix(f"-{dataset}")
            datasets.remove(dataset)
            datasets.insert(0, dataset)
            break
    known = _STUDENTS.get(teacher, {})
    named = known.get(student.removesuffix("-small"), student)
    rows = [Pair(teacher, named, dataset) for dataset in datasets]
    return next((row for row in rows if row in PUBLISHED_WEIGHTS), rows[0])


def parse_pair(text: str) -> Pair:
    """The row of Table 8 that `teacher/student/dataset` names.

    Raises:
        ConfigError: the table has no such row.
    """
    parts = text.strip().lower().split("/")
    pair = Pair(*parts) if len(parts) == len(Pair._fields) else Pair(text, "", "")
    _row(pair, "Name one of these (--published teacher/student/dataset).", text)
    return pair


def _row(pair: Pair, way_out: str, written: str | None = None) -> dict[str, float]:
    if pair not in PUBLISHED_WEIGHTS:
        known = ["/".join(row) for row in PUBLISHED_WEIGHTS]
        wanted = written or "/".join(pair)
        raise ConfigError(
            f"No published weights for {wanted}; {did_you_mean(wanted, known)}. {way_out}"
        )
    return PUBLISHED_WEIGHTS[pair]
