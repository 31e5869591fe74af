"""kill -9 of a training at random points; gone on with, it is the run that was never killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdcache.store import Store
from tests.faults.training import killed_trainings

pytestmark = [pytest.mark.fault, pytest.mark.proof]

POINTS = 5


def test_a_training_killed_anywhere_gives_the_curve_and_the_model_of_one_never_killed(
    taught_store: Store, tmp_path: Path
) -> None:
    # One in each fifth, wherever it falls; one is killed again on its way.
    shares = (np.arange(POINTS) + np.random.default_rng().uniform(size=POINTS)) / POINTS
    attempts = [[share] for share in shares.tolist()]
    attempts[-2].append(0.4)
    whole, found = killed_trainings(Path(str(taught_store.path)), tmp_path, attempts)
    rows, files = whole
    assert [row["step"] for row in rows] == ["2", "4", "6", "8", "10"]
    assert len(files) > 3
    for (killed, held), share in zip(found, shares, strict=True):
        assert killed, share
        assert held == whole, share
