"""What checking every byte costs the stream: checksums compared against not compared.

    python benchmarks/stream_integrity.py [--structures 8000] [--rounds 9] [--json FILE]

Bar [crc_cost]: share of the throughput lost, at most 0.10.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import stream_peers as peers
from bench import alternate, medians, write_json
from stream_store import write_store
from stream_vs_peers import Side

from kdcache.store import Store
from kdcache.stream.sampler import BlockShuffle

BAR = 0.10


class Unchecked(Store):
    """A store whose checksums nobody looks at."""

    def read(self, name: str, blocks: Any = None, **options: Any) -> Any:
        return super().read(name, blocks, **{**options, "check": False})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--structures", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each side in a round")
    parser.add_argument("--work", type=Path, help="keep the store here, and use one that is")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = (arguments.work or Path(temporary)) / "store.zarr"
        store = write_store(path, arguments.structures)
        measure(store, arguments)


def measure(store: Store, arguments: argparse.Namespace) -> None:
    unchecked = Unchecked(**{item.name: getattr(store, item.name) for item in fields(Store)})
    order = BlockShuffle(store.index.block, np.arange(len(store)), batch_size=64, seed=0)
    sides = {
        name: Side(peers.ours(one, order), order, arguments.seconds)
        for name, one in (("checked", store), ("unchecked", unchecked))
    }
    samples = alternate(sides, arguments.rounds)
    cpu = {name: side.cpu[1:] for name, side in sides.items()}
    lost = 1 - medians(samples)["checked"] / medians(samples)["unchecked"]
    lost_cpu = 1 - medians(cpu)["checked"] / medians(cpu)["unchecked"]
    for name, values in samples.items():
        print(
            f"{name:10} {medians(samples)[name]:8,.0f} structures/s ({min(values):,.0f} to "
            f"{max(values):,.0f}), {medians(cpu)[name]:8,.0f} per processor second"
        )
    print(f"[crc_cost] {lost:.3f} (bar {BAR}); by processor time {lost_cpu:.3f}")
    write_json(
        arguments.json,
        {"crc_cost": lost},
        samples,
        per_processor_second=cpu,
        crc_cost_by_processor_time=lost_cpu,
    )


if __name__ == "__main__":
    main()
