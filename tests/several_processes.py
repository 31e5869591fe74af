"""What `test_distributed` starts twice: the same runs on both processes.

python tests/several_processes.py RANK STORE DIRECTORY
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from kdcache.config import StudentConfig
from kdcache.distributed import connected, launched
from kdcache.errors import TrainingError
from kdcache.progress import silent
from kdcache.store import open_store
from kdcache.stream.loader import Loader
from kdcache.train import Trainer, train_student
from tests.chain import student

BY_STRUCTURE = (
    "terms=[{name: l, student: node, teacher: node, loss: lsp},"
    " {name: g, student: node, teacher: node, loss: gsp},"
    " {name: v, student: vector, teacher: vector, loss: geometric, student_projection: linear}]"
)
# Batches of few labels, all of which one process may hold, and losses averaged over all there is.
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "control": ("control", ("ema=0.9", "schedule.name=plateau")),
    "n2n+v2v": ("n2n+v2v", ("optimizer.weight_decay=0.01",)),
    "few labels": ("vanilla1", ("data.labels=0.05", "data.labelled_share=0.3")),
    "by structure": ("control", (BY_STRUCTURE, "loss.mean_over=batch", "data.labels=0.3")),
    "edges": ("annealed", ("training.max_edges=600", "training.max_atoms=25")),
}
RESUMED = ("n2n+v2v", "edges")
STOP = 5


def config(case: str) -> StudentConfig:
    strategy, settings = RUNS[case]
    common = ("training.max_steps=10", "training.batch_size=6", "training.precision=float64")
    return student(*common, *settings, strategy=strategy)


def main(rank: int, store: Path, directory: Path) -> None:
    """Every run whole; one that others go on with, and one that was begun by another process."""
    meet = f"file://{directory}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    for case in RUNS:
        train_student(store, directory / "whole" / case, config(case))
    for case in RESUMED:
        train_student(store, directory / "left" / case, config(case), stop_after=STOP)
        train_student(store, directory / "taken" / case, config(case))
    write_rows(store, directory)
    lose_one(directory)


def write_rows(store: Path, directory: Path) -> None:
    """The structures this process gets, a line for each step."""
    world = launched()
    made = Trainer(open_store(store), directory, config("few labels"), directory / "graph", silent)
    with Loader(made.stream, rank=world.rank, n_processes=world.size) as loader:
        rows = [batch.rows.tolist() for batch in islice(loader, 12) if batch.rows is not None]
    lines = [" ".join(map(str, step)) for step in rows]
    (directory / f"rows-{world.rank}").write_text("\n".join(lines))


def lose_one(directory: Path) -> None:
    """One process ends while the other waits for it; what that one says then."""
    with connected(launched(), torch.device("cpu")) as world:
        if world.rank == 0:
            try:
                world.totals({"loss": torch.zeros(())})
            except TrainingError as error:
                (directory / "said").write_text(str(error))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
