"""Checkpoints of the Open Catalyst trainer as teachers, and ours in its layout.

Owns what is in such a file: prefixes, averaged weights, normalizers and the three homes of scale
factors. Reading .pt files is `torch_files`', arguments are `open_catalyst_config`'s.
Invariant: energies come out in eV and forces in eV/Å, and no factor is missing or guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.config import read_yaml
from kdcache.errors import TeacherError, did_you_mean
from kdcache.models import Model, build_model
from kdcache.models.potential import Normalizer, Potential
from kdcache.models.taps import Tap
from kdcache.models.weights import EXTRAS, load_weights
from kdcache.teachers.native import NativeTeacher
from kdcache.teachers.open_catalyst_config import arguments_from, hyperparameters_from
from kdcache.teachers.torch_files import read_torch_file

SCALE = ".scale_factor"
# Two homes of one factor may differ in the last digit of a text.
SAME_SCALE = 1e-5


def load_open_catalyst(
    path: str,
    *,
    device: str,
    dtype: torch.dtype,
    taps: Sequence[Tap] = (),
    scale_file: str | None = None,
    config_file: str | None = None,
    allow_pickle: bool = False,
) -> NativeTeacher:
    """A teacher from an Open Catalyst checkpoint of SchNet, PaiNN or GemNet-OC.

    Args:
        path: checkpoint.pt or best_checkpoint.pt of that trainer, or a published file.
        device: where it computes.
        dtype: floating dtype it computes in.
        taps: inner modules to store as well.
        scale_file, config_file, allow_pickle: as for `read_open_catalyst`.

    Raises:
        TeacherError: as `read_open_catalyst` says.
        ConfigError: a tap names no module, or one that gives no such feature.
    """
    potential = read_open_catalyst(
        path, scale_file=scale_file, config_file=config_file, allow_pickle=allow_pickle
    )
    return NativeTeacher(potential.to(device, dtype).eval(), taps)


def read_open_catalyst(
    path: str | Path,
    *,
    scale_file: str | Path | None = None,
    config_file: str | Path | None = None,
    allow_pickle: bool = False,
) -> Potential:
    """The model of an Open Catalyst checkpoint, with its units, in the precision of its weights.

    Weights averaged over training (`ema`) are taken where a file holds both: those are what the
    trainer evaluates. Energies are the normalizer's std times the output plus its mean, per
    structure, in eV; forces its std times the output, in eV/Å. There are no reference energies.

    Args:
        path: the checkpoint; the model comes in eval mode, on the CPU.
        scale_file: scale factors by module, .pt or .json, where the checkpoint has none.
        config_file: YAML or JSON of the trainer (or its `model` part), where the checkpoint does
            not say what it is of.
        allow_pickle: read checkpoints that torch's restricted loader refuses.

    Raises:
        TeacherError: damaged, of an unsupported model or option, or without its scale factors.
        ConfigError, ShapeError: weights that do not fit the configuration.
    """
    path = Path(path)
    checkpoint = read_torch_file(path, allow_pickle=allow_pickle)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise TeacherError(
            f"{path} holds no 'state_dict', so it is no Open Catalyst checkpoint. "
            "Name checkpoint.pt or best_checkpoint.pt of that trainer."
        )
    tensors = {_bare(name): value for name, value in checkpoint["state_dict"].items()}
    name, arguments = _described(checkpoint, config_file, path)
    embedding = tensors.get("atom_emb.embeddings.weight")
    num_elements = 0 if embedding is None else len(embedding)
    model = build_model(hyperparameters_from(name, arguments, num_elements, str(path)))
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        model.double()  # or it would round them
    tensors |= _averaged(checkpoint, tensors, model, path)
    tensors |= _scale_factors(checkpoint, tensors, scale_file, path)
    _check_scales(model, tensors, path)
    load_weights(model, tensors)
    return Potential(model, _normalizer(checkpoint.get("normalizers"), path), {}).eval()


def save_open_catalyst(path: str | Path, potential: Potential) -> None:
    """Write a model of ours as an Open Catalyst checkpoint: one that this module reads back equal.

    Args:
        path: of the .pt file; tensors and plain values only, so torch's restricted loader reads it.
        potential: without reference energies, for which that layout has no place.

    Raises:
        TeacherError: references, or a model that has no counterpart there.
    """
    if any(potential.references.values()):
        raise TeacherError(
            "the model has reference energies, and an Open Catalyst checkpoint has no place for "
            "them: its energies would be off by keV. Train with references.mode none."
        )
    name, arguments = arguments_from(potential.model)
    units = potential.normalizer
    state = {f"module.{key}": value.cpu() for key, value in potential.model.state_dict().items()}
    checkpoint = {
        "state_dict": state,
        "normalizers": {
            "target": _pair(units.energy_shift, units.energy_scale),
            "grad_target": _pair(0.0, units.force_scale),
        },
        "config": {"model": name, "model_attributes": arguments},
    }
    torch.save(checkpoint, path)


def _pair(mean: float, std: float) -> dict[str, Tensor]:
    return {
        "mean": torch.tensor(mean, dtype=torch.float64),
        "std": torch.tensor(std, dtype=torch.float64),
    }


def _bare(name: str) -> str:
    """A name without the prefixes of parallel training, one or several."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _described(
    checkpoint: Mapping[str, Any], config_file: str | Path | None, path: Path
) -> tuple[str, dict[str, Any]]:
    """The model's name there and its constructor arguments."""
    config = checkpoint.get("config")
    where = f"{path}, config"
    if config_file is not None:
        config, where = read_yaml(str(config_file)), str(config_file)
    found = config if isinstance(config, dict) else {}
    model, arguments = found.get("model"), found.get("model_attributes")
    if isinstance(model, dict):  # as in the trainer's YAML files and in later checkpoints
        model, arguments = model.get("name"), model
    if not isinstance(model, str) or not isinstance(arguments, dict):
        raise TeacherError(
            f"{where} does not name the model (model and model_attributes). Weights do not tell "
            "cutoffs: give the YAML the model was trained with (--teacher-config)."
        )
    return model, arguments


