"""Hostile inputs of every kind that is read, many of them: what is accepted, refused, or a defect.

    python benchmarks/fuzz.py [--inputs 120000] [--seed 0] [--only npz …] [--json FILE]

Run from a checkout: kinds and damage are those of tests/hostile. Invariant: an input is given by
kind, seed and number, so every defect can be had again (--again "npz" 17).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import machine  # noqa: E402

from tests.hostile.kinds import Kind, make_kinds  # noqa: E402
from tests.hostile.watch import HANG, MAX_RESIDENT, Found, feed_many, warm_up  # noqa: E402

WIDTH = 30
# Inputs of one child: its memory and its folder begin anew after so many.
AT_ONCE = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=120_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--again", nargs=2, metavar=("KIND", "NUMBER"), help="feed one, unwatched")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kinds = make_kinds(Path(folder) / "made")
        if arguments.again:
            name, number = arguments.again
            data = kinds[name].make(arguments.seed, int(number))
            place = Path(folder) / "again"
            place.mkdir()
            print(f"{len(data)} bytes: {data[:2000]!r}")
            kinds[name](place, data)
            return
        chosen = [kinds[name] for name in arguments.only or kinds]
        rows = fuzz(chosen, Path(folder), arguments.inputs, arguments.seed)
    if arguments.json is not None:
        limits = {"hang_s": HANG, "resident_bytes": MAX_RESIDENT, "seed": arguments.seed}
        report = {"machine": machine(), "limits": limits, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    sys.exit(any(row["defects"] for row in rows))


def fuzz(kinds: list[Kind], folder: Path, n_inputs: int, seed: int) -> list[dict[str, object]]:
    """A row per kind, printed as it is done."""
    weights = sum(kind.weight for kind in kinds)
    print(
        f"{'kind':{WIDTH}} {'inputs':>7} {'accepted':>8} {'refused':>7} {'defects':>7} "
        f"{'most MiB':>8} {'longest s':>9} {'s':>6}"
    )
    rows = []
    for kind in kinds:
        started, found = time.perf_counter(), Found()
        each = -(-n_inputs * kind.weight // weights)
        warm_up(kind, folder / "warm" / str(len(rows)))
        for start in range(0, each, AT_ONCE):
            with tempfile.TemporaryDirectory(dir=folder) as child:
                numbers = range(start, min(start + AT_ONCE, each))
                found.add(
                    feed_many(lambda k, of=kind: of.make(seed, k), kind, numbers, Path(child))
                )  # type: ignore[misc]
        took = time.perf_counter() - started
        wrong = len({number for number, _ in found.defects})
        print(
            f"{kind.name:{WIDTH}} {found.tried:7} {found.accepted:8} {found.refused:7} {wrong:7} "
            f"{found.peak / 2**20:8.1f} {found.slowest:9.2f} {took:6.0f}",
            flush=True,
        )
        first = {what: number for number, what in reversed(found.defects)}
        kinds_of_defect = Counter(what for _, what in found.defects)
        for what, count in kinds_of_defect.most_common(20):
            print(f"  {count} times, first number {first[what]}: {what}", flush=True)
        rows.append({"kind": kind.name, "seconds": round(took, 1), **asdict(found)})
    totals = Counter[str]()
    for row in rows:
        totals.update({key: row[key] for key in ("tried", "accepted", "refused", "seconds")})
    print(
        f"{'all':{WIDTH}} {totals['tried']:7} {totals['accepted']:8} {totals['refused']:7} "
        f"{sum(len(row['defects']) for row in rows):7} {'':8} {'':9} {totals['seconds']:6.0f}"  # type: ignore[arg-type]
    )
    return rows


if __name__ == "__main__":
    main()
