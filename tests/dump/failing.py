"""A teacher that does what it is told: answers, raises, gives NaN, or finds the memory full.

Loaded by path, which is a JSON file of `Behaviour`, so that workers of a cluster can load it too.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.models.taps import Tap
from kdcache.structures import Batch
from tests.chain import CUTOFF

CHANNELS = 3


@dataclass(frozen=True)
class Behaviour:
    """What goes wrong, by store row.

    Attributes:
        raises: structures that raise, with their batch.
        nan: structures with one NaN in `node`.
        memory: most atoms that fit.
        deadly: structures whose first computation kills a process.
        victim: which: "itself", "dump" for the one that started this worker, or its number.
        attempts: directory that a computation of a deadly structure is noted in.
        seconds: that every batch takes, for those who kill it at a moment of their own.
    """

    raises: tuple[int, ...] = ()
    nan: tuple[int, ...] = ()
    memory: int = 10**9
    deadly: tuple[int, ...] = ()
    victim: str = "itself"
    attempts: str = ""
    seconds: float = 0.0

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)))
        return path


@dataclass
class Failing:
    """node [n_atoms, 3] = (store row, atomic number, x); edge [n_edges] = length; energy = Σ x."""

    behaviour: Behaviour
    model_name: str = "failing"
    digest: str = hashlib.sha256(b"failing").hexdigest()
    graph_rule: GraphRule = field(default_factory=lambda: GraphRule(CUTOFF))
    further_graphs: Mapping[str, GraphRule] = field(default_factory=dict)
    architecture: Mapping[str, Any] = field(default_factory=dict)
    references: Mapping[int, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    batches: list[int] = field(default_factory=list)

    def field_specs(self) -> tuple[FieldSpec, ...]:
        return (
            FieldSpec("node", "atom", (CHANNELS,)),
            FieldSpec("edge", "edge", (1,)),
            FieldSpec("energy", "structure", (), "float64", "eV"),
        )

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows is not None
        rows = batch.rows.tolist()
        told = self.behaviour
        if batch.n_atoms > told.memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
        for row in rows:
            if row in told.deadly:
                (Path(told.attempts) / f"{row}.{uuid4().hex}").touch()
                if len(list(Path(told.attempts).glob(f"{row}.*"))) == 1:
                    os.kill(_process(told.victim), signal.SIGKILL)
        time.sleep(told.seconds)
        if set(rows) & set(told.raises):
            raise ValueError("no parameters for this in /home/somebody/table.dat")
        self.batches.append(batch.n_atoms)
        store_row = torch.tensor(rows)[batch.structure_index]
        x = batch.positions[:, 0]
        node = torch.stack([store_row.to(x.dtype), batch.atomic_numbers.to(x.dtype), x], 1)
        for row in told.nan:
            node[torch.nonzero(store_row == row)[:1], 1] = torch.nan
        source, target = batch.edge_index
        length = (batch.positions[source] - batch.positions[target]).norm(dim=1, keepdim=True)
        energy = torch.zeros(batch.n_structures, dtype=torch.float64)
        energy.index_add_(0, batch.structure_index, x.double())
        return {"node": node, "edge": length, "energy": energy}


def _process(victim: str) -> int:
    if victim == "dump":
        started = multiprocessing.parent_process()
        assert started is not None
        return int(started.pid)
    return os.getpid() if victim == "itself" else int(victim)


def load(path: str, *, device: str, dtype: torch.dtype, taps: Sequence[Tap]) -> Failing:
    """The teacher a file describes; as `--teacher-format tests.dump.failing:load`."""
    told = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads(Path(path).read_text()).items()
    }
    return Failing(Behaviour(**told))
