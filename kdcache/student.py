"""A student ready to be trained: its units, its initial weights, the terms bound to a store.

Everything here is decided once, before the first step, by the configuration, the store and the
selection. Invariant: the initial weights depend on the seed and the model alone, so a control and
its students start equal.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
from ase.data import chemical_symbols

from kdcache.config import StudentConfig, read_yaml
from kdcache.distill.binding import build_terms, student_taps
from kdcache.distill.schedules import Clock
from kdcache.distill.terms import Terms
from kdcache.errors import DataError
from kdcache.models import build_model
from kdcache.models.potential import Normalizer, Potential
from kdcache.models.taps import Taps
from kdcache.models.traced import TracedModel
from kdcache.readers import ReadOptions, read_structures
from kdcache.references import fit_references, isolated_references, parse_references
from kdcache.selection import Selection, composition, elements_of
from kdcache.store import Store
from kdcache.stream.neighbors import block_rows
from kdcache.stream.probe import tap_specs
from kdcache.stream.window import reference_table, reference_totals
from kdcache.structures import Batch, IntArray, ModelOutput, Structure
from kdcache.taps import Tap

log = logging.getLogger(__name__)


def build_potential(store: Store, config: StudentConfig, selection: Selection) -> Potential:
    """The student with initial weights, its energy unit and its reference energies.

    Args:
        store: the run's data.
        config: model, scale and references.
        selection: whose labels may be looked at.

    Raises:
        ConfigError: an unknown model or hyperparameter; a reference is missing.
        DataError: references need labels and there are none.
    """
    settings = {"name": config.model.name, **config.model.hyperparameters}
    model = build_model(settings, seed=config.training.seed)
    references = find_references(store, config, selection)
    elements = elements_of(store, np.concatenate([selection.train, selection.validation]))
    _check_elements(store, elements, model.max_atomic_number, references)
    # One unit for energy and force keeps a conservative model the gradient of its energy.
    scale = config.scale if config.scale != "auto" else selection.force_rms or 1.0
    log.info("references %s eV, scale %.4g", references, scale)
    normalizer = Normalizer(energy_scale=scale, force_scale=scale)
    return Potential(model, normalizer, references)


def find_references(store: Store, config: StudentConfig, selection: Selection) -> dict[int, float]:
    """Reference energies in eV by atomic number, as the configuration asks for them."""
    settings = config.references
    if settings.mode == "none":
        return {}
    if settings.mode == "given":
        given = read_yaml(settings.file) if settings.file else settings.values
        return parse_references(cast(Mapping[str | int, float], given))  # which checks the values
    if settings.mode == "isolated":
        elements = elements_of(store, np.concatenate([selection.train, selection.validation]))
        return isolated_references(_single_atoms(store, settings.file), elements.tolist())
    rows = selection.train_labelled
    if not len(rows) and config.terms and store.teachers:
        # Nothing to fit to: what the student learns are the teacher's energies, so in its frame.
        name = config.terms[0].teacher_name or next(iter(store.teachers))
        if name in store.teachers:
            return dict(store.teachers[name].references)
    if not len(rows):
        raise DataError(
            f"{store.path} has no labelled training structures to fit reference energies to. "
            f"Set references.mode to none, or give them (references.values)."
        )
    fit = fit_references(*composition(store, rows))
    log.info(fit.note)
    return fit.references


def _single_atoms(store: Store, file: str | None) -> Iterator[Structure]:
    """Isolated atoms: of a file of their own, or among the store's structures."""
    if file is not None:
        # An isolated atom needs no forces.
        yield from read_structures(file, ReadOptions(unlabelled=True))
        return
    for row in np.flatnonzero(store.index.n_atoms == 1):
        yield store.structure(int(row))


def _check_elements(
    store: Store, elements: IntArray, heaviest: int, references: Mapping[int, float]
) -> None:
    if elements.max() > heaviest:
        raise DataError(
            f"{store.path} holds {chemical_symbols[elements.max()]}, and the model has embeddings "
            f"up to {chemical_symbols[heaviest]}. Choose another model, or leave the element out."
        )
    unknown = [chemical_symbols[n] for n in elements if n not in references]
    if references and unknown:
        known = ", ".join(chemical_symbols[n] for n in sorted(references))
        raise DataError(
            f"{store.path} holds {', '.join(unknown)}, and there are reference energies for "
            f"{known} only: energies would be off by those atoms'. Give all of them "
            f"(references.mode given), or see labels of structures that hold these elements."
        )


def build_store_terms(
    store: Store, config: StudentConfig, potential: Potential, clock: Clock
) -> Terms:
    """The configured terms, bound to the student's fields and taps and the store's teachers.

    Raises:
        ConfigError: a teacher, field or module that does not exist, or two that cannot be compared.
    """
    taps = student_taps(config.terms)
    fields = {name: store.fields(f"teachers/{name}") for name in store.teachers}
    return build_terms(
        config.terms,
        student_fields=(*potential.model.field_specs(), *tap_specs(potential, taps)),
        teacher_fields=fields,
        clock=clock,
        seed=config.training.seed,
        field_rms=_field_rms(store, config, potential.references),
    )


def stepping_student(potential: Potential, config: StudentConfig) -> Callable[[Batch], ModelOutput]:
    """What training calls on a batch: the potential, compiled or with its taps where asked for.

    Raises:
        ConfigError: a student that cannot be compiled is to be; of some, at the first batch.
    """
    taps = student_taps(config.terms)
    tapped = TappedPotential(potential, taps) if taps else potential
    if not config.training.compile:
        return tapped
    return TracedModel(tapped, potential.model)


class TappedPotential:
    """A potential whose output holds the features of its taps beside its own.

    Args:
        potential: stays as it is; its parameters are trained through either way.
        taps: with fields that differ.

    Raises:
        ConfigError: a path that names no module, or two taps of one field.
    """

    def __init__(self, potential: Potential, taps: Sequence[Tap]) -> None:
        self.potential = potential
        self._taps = Taps(potential.model, taps)

    def __call__(self, batch: Batch) -> ModelOutput:
        with self._taps as tapped:
            output: ModelOutput = self.potential(batch)
            return replace(output, features={**output.features, **tapped.outputs(batch)})


def _field_rms(
    store: Store, config: StudentConfig, references: Mapping[int, float]
) -> Mapping[str, float]:
    """Root mean square of the fields that terms are normalised by, as the terms see them."""
    # A store is in random order: its first blocks are a fair sample.
    blocks = np.arange(min(4, store.plan.n_blocks))
    found: dict[str, float] = {}
    for term in config.terms:
        teacher = term.teacher_name or next(iter(store.teachers), "")
        known = teacher in store.teachers and term.teacher in store.fields(f"teachers/{teacher}")
        if term.normalise == "rms" and known:  # what is unknown, build_terms refuses in its words
            name = f"{teacher}/{term.teacher}"
            values = store.read(f"teachers/{name}", blocks).astype(np.float64)
            if store.spec(f"teachers/{name}").unit == "eV":
                numbers = store.read("structures/atomic_numbers", blocks)
                table = reference_table(references)
                if store.spec(f"teachers/{name}").level == "structure":
                    n_atoms = store.index.n_atoms[block_rows(store, blocks.tolist())]
                    values -= reference_totals(numbers, n_atoms, table)
                else:
                    values -= table[numbers]
            level, rows = store.spec(f"teachers/{name}").level, block_rows(store, blocks.tolist())
            values = values[~store.failed_rows(f"teachers/{teacher}", level, rows)]
            found[name] = float(np.sqrt((values**2).mean())) if len(values) else math.nan
    return found
