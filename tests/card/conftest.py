"""A store whose every free text is an attack on whoever shows it, and one with failures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kdcache.fields import FieldSpec
from kdcache.store import add_teacher, create_store, index_from_plan
from kdcache.store.entries import Licences
from tests.store.sample import (
    SEED,
    STRUCTURES,
    TEACHER,
    Sample,
    make_sample,
    teacher_entry,
    write_all,
)

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=https://example.org/x onerror=alert(2)>',
    "</style></pre></title><script>alert(3)</script>",
    "--><svg/onload=alert(4)>",
    "' onmouseover='alert(5)",
    "&lt;b&gt; \\x00 ]]> $\\frac{1}{$ %s {0} javascript:alert(6)",
)
# What has no place in a page at all.
UNPRINTABLE = "before\x01\x1b[31m\ufffeafter"


@pytest.fixture(scope="session")
def sample() -> Sample:
    """The usual sample, with ids that are markup."""
    made = make_sample()
    index = index_from_plan(
        made.plan,
        structure_id=[
            f"{HOSTILE[k % 6]} {structure_id}"
            for k, structure_id in enumerate(made.index.structure_id)
        ],
        content_hash=[row.tobytes() for row in made.index.content_hash],
        source_index=made.index.source_index,
        split=made.index.split,
        group=made.index.group,
        weight=made.index.weight,
    )
    return replace(made, index=index)


@pytest.fixture(scope="session")
def hostile(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("card") / "<b onclick=alert(7)>store.zarr"
    entry = sample.entry.model_copy(
        update={
            "sources": ["<script>alert(8)<script>.xyz"],
            "notes": [*HOSTILE, UNPRINTABLE],
            "keys": {HOSTILE[0]: HOSTILE[1]},
            "units": {"energy": HOSTILE[2]},
            "licences": Licences(structures=HOSTILE[1], labels=HOSTILE[3]),
            "creator": HOSTILE[4],
            "citation": HOSTILE[5],
        }
    )
    writer = create_store(
        path,
        index=sample.index,
        plan=sample.plan,
        fields=STRUCTURES,
        dataset=entry,
        graph=sample.graph,
        seed=SEED,
    )
    write_all(writer, sample)
    fields = (*TEACHER[:-1], replace(TEACHER[-1]), FieldSpec("odd", "atom", (2,), unit=HOSTILE[0]))
    described = teacher_entry(
        fields=fields,
        model=HOSTILE[2],
        architecture={HOSTILE[0]: [HOSTILE[1], UNPRINTABLE]},
        software={HOSTILE[3]: HOSTILE[4]},
        licence=HOSTILE[5],
    )
    write_all(add_teacher(path, "a--b", described, fields), sample)
    return path
