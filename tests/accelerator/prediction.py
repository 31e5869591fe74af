"""Predictions and a teacher's shards on the pretend device: where they meet the host."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from kdcache.ase_calculator import PotentialCalculator
from kdcache.dump.compute import ShardComputer, ShardRows
from kdcache.dump.options import DumpOptions, choose_fields
from kdcache.evaluate import predict_batches, predict_structures
from kdcache.store import open_store
from kdcache.stream.window import collate
from kdcache.taps import Tap
from kdcache.teachers import NativeTeacher
from tests.accelerator import pretend
from tests.accelerator.models import GEMNET, GEMNET_WAITS
from tests.chain import PAINN, make_potential, structures
from tests.readers.identity import as_atoms

CHECKED, REFERENCES = "models/potential.py:check_elements", "models/potential.py:predict"


def evaluates() -> None:
    """Nothing but predictions comes to the host, once a batch."""
    model = {**PAINN, "direct_forces": False, "num_layers": 1}

    def predict(device: torch.device) -> None:
        potential = make_potential(model).to(device)
        found = predict_structures(potential, structures(12), max_atoms=12)
        assert len(found.forces) == found.n_atoms.sum() > 12

    # Elements are looked at in windows of a thousand structures.
    compared(predict, "evaluate.py:predict_batches", "evaluate.py:batches", CHECKED)


def validates() -> None:
    """The same of batches that stay on the device, as a run keeps those of its validation."""

    def predict(device: torch.device) -> None:
        potential = make_potential(PAINN).to(device)
        kept = [collate(structures(6)[k : k + 3], potential.graph_rule) for k in (0, 3)]
        found = predict_batches(potential, [batch.to(device) for batch in kept])
        assert len(found.energy) == 6

    compared(predict, "evaluate.py:predict_batches")


def dumps(name: str, store: Path) -> None:
    """Fields come to the host at one place, and edge features are summed before."""
    model, tap, waits = TEACHERS[name]

    def compute(device: torch.device) -> None:
        teacher = NativeTeacher(make_potential(model).to(device), [Tap.parse(tap)] if tap else [])
        options = DumpOptions(name="other", threads=1)
        specs = choose_fields(teacher.field_specs(), None, options.codec)
        opened = open_store(store)
        rows = ShardRows(opened.plan)
        computer = ShardComputer(opened, teacher, specs, options, str(device))
        with ThreadPoolExecutor(1) as reading:
            computer.compute(0, rows, reading, lambda _: None)
        found = rows.arrays()
        assert {spec.name for spec in specs} == set(found)

    compared(compute, "dump/compute.py:_ask", CHECKED, REFERENCES, *waits)


def calculates() -> None:
    """The calculator of ASE, which takes one structure at a time."""
    atoms = as_atoms(structures(3)[2])

    def compute(device: torch.device) -> None:
        calculator = PotentialCalculator(make_potential(PAINN).to(device))
        calculator.calculate(atoms)
        assert calculator.results["forces"].shape == (len(atoms), 3)

    compared(compute, "ase_calculator.py:calculate", CHECKED, REFERENCES)


def compared(run: Callable[[torch.device], None], *places: str) -> None:
    """`run` on the CPU for answers, then on the device; the host waits at these places alone."""
    told = pretend.recorded(lambda: run(torch.device("cpu")))
    # Weights come from the host as well, in a test: "outside".
    with pretend.WithoutMemory(), pretend.Watch(told, copies=(*places, "outside")) as watch:
        run(pretend.device())
    waited = set(watch.waited) - {"outside"}
    assert waited == set(places), waited ^ set(places)


# Without tags all edges are middle edges, and nothing has to be found.
NO_TAGS = "models/gemnet_oc/inputs.py:_middle_edges"
TEACHERS = {
    "painn": (PAINN, "node/first=update_layers.0", ()),
    "gemnet-oc": (GEMNET, None, GEMNET_WAITS - {NO_TAGS}),
}
CHECKS = {
    "evaluates": (evaluates,),
    "validates": (validates,),
    **{f"dumps, {name}": (dumps, name) for name in TEACHERS},
    "calculates": (calculates,),
}
