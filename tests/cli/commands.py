"""Run commands as a user would, and data small enough that each takes a moment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ase.io
from click.testing import CliRunner

from kdcache.structures import Structure
from kdcache_cli.main import main
from tests.readers.identity import as_atoms, numbered_structure

# A PaiNN of a few hundred weights, trained for a moment.
TINY = (
    "model.hidden_channels=8", "model.num_layers=1", "model.num_rbf=6", "model.cutoff=3.0",
    "training.max_steps=6", "training.eval_every=3", "training.checkpoint_every=3",
    "training.batch_size=4", "training.threads=1",
)  # fmt: skip
# Blocks of two structures or so, one to a shard: a small dataset has many of both.
SMALL_BLOCKS = ("--block-atoms", "8", "--shard-blocks", "1")


def kdcache(*arguments: object) -> str:
    """What a command prints; it must succeed and leave nothing on stderr."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, f"{arguments}: {result.stderr or repr(result.exception)}"
    assert result.stderr == ""
    return result.stdout


def refused(*arguments: object) -> str:
    """The one line a command is refused with."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("kdcache: ")
    return lines[0]


def usage(*arguments: object) -> str:
    """The last line of click's own refusal of an option."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert "Error: " in result.stderr
    return result.stderr.splitlines()[-1]


def settings(*texts: str) -> list[str]:
    """`--set` options of a tiny run, and further ones that win over it."""
    return [part for text in (*TINY, *texts) for part in ("--set", text)]


def write_structures(path: Path, structures: Sequence[Structure]) -> Path:
    """An extended XYZ file in which what a structure lacks is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = []
    for structure in structures:
        atoms = as_atoms(structure, config_type="odd" if structure.n_atoms % 2 else "even")
        if structure.forces is None:
            atoms.calc = None
        frames.append(atoms)
    ase.io.write(path, frames, format="extxyz")
    return path


def dataset(n: int = 24) -> list[Structure]:
    """Molecules of 1 to 5 atoms; atom k of structure s stands at (s, k, …)."""
    return [numbered_structure(s, periodic=False) for s in range(n)]
