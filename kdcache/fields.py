"""What a stored or computed quantity is: its name, level, shape, unit, symmetry, codec.

Names only, no arrays: a store, a stream and a loss act on a field's level and symmetry alone, so
a new kind of feature needs no change anywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Level = Literal["structure", "atom", "edge"]
Symmetry = Literal["invariant", "vector"]
Codec = Literal["half", "exact", "compact"]

LEVELS: tuple[Level, ...] = get_args(Level)
SYMMETRIES: tuple[Symmetry, ...] = get_args(Symmetry)
CODECS: tuple[Codec, ...] = get_args(Codec)


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One field of a dataset or of a teacher.

    Attributes:
        name: lower-case letters, digits and underscores; unique within its group.
        level: what one row belongs to.
        shape: trailing shape of one row; () for a scalar. A vector field is (3,) or (3, C).
        dtype: numpy name of the values as computed, before any codec.
        unit: "eV", "Å", "eV/Å" or "" where there is none.
        symmetry: "vector" turns with the structure, "invariant" does not.
        codec: how the store keeps it: "half" float16, "exact" lossless, "compact" int8 per channel.
    """

    name: str
    level: Level
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    unit: str = ""
    symmetry: Symmetry = "invariant"
    codec: Codec = "exact"

    @property
    def row_size(self) -> int:
        """Values in one row."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size


ATOMIC_NUMBERS = FieldSpec("atomic_numbers", "atom", dtype="uint8")
POSITIONS = FieldSpec("positions", "atom", (3,), "float64", "Å", "vector")
CELL = FieldSpec("cell", "structure", (3, 3), "float64", "Å", "vector")
PBC = FieldSpec("pbc", "structure", (3,), "bool")
ENERGY = FieldSpec("energy", "structure", (), "float64", "eV")
FORCES = FieldSpec("forces", "atom", (3,), "float64", "eV/Å", "vector")
TAGS = FieldSpec("tags", "atom", dtype="uint8")
FIXED = FieldSpec("fixed", "atom", dtype="bool")
EDGE_INDEX = FieldSpec("edge_index", "edge", (2,), "int32")
EDGE_SHIFT = FieldSpec("edge_shift", "edge", (3,), "int16")

# The ground truth, in every store. Energy and forces are NaN where a structure has no label.
STRUCTURE_FIELDS: tuple[FieldSpec, ...] = (ATOMIC_NUMBERS, POSITIONS, CELL, PBC, ENERGY, FORCES)

# What some datasets say of their atoms, kept only where one does. A structure that says nothing has
# tags of 2 and no fixed atom.
OPTIONAL_FIELDS: tuple[FieldSpec, ...] = (TAGS, FIXED)

# The neighbour list of the store's graph rule, where it is kept. Row (source, target) counted from
# the structure's first atom; edge_shift is the integer cell shift of the source image.
GRAPH_FIELDS: tuple[FieldSpec, ...] = (EDGE_INDEX, EDGE_SHIFT)

# Edges of a teacher's own, kept beside its edge features; the writer adds the counts, from which
# the layout of the teacher's edge fields follows.
N_EDGES = FieldSpec("n_edges", "structure", (), "int64")
