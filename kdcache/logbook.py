"""The numbers of a run as they come: metrics.csv, and TensorBoard where it is asked for.

Invariant: a resumed run cuts the file back to its checkpoint first, so no step stands twice.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from kdcache.errors import ConfigError


class Logbook:
    """Rows of metrics, one per evaluation.

    Args:
        run: run directory.
        step: rows beyond this step are dropped: a killed run wrote them after its checkpoint.
        tensorboard: also write event files to run/tensorboard.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """

    def __init__(self, run: Path, *, step: int = 0, tensorboard: bool = False) -> None:
        self.path = run / "metrics.csv"
        self._rows = [row for row in self._read() if int(row["step"]) <= step]
        self._writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError(
                    "training.tensorboard is on, but TensorBoard is not installed. "
                    "Run: pip install 'kdcache[tensorboard]'"
                ) from error
            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step)

    def __enter__(self) -> Logbook:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, values: Mapping[str, float]) -> None:
        """One row; `values` holds "step". The file is whole after every call."""
        self._rows.append({key: _shown(value) for key, value in values.items()})
        columns = list(dict.fromkeys(key for row in self._rows for key in row))
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows)
        os.replace(partial, self.path)
        if self._writer is not None:
            for key, value in values.items():
                if key != "step":
                    self._writer.add_scalar(key, value, int(values["step"]))

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"  # nine digits are a float32
