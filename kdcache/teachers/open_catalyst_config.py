"""Hyperparameters of ours from the constructor arguments of Open Catalyst models, and back.

Invariant: every argument is either translated, known to change nothing in what a trained model
computes, or refused by name; sizes are never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.errors import TeacherError, did_you_mean
from kdcache.models import Model

# No published SchNet names it: 50 in periodic searches, torch-cluster's 32 in others.
SCHNET_NEIGHBORS = {True: 50, False: 32}
# Of data, files, training and distillation; `use_pbc` gives way to the pbc of the structures.
WITHOUT_EFFECT = (
    "num_atoms", "bond_feat_dim", "otf_graph", "scale_file", "use_distill", "id_mapping",
    "teacher_node_dim", "teacher_edge_dim", "distill_layer_code", "distill_reduce",
    "projection_head", "force_linear_n2n", "num_elements", "output_init", "use_pbc", "name",
)  # fmt: skip
SCHNET_SIZES = ("hidden_channels", "num_filters", "num_interactions", "num_gaussians", "cutoff")
PAINN_SIZES = ("hidden_channels", "num_layers", "num_rbf", "cutoff")
GEMNET_SIZES = (
    "num_spherical", "num_radial", "num_blocks", "emb_size_atom", "emb_size_edge",
    "emb_size_trip_in", "emb_size_trip_out", "emb_size_quad_in", "emb_size_quad_out",
    "emb_size_aint_in", "emb_size_aint_out", "emb_size_rbf", "emb_size_cbf", "emb_size_sbf",
    "num_before_skip", "num_after_skip", "num_concat", "num_atom", "num_output_afteratom",
    "num_atom_emb_layers", "num_global_out_layers", "cutoff",
)  # fmt: skip
GEMNET_CUTOFFS = ("cutoff_qint", "cutoff_aeaint", "cutoff_aint")
GEMNET_LIMITS = ("max_neighbors_qint", "max_neighbors_aeaint", "max_neighbors_aint")
GEMNET_SWITCHES = (
    "quad_interaction", "atom_edge_interaction", "edge_atom_interaction", "atom_interaction",
    "direct_forces",
)  # fmt: skip
# Of the time before training; the weights hold what became of them.
NOT_WRITTEN = ("output_init", "scale_factors")
OPEN_CATALYST_NAMES = {"schnet": "schnet", "painn": "painn", "gemnet-oc": "gemnet_oc"}


class Arguments:
    """Constructor arguments, taken out one by one; what is left at the end is unknown.

    Args:
        values: by name.
        where: file and model, for errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._left = dict(values)
        self._where = where

    def take(self, name: str) -> Any:
        """An argument that must be there."""
        if name not in self._left:
            raise TeacherError(
                f"{self._where} does not say {name}, and weights alone do not tell it. Give the "
                "configuration the model was trained with (--teacher-config)."
            )
        return self.get(name, None)

    def get(self, name: str, default: Any) -> Any:
        """An argument, or the published code's default."""
        return self._left.pop(name, default)

    def limit(self, name: str) -> int | None:
        """A number of neighbours; 0 and less are none, as there."""
        value = self.get(name, None)
        return value if value is None or int(value) > 0 else None

    def choice(
        self,
        name: str,
        default: str | None,
        *,
        further: Sequence[str] = (),
        required: bool = False,
    ) -> dict[str, Any]:
        """The values of an argument like {name: gaussian}."""
        written = self.take(name) if required else self.get(name, None)
        if written is None:
            written = {"name": default}
        values = {"name": written} if isinstance(written, str) else dict(written)
        unknown = [key for key in values if key not in ("name", *further)]
        if unknown:
            self._refuse(f"{name}.{unknown[0]}", values[unknown[0]])
        return values

    def only(self, name: str, *accepted: Any) -> None:
        """An argument of which a single behaviour is known here; the first is the default."""
        value = self.get(name, accepted[0])
        if value not in accepted:
            self._refuse(name, value)

    def finish(self) -> None:
        """Refuse what nobody took."""
        for name in WITHOUT_EFFECT:
            self._left.pop(name, None)
        for name, value in self._left.items():
            self._refuse(name, value)

    def _refuse(self, name: str, value: Any) -> None:
        raise TeacherError(
            f"{self._where} has {name} = {value!r}, which is not supported here: its features "
            "would differ from the trained model's."
        )


