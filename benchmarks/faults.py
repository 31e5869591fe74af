"""What kdcache survives: faults of disk, input and reader, each tried many times.

    python benchmarks/faults.py [--only damage …] [--scale 1.0] [--json FILE]

Run from a checkout: the faults are made by tests/faults. Invariant: a fault counts as survived only
where the store, or the training, is afterwards what it would have been, or is refused in one line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fault_cluster  # noqa: E402
import fault_disk  # noqa: E402
import fault_inputs  # noqa: E402
import fault_kills  # noqa: E402
import fault_stores  # noqa: E402
from bench import machine  # noqa: E402
from fault_rows import Row  # noqa: E402

WIDTH = 72

# A fault gets a folder of its own and a scale of its counts, and gives rows of the table.
Fault = Callable[[Path, float], Iterator[Row]]
FAULTS: list[Fault] = [
    *fault_stores.FAULTS, *fault_disk.FAULTS, *fault_inputs.FAULTS, *fault_kills.FAULTS,
    *fault_cluster.FAULTS,
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [fault.__name__ for fault in FAULTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--scale", type=float, default=1.0, help="of how often each is tried")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # Processes of their own find the tests as well.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # What commands of other processes print does not belong into the table.
    table = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    rows: list[Row] = []
    print(f"{'fault':{WIDTH}} {'tried':>6} {'survived':>8} {'lost':>5}  note", file=table)
    for fault in FAULTS:
        if fault.__name__ not in arguments.only:
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            for row in fault(Path(folder), arguments.scale):
                rows.append(row)
                counts = f"{row.tried:6} {row.survived:8} {row.lost:5}"
                print(f"{row.fault:{WIDTH}} {counts}  {row.note}", file=table)
                for loss in row.losses:
                    print(f"  lost: {loss}", file=table)
        print(f"  ({fault.__name__}: {time.perf_counter() - started:.0f} s)", file=table)
    if arguments.json is not None:
        report = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    sys.exit(any(row.lost for row in rows))


if __name__ == "__main__":
    main()
