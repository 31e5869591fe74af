"""Compare the layers of two models, structure by structure, in bounded memory.

One straight line: which structures, whose features, which pairs, sums, numbers.
Invariant: both models are asked about the same structures, by content, never by place.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdcache.compare.sides import Chunk, Computed, RunSide, Side, StoreSide
from kdcache.devices import batch_atoms
from kdcache.distill.similarity import Alignment, StreamingAlignment
from kdcache.errors import ConfigError, DataError, did_you_mean
from kdcache.fields import FieldSpec
from kdcache.models.taps import Tap
from kdcache.progress import Progress, silent
from kdcache.readers import ReadOptions, read_structures
from kdcache.store import Store, is_store, open_store
from kdcache.store.records import iterate_structures
from kdcache.stream.window import atom_bounded
from kdcache.structures import Structure

log = logging.getLogger(__name__)

CONTROL = "control "  # before the name of a layer of the control


@dataclass(frozen=True, slots=True)
class Pair:
    """Two layers and how alike they are.

    Attributes:
        a, b: names of the layers.
        level: of their rows, atom or edge.
        n_rows: rows compared.
        cka: linear CKA of all rows.
        cka_unbiased: the same from unbiased estimates; see `StreamingAlignment`.
        taught: b was trained towards a.
        control: CKA of a with the control's layer, None without a control.
        gain: cka − control.
    """

    a: str
    b: str
    level: str
    n_rows: int
    cka: float
    cka_unbiased: float
    taught: bool = False
    control: float | None = None
    gain: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All pairs of layers of two models.

    Attributes:
        a, b: names of the models.
        a_layers, b_layers: of the layers, those of one kind together, in the models' order.
        pairs: those that can be compared.
        n_structures: compared.
        notes: why some pairs are missing, a line each.
    """

    a: str
    b: str
    a_layers: tuple[str, ...]
    b_layers: tuple[str, ...]
    pairs: tuple[Pair, ...]
    n_structures: int
    notes: tuple[str, ...]


