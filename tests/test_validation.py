"""What of the validation structures stays in memory, and what does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kdcache import validation
from kdcache.store import Store
from kdcache.stream.reader import WindowReader, sequential
from kdcache.structures import Batch, IntArray
from kdcache.train import train_student
from tests.chain import loss_curve, student


@pytest.mark.parametrize(("room", "expected"), [(2**30, 1), (2000, 4), (0, 4)])
def test_what_fits_is_read_once_and_the_rest_each_time(
    room: int,
    expected: int,
    taught_store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = student("training.max_steps=8", "training.eval_every=2")
    whole = train_student(taught_store.path, tmp_path / "whole", config)
    passes = []

    def read(reader: WindowReader, rows: IntArray, max_atoms: int) -> Iterator[Batch]:
        passes.append(len(rows))
        # More than one batch, so that some of them fit and some do not.
        for row in rows:
            yield from sequential(reader, np.array([row]), max_atoms)

    monkeypatch.setattr(validation, "sequential", read)
    monkeypatch.setattr(validation, "KEPT_BYTES", room)
    found = train_student(taught_store.path, tmp_path / "run", config)
    assert len(passes) == expected
    assert whole is not None
    assert found is not None
    assert whole.validation is not None
    assert found.validation is not None
    assert found.validation.as_dict() == pytest.approx(whole.validation.as_dict(), rel=1e-5)
    for column in ("val_energy_mae_mev", "val_force_mae_mev_per_a"):
        ours, others = (loss_curve(tmp_path / run, column) for run in ("run", "whole"))
        assert [float(x) for x in ours if x] == pytest.approx(
            [float(x) for x in others if x], rel=1e-5
        )
