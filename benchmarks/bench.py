"""What every benchmark here shares: sides that alternate, the machine's description, the report."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

PACKAGES = ("kdcache", "torch", "numpy", "zarr", "numcodecs")


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every side in turn, so that other work on the machine hits all alike.

    Args:
        sides: by name; each measures itself and returns seconds or a rate.
        rounds: that count; one more before them warms up and is dropped.

    Returns:
        What each side measured, round by round.
    """
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(rounds + 1):
        for name, measure in sides.items():
            value = measure()
            if repeat:
                samples[name].append(value)
    return samples


def medians(samples: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of every side."""
    return {name: statistics.median(values) for name, values in samples.items()}


def machine() -> dict[str, Any]:
    """Processor, cores, memory, accelerator and threads of this process."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def versions(*more: str) -> dict[str, str]:
    """Of Python, our own packages and those named."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_json(
    path: Path | None, bars: Mapping[str, float], samples: Mapping[str, Any], **more: Any
) -> None:
    """The report of a benchmark; nothing without a path.

    Args:
        path: of the file.
        bars: the ratios a claim is about, by name.
        samples: everything that was measured.
        more: sizes, settings, medians.
    """
    if path is None:
        return
    report = {
        "bars": dict(bars),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        **more,
        "samples": dict(samples),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, default=_plain) + "\n")


def peak_memory(prepare: Callable[..., Callable[[], object]], *arguments: object) -> float:
    """MB that a call adds at its peak to what was there before, in a process of its own.

    Linux only: elsewhere there is no peak to reset.

    Args:
        prepare: of a module's top level; gives the call that is measured.
        arguments: of `prepare`.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_peak, prepare, arguments, torch.get_num_threads()).result()


def _peak(
    prepare: Callable[..., Callable[[], object]], arguments: tuple[object, ...], threads: int
) -> float:
    torch.set_num_threads(threads)
    work = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) / 1024.0
    raise RuntimeError(f"/proc/self/status has no {field}")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} does not belong in a report")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
