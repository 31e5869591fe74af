"""How structures are made out of others: the method and its numbers.

Values only. Invariant: equal options and seed give equal structures from equal parents.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from kdcache.errors import ConfigError

Method = Literal["random", "ascent", "relax", "md"]
METHODS: tuple[Method, ...] = ("random", "ascent", "relax", "md")
OF_METHOD: dict[str, tuple[str, ...]] = {
    "random": ("copies", "norm", "norm_of"),
    "ascent": ("norm", "norm_of"),
    "relax": ("keep", "max_steps", "max_force", "force_goal"),
    "md": ("keep", "max_steps", "max_force", "temperature", "timestep", "friction"),
}


@dataclass(frozen=True, slots=True)
class AugmentOptions:
    """What is made of every chosen structure; each method reads the numbers that are its own.

    Attributes:
        method: random, a displacement in random directions; ascent, one step up the gradient of
            the teacher–student difference; relax, frames of a relaxation by the teacher; md, frames
            of molecular dynamics with the teacher's forces.
        seed: of the choice of parents, directions, velocities and frames.
        share: share of the structures that become parents, chosen at random.
        copies: displaced structures per parent.
        norm: Å, length of the displacement.
        norm_of: whose length that is, every atom's or the whole structure's ([n_atoms, 3] as one
            vector).
        keep: share of a trajectory's frames that is kept, chosen at random.
        max_steps: of a trajectory.
        force_goal: eV/Å, largest force at which a relaxation ends.
        temperature: K.
        timestep: fs.
        friction: 1/fs, of the Langevin thermostat.
        max_force: eV/Å; a trajectory ends before the first frame with a larger force component, for
            there the teacher has left what it knows.

    Source: Ekström Kelvinius et al. 2023, section D: 0.1 Å is the smallest norm tried there, 200
    steps the longest relaxation, a tenth the share of frames.
    """

    method: Method = "random"
    seed: int = 0
    share: float = 1.0
    copies: int = 1
    norm: float = 0.1
    norm_of: Literal["atom", "structure"] = "atom"
    keep: float = 0.1
    max_steps: int = 200
    force_goal: float = 0.03
    temperature: float = 300.0
    timestep: float = 1.0
    friction: float = 0.01
    max_force: float = 50.0

    def __post_init__(self) -> None:
        for name in ("share", "keep"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must be above 0 and at most 1, got {self._shown(name)}.")
        for name in ("copies", "max_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {self._shown(name)}.")
        for name in ("norm", "force_goal", "temperature", "timestep", "friction", "max_force"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a positive number, got {self._shown(name)}.")

    @property
    def origin(self) -> str:
        """What the index says of these structures."""
        return "rattled" if self.method in ("random", "ascent") else "synthetic"

    def recipe(self, teacher: str, student: str | None) -> str:
        """Everything the structures depend on beside their parents, as a line of JSON.

        Args:
            teacher: digest.
            student: digest, of the method ascent.
        """
        used = ("method", "seed", "share", *OF_METHOD[self.method])
        values: dict[str, object] = {k: v for k, v in asdict(self).items() if k in used}
        if self.method != "random":
            values["teacher"] = teacher
        if student is not None:
            values["student"] = student
        return f"{self.origin}: {json.dumps(values)}"

    def _shown(self, name: str) -> str:
        return f"{getattr(self, name):g}"
