"""Terms: bound with checks, weighted by the step, judged by the paper's equations written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kdcache.config import StudentConfig
from kdcache.distill.binding import build_terms, required_fields
from kdcache.distill.losses import GroundTruthLoss
from kdcache.distill.schedules import Clock
from kdcache.distill.strategies import apply_strategy
from kdcache.errors import ConfigError, ShapeError
from kdcache.fields import FieldSpec
from tests.distill.fields import LINEAR, N_ATOMS, bind, make_batch, make_output, rows, term


@pytest.mark.proof
@pytest.mark.parametrize("strategy", ["n2n", "v2v", "vanilla1", "vanilla2", "n2n+v2v"])
def test_equations_2_to_8_written_out(strategy: str) -> None:
    """Ekström Kelvinius et al. 2023, section 3, term by term with explicit loops."""
    weight = 7.0
    base = StudentConfig.model_validate({"loss": {"energy_weight": 3, "forces_weight": 50}})
    config = apply_strategy(base, strategy, weights=dict.fromkeys(strategy.split("+"), weight))
    terms = bind(*config.terms)
    batch, output = make_batch(), make_output()
    assert batch.energy is not None
    assert batch.forces is not None
    teacher = {key.removeprefix("a/"): value for key, value in batch.teacher.items()}
    student = {**output.features}

    def force_error(forces: torch.Tensor) -> torch.Tensor:
        lengths = [((output.forces[i] - forces[i]) ** 2).sum() ** 0.5 for i in range(N_ATOMS)]
        return sum(lengths, torch.zeros(())) / N_ATOMS

    def energy_error(energy: torch.Tensor) -> torch.Tensor:
        return sum(abs(output.energy[s] - energy[s]) for s in range(3)) / 3

    def feature_error(name: str) -> torch.Tensor:
        """Eqs. 3 and 4: MSE between W H_s + b and H_t; no b for vectors."""
        module = next(t for t in terms._bound() if t.settings.student == name)
        projection = module.student_projection
        bias = 0 if projection.bias is None else projection.bias
        total, count = torch.zeros(()), 0
        for i in range(N_ATOMS):
            ours, theirs = student[name][i], teacher[name][i]
            axes = [(ours, theirs)] if ours.dim() == 1 else list(zip(ours, theirs, strict=True))
            for own, other in axes:
                mapped = projection.weight @ own + bias
                total = total + ((mapped - other) ** 2).sum()
                count += len(other)
        return total / count

    l0 = 3 * energy_error(batch.energy) + 50 * force_error(batch.forces)  # Eq. 1
    l_kd = {
        "n2n": lambda: feature_error("node"),
        "v2v": lambda: feature_error("vector"),
        "vanilla1": lambda: (  # Eq. 7
            3 * energy_error(teacher["energy"]) + 50 * force_error(teacher["forces"])
        ),
        "vanilla2": lambda: (  # Eq. 8
            sum(abs(output.atomic_energy[i] - teacher["atomic_energy"][i]) for i in range(N_ATOMS))
            / N_ATOMS
        ),
    }
    judged = l0 + sum(weight * l_kd[name]() for name in strategy.split("+"))  # Eq. 2
    loss = GroundTruthLoss(config.loss, Clock(10))(output, batch, 0) + terms(output, batch, 0)
    torch.testing.assert_close(loss.total, judged, rtol=1e-12, atol=0)
    leaves = [output.energy, output.forces, output.atomic_energy, *output.features.values()]
    for ours, theirs in zip(
        torch.autograd.grad(loss.total, leaves, retain_graph=True, allow_unused=True),
        torch.autograd.grad(judged, leaves, allow_unused=True),
        strict=True,
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_another_order_of_atoms_on_both_sides_changes_nothing() -> None:
    terms = bind(term(student_projection=LINEAR), term("y", "vector", student_projection=LINEAR))
    batch, output = make_batch(), make_output()
    order = torch.tensor([0, 2, 1, 4, 5, 3])  # a 3-cycle in the last structure: not its own inverse
    permuted = replace(output, features={k: v[order] for k, v in output.features.items()})
    teacher = {k: v[order] if len(v) == N_ATOMS else v for k, v in batch.teacher.items()}
    before = terms(output, batch, 0).total
    torch.testing.assert_close(terms(permuted, replace(batch, teacher=teacher), 0).total, before)
    mixed = terms(permuted, batch, 0).total
    assert not torch.isclose(mixed, before)


def test_rotating_both_sides_changes_nothing() -> None:
    terms = bind(
        term("v", "vector", student_projection=LINEAR, loss="l2mae"),
        term("f", "forces", loss="rmse+mae"),
        term("g", "forces", loss="l2mae"),
    )
    rotation, _ = torch.linalg.qr(rows(3, 3, seed=8))
    batch, output = make_batch(), make_output()

    def turn(vectors: torch.Tensor) -> torch.Tensor:
        return torch.einsum("xy,ny...->nx...", rotation, vectors)

    turned_output = replace(
        output,
        forces=turn(output.forces),
        features={"vector": turn(output.features["vector"])},
    )
    teacher = {k: turn(batch.teacher[k]) for k in ("a/vector", "a/forces")}
    parts = terms(output, batch, 0).parts
    turned = terms(turned_output, replace(batch, teacher=teacher), 0).parts
    for name in ("v", "g"):
        torch.testing.assert_close(turned[name], parts[name])
    # The mean over components is no rotation invariant, so equality above is not for free.
    assert not torch.isclose(turned["f"], parts["f"])


def test_half_precision_targets_give_the_loss_of_their_values() -> None:
    terms = bind(term(student_projection=LINEAR))
    batch, output = make_batch(), make_output()
    half = {key: value.half() for key, value in batch.teacher.items()}
    same = {key: value.double() for key, value in half.items()}
    in_half = terms(output, replace(batch, teacher=half), 0).total
    assert in_half == terms(output, replace(batch, teacher=same), 0).total
    assert in_half.dtype == torch.float64


def test_terms_work_on_a_student_under_autocast() -> None:
    terms = bind(term(student_projection=LINEAR), term("y", "energy", loss="mae")).float()
    batch, output = make_batch(torch.float32), make_output(torch.float32)
    features = {k: v.bfloat16() for k, v in output.features.items()}
    outside = terms(replace(output, features=features), batch, 0).total
    with torch.autocast("cpu", torch.bfloat16):
        inside = terms(replace(output, features=features), batch, 0).total
    assert outside.dtype == inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=0.02, atol=0)


def test_rms_divides_both_sides_and_is_kept_in_the_state() -> None:
    batch, output = make_batch(), make_output()
    plain = bind(term("e", "atomic_energy"))(output, batch, 0).total
    terms = bind(term("e", "atomic_energy", normalise="rms"), rms={"a/atomic_energy": 4.0})
    torch.testing.assert_close(terms(output, batch, 0).total, plain / 16)
    assert terms.state_dict()["terms.0.rms"] == 4.0


def test_per_atom_divides_both_energies() -> None:
    batch, output = make_batch(), make_output()
    value = bind(term("e", "energy", per_atom=True, loss="mae"))(output, batch, 0).total
    counts = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    judged = ((output.energy - batch.teacher["a/energy"]) / counts).abs().mean()
    torch.testing.assert_close(value, judged)


def test_two_teachers_are_told_apart_by_name() -> None:
    terms = [
        term("one", "energy", teacher_name="a"),
        term("two", "energy", teacher_name="b"),
        term("never", "forces", teacher_name="b", weight=0),
    ]
    assert required_fields(terms, ["a", "b"]) == ("a/energy", "b/energy")
    bound = bind(*terms, teachers="ab")
    assert bound.required_fields == ("a/energy", "b/energy")
    batch, output = make_batch(), make_output()
    parts = bound(output, batch, 0).parts
    assert list(parts) == ["one", "two"]
    for name, key in (("one", "a/energy"), ("two", "b/energy")):
        torch.testing.assert_close(parts[name], (output.energy - batch.teacher[key]).pow(2).mean())


def test_a_term_of_weight_zero_is_not_computed_at_that_step() -> None:
    fading = {"kind": "linear", "points": [[0, 2], [0.5, 0]]}
    terms = bind(term("e", "energy", weight=fading))
    batch, output = make_batch(), make_output()
    first = terms(output, batch, 0)
    torch.testing.assert_close(first.total, 2 * first.parts["e"])
    late = terms(output, replace(batch, teacher={}), 5)
    assert late.parts == {}
    assert late.total == 0


def test_no_terms_is_the_control() -> None:
    terms = bind()
    assert len(terms) == 0
    assert terms(make_output(), make_batch(), 0).total == 0


@pytest.mark.parametrize("loss", ["mae", "cka"])
def test_edges_that_the_teacher_lacks_train_no_map_of_its_side(loss: str) -> None:
    edge = FieldSpec("edge", "edge", (4,))
    trained = {"kind": "mlp", "trained": True}
    settings = term("e", "edge", loss=loss, teacher_projection=trained)
    terms = build_terms(
        [settings],
        student_fields=[edge],
        teacher_fields={"a": {"edge": edge}},
        clock=Clock(1),
        seed=0,
    ).double()
    batch, output = make_batch(), make_output()
    edge_index = torch.tensor([[1, 2, 3, 4, 5], [2, 1, 4, 5, 3]])
    batch = replace(batch, edge_index=edge_index, edge_shift=torch.zeros(5, 3).double())
    ours = rows(5, 4, seed=70).requires_grad_()
    theirs = rows(5, 4, seed=71)
    lacking = theirs.clone()
    lacking[[0, 3]] = torch.nan

    def loss_of(feature: torch.Tensor, field: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        shown = replace(batch, edge_index=index, teacher={"a/edge": field})
        return terms(replace(output, features={"edge": feature}), shown, 0).total

    present = torch.tensor([1, 2, 4])
    value = loss_of(ours, lacking, edge_index)
    alone = loss_of(ours[present], theirs[present], edge_index[:, present])
    torch.testing.assert_close(value, alone, rtol=1e-12, atol=0)
    leaves = [ours, *terms.parameters()]
    gradients = torch.autograd.grad(value, leaves, retain_graph=True)
    for one, other in zip(gradients, torch.autograd.grad(alone, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
    assert not gradients[0][[0, 3]].any()
    none = loss_of(ours, torch.full_like(theirs, torch.nan), edge_index)
    assert none.item() == 0.0


def test_a_trained_map_on_the_teachers_side_gets_gradients() -> None:
    trained = {"kind": "linear", "trained": True}
    terms = bind(term(teacher_projection=trained))
    terms(make_output(), make_batch(), 0).total.backward()
    assert [name for name, _ in terms.named_parameters()] == [
        "terms.0.teacher_projection.weight", "terms.0.teacher_projection.bias",
    ]  # fmt: skip
    assert all(p.grad is not None and p.grad.any() for p in terms.parameters())


def test_a_batch_of_other_rows_is_refused() -> None:
    batch, output = make_batch(), make_output()
    batch.teacher["a/energy"] = batch.teacher["a/energy"][:2]
    with pytest.raises(ShapeError, match=r"Term e: student has \[3\], target \[2\]"):
        bind(term("e", "energy"))(output, batch, 0)
    with pytest.raises(ConfigError, match="the batch lacks a/energy"):
        bind(term("e", "energy"))(output, replace(batch, teacher={}), 0)