def _averaged(
    checkpoint: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Model, path: Path
) -> dict[str, Tensor]:
    """The averaged weights by name; none in a file that holds them as its state_dict already.

    The file lists them without names, in the order of the trainable parameters, which is that of
    the state_dict without buffers, fixed factors and second names of one tensor.
    """
    ema = checkpoint.get("ema")
    shadows = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not shadows:
        return {}
    own = dict(model.named_parameters(remove_duplicate=False))
    names: list[str] = []
    seen: set[int] = set()
    for name in tensors:
        if name in own:
            trainable = own[name].requires_grad and not name.endswith(SCALE)
            if trainable and id(own[name]) not in seen:
                seen.add(id(own[name]))
                names.append(name)
        elif name.partition(".")[0] in EXTRAS and not name.startswith("atomic_mass"):
            names.append(name)
    fits = len(names) == len(shadows) and all(
        tensors[name].shape == shadow.shape for name, shadow in zip(names, shadows, strict=True)
    )
    if not fits:
        raise TeacherError(
            f"{path} has {len(shadows)} averaged weights (ema) and {len(names)} trainable ones, or "
            "of other shapes: which is which cannot be told. Use the trainer's "
            "best_checkpoint.pt, whose weights are the averaged ones."
        )
    averaged = dict(zip(names, shadows, strict=True))
    by_parameter = {id(own[name]): value for name, value in averaged.items() if name in own}
    for name in tensors:  # second names follow the first
        if name in own and id(own[name]) in by_parameter:
            averaged[name] = by_parameter[id(own[name])]
    return averaged