def hyperparameters_from(
    name: str, arguments: Mapping[str, Any], num_elements: int, where: str
) -> dict[str, Any]:
    """What `build_model` takes for an Open Catalyst model.

    Args:
        name: schnet, painn or gemnet_oc.
        arguments: of its constructor, `config.model_attributes` of a checkpoint.
        num_elements: rows of the weights' atom embedding.
        where: file, for errors.

    Raises:
        TeacherError: another model, a size that is missing, or an argument that is not supported.
    """
    translators = {"schnet": _schnet, "painn": _painn, "gemnet_oc": _gemnet}
    if name not in translators:
        raise TeacherError(
            f"{where} is of the model {name!r}, which is not supported: "
            f"{did_you_mean(name, translators)}."
        )
    taken = Arguments(arguments, f"{where}, {name}")
    taken.only("regress_forces", True)
    taken.only("num_targets", 1)
    values = translators[name](taken)
    taken.finish()
    if name != "schnet":
        values["num_elements"] = num_elements
    return values


def _schnet(taken: Arguments) -> dict[str, Any]:
    taken.only("readout", "add")
    periodic = bool(taken.get("use_pbc", True))
    sizes = {name: taken.take(name) for name in SCHNET_SIZES}
    return {"name": "schnet", **sizes, "max_neighbors": SCHNET_NEIGHBORS[periodic]}


def _painn(taken: Arguments) -> dict[str, Any]:
    # The published gradient differentiates features instead of the energy.
    taken.only("direct_forces", True)
    return {
        "name": "painn",
        **{name: taken.take(name) for name in PAINN_SIZES},
        "max_neighbors": taken.limit("max_neighbors"),
        **_radial(taken),
    }


def _gemnet(taken: Arguments) -> dict[str, Any]:
    taken.only("activation", "silu", "swish")
    taken.only("enforce_max_neighbors_strictly", True)
    switches = {name: bool(taken.take(name)) for name in GEMNET_SWITCHES}
    quads = switches["quad_interaction"]
    return {
        "name": "gemnet-oc",
        **{name: taken.take(name) for name in GEMNET_SIZES},
        **switches,
        **{name: taken.get(name, None) for name in GEMNET_CUTOFFS},
        "max_neighbors": taken.limit("max_neighbors"),
        **{name: taken.limit(name) for name in GEMNET_LIMITS},
        **_radial(taken),
        "rbf_spherical": taken.choice("rbf_spherical", None)["name"],
        "cbf": taken.choice("cbf", "spherical_harmonics")["name"],
        # Bases of the same number of functions: weights of one would fit the other.
        "sbf": taken.choice("sbf", "legendre_outer", required=quads)["name"],
        "scale_basis": bool(taken.get("scale_basis", False)),
        "forces_coupled": bool(taken.get("forces_coupled", False)),
        "extensive": bool(taken.get("extensive", True)),
        "qint_tags": tuple(taken.take("qint_tags") if quads else taken.get("qint_tags", (1, 2))),
    }


def _radial(taken: Arguments) -> dict[str, Any]:
    envelope = taken.choice("envelope", "polynomial", further=["exponent"])
    return {
        "rbf": taken.choice("rbf", "gaussian")["name"],
        "envelope": envelope["name"],
        "envelope_exponent": envelope.get("exponent", 5),
    }


def arguments_from(model: Model) -> tuple[str, dict[str, Any]]:
    """Name and constructor arguments of a model in the words of Open Catalyst.

    Raises:
        TeacherError: it has no counterpart there.
    """
    if model.name not in OPEN_CATALYST_NAMES:
        raise TeacherError(
            f"Open Catalyst has no model {model.name}: "
            f"{did_you_mean(model.name, OPEN_CATALYST_NAMES)}."
        )
    values = model.hyperparameters.model_dump()
    for name in NOT_WRITTEN:
        values.pop(name, None)
    if model.name == "schnet":
        limit = values.pop("max_neighbors")
        if limit not in SCHNET_NEIGHBORS.values():
            raise TeacherError(
                f"Open Catalyst's SchNet keeps 50 neighbours, or 32 without pbc; this one keeps "
                f"{limit}, and its features would change. It cannot be written in that layout."
            )
        values["use_pbc"] = limit == SCHNET_NEIGHBORS[True]
        return "schnet", {"regress_forces": True, **values}
    if model.name == "painn" and not values["direct_forces"]:
        raise TeacherError("Open Catalyst's PaiNN has no forces by gradient: it cannot be written.")
    values["envelope"] = {"name": values["envelope"], "exponent": values.pop("envelope_exponent")}
    for name in ("rbf", "rbf_spherical", "cbf", "sbf"):
        if values.get(name) is not None:
            values[name] = {"name": values[name]}
    if "qint_tags" in values:
        values["qint_tags"] = list(values["qint_tags"])
    if values.get("max_neighbors", 1) is None:
        values["max_neighbors"] = 0
    return OPEN_CATALYST_NAMES[model.name], {"regress_forces": True, "use_pbc": True, **values}
