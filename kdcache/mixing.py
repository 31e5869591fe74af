"""Which stores feed a run, and what each puts into a batch.

Owns the overlays of a run, what of them may be trained on, and the samplers of all lanes; reading
is the stream's, the arithmetic of shares and weights `origins`'.
Invariant: a structure made from one that is held out is never trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import chemical_symbols

from kdcache.config import OverlayConfig, StudentConfig
from kdcache.errors import ConfigError, DataError, IdentityError, TrainingError, did_you_mean
from kdcache.origins import batch_parts, origin_weights, parent_ids
from kdcache.selection import Selection, elements_of
from kdcache.store import Store, open_store
from kdcache.stream.reader import OPTIONAL
from kdcache.stream.sampler import BlockShuffle, Budget
from kdcache.structures import IntArray

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Overlay:
    """A store of labelled-by-a-teacher structures beside the dataset's own.

    Attributes:
        settings: share, ratio and labels.
        store: open.
        rows: rows trained on, ascending.
        truth: group whose energy and forces count as ground truth.
    """

    settings: OverlayConfig
    store: Store
    rows: IntArray
    truth: str


@dataclass(frozen=True, slots=True)
class Lane:
    """What one sampler adds to every batch.

    Attributes:
        sampler: chooses the rows.
        overlay: whose rows they are; None for the dataset's.
        weight: of its structures in every loss, w of Eqs. 10 and 11; None without overlays.
    """

    sampler: BlockShuffle
    overlay: Overlay | None
    weight: float | None


def open_overlays(store: Store, selection: Selection, config: StudentConfig) -> list[Overlay]:
    """The overlays of a run, each checked against the dataset it is mixed with.

    Raises:
        ConfigError: no such teacher, or nothing to learn from an overlay.
        DataError: an overlay holds elements that the dataset does not, or other inputs.
        TrainingError: nothing of an overlay may be trained on.
        StoreError: no store there.
    """
    return [_open(settings, store, selection, config) for settings in config.data.overlays]


def _open(
    settings: OverlayConfig, store: Store, selection: Selection, config: StudentConfig
) -> Overlay:
    overlay = open_store(settings.store)
    rows = _trainable(overlay, store, selection)
    rows_seen = np.concatenate([selection.train, selection.validation])
    strange = np.setdiff1d(elements_of(overlay, rows), elements_of(store, rows_seen))
    if len(strange):
        raise DataError(
            f"{overlay.path} holds {chemical_symbols[strange[0]]}, which {store.path} does not: "
            f"its energies would have no reference. Leave such structures out."
        )
    for name in OPTIONAL:
        short = name.split("/")[1]
        ours, theirs = (short in made.fields("structures") for made in (store, overlay))
        if ours != theirs:
            has, lacks = (store, overlay) if ours else (overlay, store)
            raise DataError(
                f"{has.path} says which atoms have which {short}, {lacks.path} does not, and a "
                f"batch holds both. Make the overlay from structures of {store.path}."
            )
    truth = "structures"
    if settings.labels == "teacher":
        truth = f"teachers/{_teacher(settings, overlay)}"
        for quantity in ("energy", "forces"):
            if quantity not in overlay.fields(truth):
                raise ConfigError(
                    f"{truth} of {overlay.path} has no {quantity}, so it cannot stand in for the "
                    f"ground truth. Dump it with that field, or say labels: own."
                )
    elif not (config.terms or overlay.manifest.dataset.n_labelled):
        raise ConfigError(
            f"{overlay.path} has no labels of its own and the run has no terms: nothing would be "
            f"learnt from it. Say labels: teacher, or name a --strategy."
        )
    return Overlay(settings, overlay, rows, truth)


def _teacher(settings: OverlayConfig, overlay: Store) -> str:
    name, known = settings.teacher_name, overlay.teachers
    if name is None and len(known) == 1:
        return next(iter(known))
    if name is None:
        raise ConfigError(
            f"{overlay.path} has {'several teachers' if known else 'no teacher'}: whose labels "
            f"count? Name one as data.overlays.….teacher_name (known: {', '.join(known) or None})."
        )
    if name not in known:
        raise ConfigError(f"{overlay.path} has no teacher {name}; {did_you_mean(name, known)}.")
    return name


def _trainable(overlay: Store, store: Store, selection: Selection) -> IntArray:
    """Rows of an overlay without those made from structures that the run holds out."""
    row_of = {str(name): row for row, name in enumerate(store.index.structure_id)}
    trained = np.zeros(len(store), bool)
    trained[selection.train] = True

    def held_out(structure_id: str) -> bool:
        known = [row_of[name] for name in parent_ids(structure_id) if name in row_of]
        return bool(known) and not trained[known[0]]

    free = np.isin(overlay.index.split, ["train", ""])
    leaks = np.array([held_out(str(name)) for name in overlay.index.structure_id], bool)
    rows: IntArray = np.flatnonzero(free & ~leaks)
    if not len(rows):
        raise TrainingError(
            f"{overlay.path}: none of its {len(overlay)} structures may be trained on, "
            f"{int(leaks.sum())} are made from structures that are held out. Make another overlay."
        )
    if leaks.any():
        log.info("%s: %d structures of held-out parents left out", overlay.path, leaks.sum())
    return rows


def plan_lanes(
    store: Store,
    selection: Selection,
    overlays: Sequence[Overlay],
    config: StudentConfig,
    count_edges: Callable[[Store], IntArray],
) -> list[Lane]:
    """One lane over all structures, or one each for labelled, unlabelled and overlaid ones.

    Args:
        store, selection, overlays: of the run.
        config: sizes and shares of a batch.
        count_edges: [n_structures] of a store, in the student's graph; asked where they are
            limited.

    Raises:
        ConfigError: shares that do not fit a batch.
        TrainingError: a lane without structures, or one that does not fit its part of a batch.
    """
    data, training = config.data, config.training
    limited = training.max_atoms is not None or training.max_edges is not None
    # Of limits, parts are taken in 1,000,000ths.
    whole = 1_000_000 if limited else training.batch_size
    size, *sizes = batch_parts(whole, [o.settings.share for o in overlays])
    n_labelled, share = len(selection.train_labelled), data.labelled_share or 0.0
    has_terms = any(not term.weight.is_zero for term in config.terms)
    parts: list[tuple[Overlay | None, IntArray, int]]
    if not has_terms:
        # Without a teacher an unlabelled structure teaches nothing: it would only fill batches.
        parts = [(None, selection.train_labelled, size)]
    elif not n_labelled or n_labelled >= share * len(selection.train):
        # As they come: given a share, the few without labels would come up far too often.
        parts = [(None, selection.train, size)]
    else:
        labelled = round(share * size)
        parts = [
            (None, selection.train_labelled, labelled),
            (None, selection.train_unlabelled, size - labelled),
        ]
    parts += [(o, o.rows, n) for o, n in zip(overlays, sizes, strict=True)]

    def sampler(source: Store, rows: IntArray, n: int, seed: int) -> BlockShuffle:
        if not limited:
            return BlockShuffle(source.index.block, rows, batch_size=n, seed=seed)
        budget = Budget.of(
            source.index.n_atoms,
            None if training.max_edges is None else count_edges(source),
            max_atoms=training.max_atoms,
            max_edges=training.max_edges,
            share=n / whole,
        )
        return BlockShuffle(source.index.block, rows, budget=budget, seed=seed)

    samplers = [
        (overlay, sampler(overlay.store if overlay else store, rows, n, training.seed + k))
        for k, (overlay, rows, n) in enumerate(parts)
        if n
    ]
    if not overlays:
        return [Lane(sampler, None, None) for _, sampler in samplers]
    # What a batch really holds: a store smaller than its part gives less. Cut by atoms or edges,
    # what it holds in the mean.
    total = sum(sampler.batch_size for _, sampler in samplers)
    shares = [sampler.batch_size / total for _, sampler in samplers]
    ratios = [overlay.settings.ratio if overlay else 1.0 for overlay, _ in samplers]
    weights = origin_weights(shares, ratios)
    return [Lane(s, o, w) for (o, s), w in zip(samplers, weights, strict=True)]


def steps_per_epoch(lanes: Sequence[Lane]) -> int:
    """Batches that hold as many structures as all stores together.

    Within one store, an epoch is as long as its longest lane.

    Source: with overlays, Ekström Kelvinius et al. 2023, section D.2, where an epoch of the mixed
    set visits one part several times and another not wholly.
    """
    if any(lane.overlay for lane in lanes):
        n_structures = sum(len(lane.sampler.rows) for lane in lanes)
        return max(1, int(n_structures // sum(lane.sampler.batch_size for lane in lanes)))
    return max(lane.sampler.steps_per_epoch for lane in lanes)


def failing_teachers(stores: Iterable[Store]) -> set[str]:
    """Names of teachers that gave nothing for some structure of a store."""
    return {
        name for store in stores for name, teacher in store.teachers.items() if teacher.n_failed
    }


def check_teachers(store: Store, overlays: Iterable[Overlay], fields: Iterable[str]) -> None:
    """Every overlay must hold the fields that the terms read, of the same teacher.

    Args:
        store: the dataset's.
        overlays: mixed with it.
        fields: "teacher/field" names.

    Raises:
        ConfigError: an overlay lacks a teacher or a field.
        IdentityError: two teachers of one name.
    """
    for overlay in overlays:
        for key in fields:
            name, _, field = key.partition("/")
            if name not in overlay.store.teachers:
                raise ConfigError(
                    f"{overlay.store.path} has no teacher {name}, whose {field} the terms compare; "
                    f"{did_you_mean(name, overlay.store.teachers)}. Dump it there: kdcache "
                    f"dump-teacher --into {overlay.store.path} --name {name}."
                )
            digests = [made.teachers[name].digest for made in (store, overlay.store)]
            if digests[0] != digests[1]:
                raise IdentityError(
                    f"Teacher {name} has digest {digests[0][:12]}… in {store.path} and "
                    f"{digests[1][:12]}… in {overlay.store.path}. A student would learn from two "
                    f"models as from one. Dump the same teacher, in the same precision, into both."
                )
            if field not in overlay.store.fields(f"teachers/{name}"):
                raise ConfigError(
                    f"Teacher {name} of {overlay.store.path} has no field {field}; "
                    f"{did_you_mean(field, overlay.store.fields(f'teachers/{name}'))}. Make the "
                    f"overlay with it."
                )