def _scale_factors(
    checkpoint: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    scale_file: str | Path | None,
    path: Path,
) -> dict[str, Tensor]:
    """Scale factors kept beside the weights: in `scale_dict` of the checkpoint, or in a file."""
    found: dict[str, Tensor] = {}
    homes = [(f"{path}, scale_dict", checkpoint.get("scale_dict") or {})]
    if scale_file is not None:
        homes.append((str(scale_file), _read_scales(Path(scale_file))))
    for where, scales in homes:
        for name, written in scales.items():
            key = f"{_bare(name).removesuffix(SCALE)}{SCALE}"
            value = torch.as_tensor(written, dtype=torch.float64).reshape(())
            other = found.get(key, tensors.get(key))
            # 0 is how the trainer writes a factor that was not fitted.
            if other is not None and float(other) and not _close(float(other), float(value)):
                raise TeacherError(
                    f"{where} has {name} = {float(value):g}, the checkpoint has {float(other):g}. "
                    "One of them is of another training: features would be scaled wrongly."
                )
            found[key] = value
    return found


def _read_scales(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        try:
            scales = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TeacherError(f"{path} cannot be read as JSON: {error}.") from error
        if isinstance(scales, dict):
            scales.pop("comment", None)
    else:
        scales = read_torch_file(path)
    numbers = isinstance(scales, dict) and all(
        isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
        for value in scales.values()
    )
    if not numbers:
        raise TeacherError(
            f"{path} is no scale file: it must hold one number for each scaled module, by name."
        )
    return dict(scales)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=SAME_SCALE)


def _check_scales(model: Model, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse factors the model has no use for, and a GemNet-OC without its own."""
    own = model.state_dict(keep_vars=True)
    scales = [name for name in own if name.endswith(SCALE)]
    for name in tensors:
        if name.endswith(SCALE) and name not in own:
            raise TeacherError(
                f"{path}: there is a scale factor for {name.removesuffix(SCALE)}, which the model "
                f"has not: {did_you_mean(name, scales)}. It is of another model."
            )
    if model.name != "gemnet-oc":
        return
    # Modules may share a factor, and the file may name any of them.
    fitted = {id(own[name]) for name in scales if name in tensors and float(tensors[name]) != 0.0}
    missing = [name for name in scales if id(own[name]) not in fitted]
    if missing:
        raise TeacherError(
            f"{path} lacks {len(missing)} of {len(scales)} scale factors, "
            f"{missing[0].removesuffix(SCALE)} among them, and a GemNet-OC without them computes "
            "something else. Give the file they were written to (--scale-file)."
        )


def _normalizer(normalizers: Any, path: Path) -> Normalizer:
    """Units of a checkpoint; without normalizers the outputs are eV and eV/Å themselves."""
    values = dict(normalizers or {})
    unknown = [name for name in values if name not in ("target", "grad_target")]
    if unknown:
        raise TeacherError(
            f"{path} has a normalizer {unknown[0]!r}; target and grad_target are known. Its "
            "energies or forces would come out in another unit."
        )
    mean, std = _mean_std(values.get("target"), path)
    force_mean, force_std = _mean_std(values.get("grad_target"), path)
    if force_mean:
        raise TeacherError(
            f"{path} adds {force_mean:g} to every force (grad_target.mean), and forces turned with "
            "a structure cannot have a mean. It is no checkpoint of that trainer."
        )
    return Normalizer(energy_scale=std, energy_shift=mean, force_scale=force_std)


def _mean_std(values: Any, path: Path) -> tuple[float, float]:
    if values is None:
        return 0.0, 1.0
    try:
        mean, std = float(values["mean"]), float(values["std"])
    except (KeyError, TypeError, ValueError) as error:
        raise TeacherError(f"{path} has a normalizer without mean and std: {values!r}.") from error
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise TeacherError(f"{path} has a normalizer of mean {mean} and std {std}: no units.")
    return mean, std