def compare_layers(
    a: str | Path,
    b: str | Path,
    *,
    data: Sequence[str] = (),
    read: ReadOptions | None = None,
    control: str | Path | None = None,
    taps_a: Sequence[Tap] = (),
    taps: Sequence[Tap] = (),
    max_structures: int | None = 1000,
    max_atoms: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Comparison:
    """Pairwise linear CKA between all layers of `a` and all of `b`.

    Layers compare where their rows are the same things: atoms with atoms, scalars with scalars and
    vectors (as 3C numbers) with vectors, edges with edges where both have the same ones.

    Args:
        a, b: stores, whose teachers' features are compared, or runs, whose features are computed.
        data: files or a store, for two runs; next to a store, checked against it.
        read: how files are read.
        control: a run as `b` but without terms, for the gain CKA(a, b) − CKA(a, control).
        taps_a: inner modules of the run `a`; all its blocks where none are named.
        taps: the same of `b` and the control.
        max_structures: a random sample of so many; None for all.
        max_atoms: in a batch; None for what suits the device.
        device: where runs compute and sums are kept.
        progress: shows structures.

    Raises:
        ConfigError: nothing to compare, a tap that fits no model, a control of other layers.
        IdentityError: the stores, or a store and the data, hold different structures.
        DataError: no data for two runs.

    Source: Ekström Kelvinius et al. 2023, section 4 (Figure 2) and appendix G (Figures 3, 6 to 8).
    """
    first, second = _open(a, taps_a, device), _open(b, taps, device)
    sides: list[Side] = [first, second]
    if control is not None:
        sides.append(_open(control, taps, device))
        _check_control(second, sides[2])
    source = _source(sides, data, read or ReadOptions())
    pairs, notes = _matching(first.layers, second.layers)
    if not pairs:
        raise ConfigError(f"{first.name} and {second.name} have no layers that compare. {notes[0]}")
    prefixes = ("", CONTROL)[: len(sides) - 1]
    sums = StreamingAlignment(
        list(first.layers),
        [prefix + y for prefix in prefixes for y in second.layers],
        {(x, prefix + y) for prefix in prefixes for x, y in pairs},
    )
    total = min(len(source), max_structures or len(source))
    computes = any(isinstance(side, RunSide) for side in sides)
    at_once = batch_atoms(max_atoms, torch.device(device))
    with progress("compare", total, "structures") as advance:
        for chunk in _chunks(source, total, at_once, computes):
            mine, *others = [side.compute(chunk) for side in sides]
            for x, y in _other_edges(pairs, mine, others):
                pairs.remove((x, y))
                sums.drop({(x, prefix + y) for prefix in prefixes})
                notes.append(f"{x} and {y} are of different edges, so their rows do not compare.")
            theirs = {
                prefix + name: values
                for prefix, other in zip(prefixes, others, strict=True)
                for name, values in other.layers.items()
            }
            sums.update(_moved(mine.layers, device), _moved(theirs, device))
            advance(len(chunk.source_index))
    for note in notes:
        log.info(note)
    results = sums.result()
    return Comparison(
        a=first.name,
        b=second.name,
        a_layers=_grouped(first.layers),
        b_layers=_grouped(second.layers),
        pairs=tuple(_pair(x, y, first, second, results) for x, y in pairs),
        n_structures=total,
        notes=tuple(notes),
    )


def _moved(layers: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: values.to(device) for name, values in layers.items()}


def _pair(x: str, y: str, a: Side, b: Side, results: Mapping[tuple[str, str], Alignment]) -> Pair:
    value, control = results[x, y], results.get((x, CONTROL + y))
    return Pair(
        a=x,
        b=y,
        level=a.layers[x].level,
        n_rows=value.n_rows,
        cka=value.cka,
        cka_unbiased=value.unbiased,
        taught=x.rpartition("/")[2] in b.taught.get(y, ()),
        control=None if control is None else control.cka,
        gain=None if control is None else value.cka - control.cka,
    )


def write_csv(comparison: Comparison, path: Path) -> None:
    """A row per pair of layers, in the columns of `Pair`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Pair)])
        writer.writeheader()
        writer.writerows(asdict(pair) for pair in comparison.pairs)


def _open(path: str | Path, taps: Sequence[Tap], device: str) -> StoreSide | RunSide:
    if not is_store(path):
        return RunSide(Path(path), taps, device)
    if taps:
        raise ConfigError(
            f"{path} is a store, and a tap listens to a model. Leave {taps[0].field} out, or dump "
            f"the teacher with it (kdcache dump-teacher --tap)."
        )
    return StoreSide(open_store(path))


def _check_control(student: Side, control: Side) -> None:
    if student.layers.keys() != control.layers.keys():
        odd = sorted(student.layers.keys() ^ control.layers.keys())[0]
        raise ConfigError(
            f"{student.name} and its control {control.name} have different layers (the first is "
            f"{odd}; {did_you_mean(odd, control.layers)}). A gain compares the same model trained "
            f"with and without terms."
        )


class _Dataset:
    """Structures of files, kept in memory."""

    def __init__(self, structures: Sequence[Structure]) -> None:
        self.structures = structures

    def __len__(self) -> int:
        return len(self.structures)


def _source(sides: Sequence[Side], data: Sequence[str], read: ReadOptions) -> Store | _Dataset:
    """Where structures come from, everything that holds some checked against it."""
    stores = [side.store for side in sides if isinstance(side, StoreSide)]
    given: _Dataset | None = None
    if len(data) == 1 and is_store(data[0]):
        stores.append(open_store(data[0]))
    elif data:
        given = _Dataset(list(read_structures(list(data), read)))
    if not stores:
        if given is None:
            raise DataError(
                "Two runs hold no structures to compare on. Name some with --data: files or a "
                "store."
            )
        if not len(given):
            raise DataError(f"{data[0]} holds no structures. Name others with --data.")
        return given
    base = stores[0]
    for other in stores[1:]:
        if other.manifest.dataset.digest != base.manifest.dataset.digest:
            order = other.index.source_order
            base.check_dataset(
                [row.tobytes() for row in other.index.content_hash[order]],
                [str(name) for name in other.index.structure_id[order]],
            )
    if given is not None:
        base.check_dataset(
            [structure.content_hash() for structure in given.structures],
            [structure.structure_id for structure in given.structures],
        )
    return base


def _chunks(
    source: Store | _Dataset, total: int, max_atoms: int, computes: bool
) -> Iterator[Chunk]:
    """The first structures of a store, whose order is random, or a random sample of files."""
    if isinstance(source, Store):
        rows = np.arange(total)
        structures: Iterable[Structure] = iterate_structures(source, rows) if computes else ()
        places, n_atoms = source.index.source_index[rows], source.index.n_atoms[rows]
    else:
        places = np.sort(np.random.default_rng(0).permutation(len(source))[:total])
        structures = [source.structures[place] for place in places]
        n_atoms = np.array([structure.n_atoms for structure in structures])
    stream = iter(structures)
    for run in atom_bounded(n_atoms, max_atoms):
        count = run.stop - run.start
        held = [next(stream) for _ in range(count)] if computes else []
        yield Chunk(places[run], held)


def _kind(spec: FieldSpec) -> tuple[str, str]:
    """What two layers must share to compare."""
    return spec.level, spec.symmetry


def _grouped(layers: Mapping[str, FieldSpec]) -> tuple[str, ...]:
    return tuple(sorted(layers, key=lambda name: _kind(layers[name])))


def _matching(
    a: Mapping[str, FieldSpec], b: Mapping[str, FieldSpec]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of layers with the same kind of rows, and a note on every layer without a partner."""
    pairs = [(x, y) for x in a for y in b if _kind(a[x]) == _kind(b[y])]
    notes = []
    for layers, matched in ((a, {x for x, _ in pairs}), (b, {y for _, y in pairs})):
        for name in layers:
            if name not in matched:
                level, symmetry = _kind(layers[name])
                notes.append(f"{name}: the other model has no {symmetry} feature of level {level}.")
    return pairs, notes


def _other_edges(
    pairs: Sequence[tuple[str, str]], mine: Computed, others: Sequence[Computed]
) -> list[tuple[str, str]]:
    """Pairs of layers of level edge whose edges differ in this chunk."""
    return [
        (x, y)
        for x, y in pairs
        if x in mine.edges
        and any(not np.array_equal(mine.edges[x], other.edges[y]) for other in others)
    ]
