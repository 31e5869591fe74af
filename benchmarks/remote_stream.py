"""Training batches from a store behind HTTP: without a cache, filling one, from one, from a disk.

    python benchmarks/remote_stream.py [--structures 2000] [--latency 0.02] [--json FILE]

A server on this machine waits `--latency` seconds before every answer. Each side streams an epoch
through the loader of a training run, no student behind it, from a store opened anew:

local        from the disk
warm         from the server, every shard in the local cache
filling      from the server, into an empty cache
streamed     from the server, without a cache
one_by_one   the same with the ranges of a window asked for one after another

`warm_over_local` and `streamed_over_one_by_one` are ratios of structures/s. Also printed: requests
of an epoch and of a window. Batches of all sides are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
from bench import alternate, medians, write_json
from stream_store import RULE, write_store

from kdcache.store import Store, open_store
from kdcache.store.location import StoreUrl
from kdcache.store.remote import RemoteFiles
from kdcache.stream.loader import Loader
from kdcache.stream.neighbors import neighbors_for
from kdcache.stream.reader import WindowReader
from kdcache.stream.sampler import BlockShuffle
from kdcache.structures import Batch

BATCH = 32
SIDES = ("local", "warm", "filling", "streamed", "one_by_one")


class OneByOne(RemoteFiles):
    """Asks for a range when it is read."""

    is_remote = False

    def size(self, name: str) -> int:  # asked of every shard when a local store is opened
        raise NotImplementedError


def serve(root: Path, latency: float, port: Any, requests: Synchronized[int]) -> None:
    """Serve a folder until the process is ended."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET(with_body=False)

        def do_GET(self, with_body: bool = True) -> None:
            with requests.get_lock():
                requests.value += 1
            time.sleep(latency)
            file = root / self.path.lstrip("/")
            size = file.stat().st_size
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            first, last = (asked[1], asked[2]) if asked else ("0", "")
            start = int(first) if first else max(0, size - int(last))
            end = min(size, int(last) + 1) if first and last else size
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(end - start))
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.end_headers()
            if with_body:
                with open(file, "rb") as content:
                    content.seek(start)
                    self.wfile.write(content.read(end - start))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    port.send(server.server_port)
    server.serve_forever()


def opened(side: str, path: Path, url: StoreUrl, scratch: Path) -> Store:
    """The store as a side reads it."""
    if side == "local":
        return open_store(path)
    if side == "warm":
        return open_store(url, cache=scratch / "warm")
    if side == "filling":
        shutil.rmtree(scratch / "filling", ignore_errors=True)
        return open_store(url, cache=scratch / "filling")
    files = RemoteFiles(url)
    store = open_store(files)
    if side == "one_by_one":
        files.__class__ = OneByOne
    return store


def sampler_of(store: Store, window_blocks: int) -> BlockShuffle:
    return BlockShuffle(
        store.index.block,
        np.arange(len(store)),
        batch_size=BATCH,
        seed=0,
        window_blocks=window_blocks,
    )


def epoch(store: Store, window_blocks: int) -> Iterator[Batch]:
    """Batches of one epoch, as a training run gets them."""
    sampler = sampler_of(store, window_blocks)
    reader = WindowReader(
        store, neighbors_for(store, RULE, Path("unused")), teacher_fields=["half/node"]
    )
    with Loader([(reader, sampler)]) as loader:
        yield from islice(loader, sampler.steps_per_epoch)


def rate(side: str, path: Path, url: StoreUrl, scratch: Path, window_blocks: int) -> float:
    """Structures/s of an epoch; opening the store is not counted."""
    store = opened(side, path, url, scratch)
    started = time.perf_counter()
    n_structures = sum(batch.n_structures for batch in epoch(store, window_blocks))
    return n_structures / (time.perf_counter() - started)


def check_same(stores: dict[str, Store], window_blocks: int) -> None:
    """Raise where two sides give other batches."""
    epochs = [epoch(store, window_blocks) for store in stores.values()]
    for batches in zip(*epochs, strict=True):
        first = batches[0]
        for batch in batches[1:]:
            same = (
                first.positions.equal(batch.positions)
                and first.edge_index.equal(batch.edge_index)
                and first.teacher["half/node"].equal(batch.teacher["half/node"])
            )
            if not same:
                raise SystemExit("the sides give other batches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--structures", type=int, default=2000)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--window-blocks", type=int, default=8)
    parser.add_argument("--latency", type=float, default=0.02, help="seconds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    context = multiprocessing.get_context("fork")
    requests = context.Value("q", 0)
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        path = scratch / "features.zarr"
        server = context.Process(
            target=serve, args=(scratch, options.latency, there, requests), daemon=True
        )
        server.start()
        try:
            write_store(path, options.structures, options.channels, ["half"])
            url = StoreUrl(f"http://127.0.0.1:{here.recv()}/features.zarr")
            window = options.window_blocks
            check_same({side: opened(side, path, url, scratch) for side in SIDES}, window)
            counts = {}
            for side in SIDES:
                store = opened(side, path, url, scratch)
                before = requests.value
                for _ in epoch(store, window):
                    pass
                counts[side] = requests.value - before
            store = open_store(path)
            n_windows = len(sampler_of(store, window).windows(0))
            measure = {side: partial(rate, side, path, url, scratch, window) for side in SIDES}
            samples = alternate(measure, options.rounds)
        finally:
            server.terminate()
            server.join()
    middle = medians(samples)
    print(
        f"{options.structures} structures, {store.plan.n_blocks} blocks in {store.plan.n_shards} "
        f"shards, {n_windows} windows an epoch, {1000 * options.latency:.0f} ms a request"
    )
    for side in SIDES:
        print(
            f"{side:<11} {middle[side]:>9.0f} structures/s   {counts[side]:>5} requests an epoch, "
            f"{counts[side] / n_windows:.1f} a window"
        )
    bars = {
        "warm_over_local": middle["warm"] / middle["local"],
        "streamed_over_one_by_one": middle["streamed"] / middle["one_by_one"],
    }
    for key, value in bars.items():
        print(f"{key:<26} {value:.2f}")
    settings = {k: v for k, v in vars(options).items() if k != "json"}
    write_json(options.json, bars, samples, medians=middle, requests=counts, settings=settings)


if __name__ == "__main__":
    main()
