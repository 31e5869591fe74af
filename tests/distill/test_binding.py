"""Terms bound to fields: every mismatch is refused, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch

from kdcache.distill.binding import build_terms, required_fields, student_features, student_taps
from kdcache.distill.schedules import Clock
from kdcache.errors import ConfigError
from kdcache.fields import FieldSpec
from kdcache.taps import Tap
from tests.distill.fields import LINEAR, TEACHER, bind, make_batch, make_output, term


def test_further_terms_leave_projections_and_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    alone = bind(term("n2n", student_projection=LINEAR))
    several = bind(
        term("v2v", "vector", student_projection=LINEAR), term("n2n", student_projection=LINEAR)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    weight = alone.get_parameter("terms.0.student_projection.weight")
    assert torch.equal(several.get_parameter("terms.1.student_projection.weight"), weight)
    namesake = bind(term("other", student_projection=LINEAR))
    assert not torch.equal(namesake.get_parameter("terms.0.student_projection.weight"), weight)
    other = bind(term("n2n", student_projection=LINEAR), seed=1)
    assert not torch.equal(other.get_parameter("terms.0.student_projection.weight"), weight)


def test_required_fields_and_student_features_are_listed_once() -> None:
    terms = [term("p"), term("q", loss="mae"), term("r", "energy"), term("s", "vector")]
    assert required_fields(terms, ["only"]) == ("only/node", "only/energy", "only/vector")
    assert student_features(terms) == ("node", "vector")


@pytest.mark.parametrize(
    ("settings", "teachers", "message"),
    [
        ({"student": "nodes"}, "a", "student has no nodes; did you mean node.*written as a tap"),
        ({"teacher": "vectors"}, "a", "teacher a has no field vectors; did you mean vector"),
        ({"teacher": "vector"}, "a", "symmetry invariant, teacher vector vector"),
        ({"teacher": "energy"}, "a", "level atom, teacher energy structure"),
        ({}, "a", "has 4 channels, the teacher's 6; identity"),
        ({"student_projection": LINEAR}, "ab", "names no teacher, and the store has teachers a, b"),
        ({"student_projection": LINEAR}, "", "names no teacher, and the store has no teacher"),
        ({"teacher_name": "c"}, "ab", "no teacher c"),
        ({"student_projection": LINEAR, "loss": "hubert"}, "a", "did you mean huber"),
        ({"student_projection": LINEAR, "loss": "l2mae"}, "a", "l2mae measures vector features"),
        ({"student_projection": LINEAR, "loss": "geometric"}, "a", "geometric measures vector"),
        ({"student": "energy", "teacher": "energy", "loss": "gsp"}, "a",
         "gsp measures features of level atom, energy has one row per structure"),
        ({"student": "node/x="}, "a", "not written kind/name=path"),
        ({"student": "node/x=y"}, "a", "student has no node_x"),
        ({"student_projection": LINEAR, "normalise": "rms"}, "a", "a/node, got None"),
        ({"student_projection": LINEAR, "per_atom": True}, "a", "has 4 per atom"),
        ({"student_projection": {"kind": "linear", "bias": True}, "student": "vector",
          "teacher": "vector"}, "a", "bias on vectors"),
        ({"student": "atomic_energy"}, "a", r"rows of \[\], teacher node of \[6\]"),
        ({"student": "forces", "teacher": "forces", "student_projection": LINEAR}, "a",
         "only rows of one shape"),
    ],
)  # fmt: skip
def test_fields_that_cannot_be_compared_are_refused(
    settings: dict[str, object], teachers: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bind(term(**{"student": "node", "teacher": "node", **settings}), teachers=teachers)


def test_frozen_teacher_map_brings_its_width_to_the_students() -> None:
    terms = bind(term(teacher_projection=LINEAR))
    value = terms(make_output(), make_batch(), 0).total
    assert value > 0
    assert not list(terms.parameters())


def test_a_tap_is_compared_under_the_name_of_its_field() -> None:
    text = "node/msg2=message_layers.2"
    settings = [
        term("x", text, teacher="node"), term("y", text, teacher="node"), term("z", "vector"),
    ]  # fmt: skip
    assert student_taps(settings) == (Tap("node", "msg2", "message_layers.2"),)
    assert student_features(settings) == ("node_msg2", "vector")
    terms = build_terms(
        settings[:1],
        student_fields=[FieldSpec("node_msg2", "atom", (6,))],
        teacher_fields={"a": TEACHER},
        clock=Clock(1),
        seed=0,
    )
    batch, output = make_batch(), make_output()
    output.features["node_msg2"] = batch.teacher["a/node"]
    assert terms(output, batch, 0).total == 0
