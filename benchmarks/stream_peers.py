"""Other ways to stream the same structures in batches, each as well as we know to use it.

A side is made once (its files are written where they are missing) and then streams from any batch
of an epoch on. Every side gives owned float32 batches with the same fields.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdcache.store import Store
from kdcache.stream.loader import Loader
from kdcache.stream.neighbors import StoredNeighbors
from kdcache.stream.reader import WindowReader
from kdcache.stream.sampler import BlockShuffle
from kdcache.stream.window import Window, make_batch
from kdcache.structures import IntArray

Array = npt.NDArray[Any]
Stream = Callable[[int], Iterator[Any]]  # batches from the start of an epoch on

STRUCTURE = ("atomic_numbers", "positions", "cell", "pbc", "energy", "forces")
FIELDS = tuple(f"structures/{name}" for name in (*STRUCTURE, "edge_index", "edge_shift"))
NODE = "teachers/half/node"


def ours(store: Store, order: BlockShuffle, codec: str = "half") -> Stream:
    """kdcache's loader, as a training run uses it."""
    reader = WindowReader(store, StoredNeighbors(store), teacher_fields=[f"{codec}/node"])
    return _streamed(reader, order)


def memory_map(store: Store, order: BlockShuffle, directory: Path) -> Stream:
    """Flat uncompressed files, mapped; batches gathered from them by our own code and loader."""
    flat = _flat(store, directory)
    arrays = {name.rpartition("/")[2]: array for name, array in flat.items()}
    arrays["half/node"] = arrays.pop("node")
    levels = {name.rpartition("/")[2]: store.spec(name).level for name in flat}
    levels["half/node"] = "atom"
    arrays["weight"], levels["weight"] = store.index.weight, "structure"
    index = store.index
    window = Window(np.arange(len(store)), index.n_atoms, index.n_edges, arrays, levels)
    return _streamed(_Mapped(store, window), order)


class _Mapped:
    """A reader whose every window is all of the mapped files."""

    def __init__(self, store: Store, window: Window) -> None:
        self.store = store
        self.window = window

    def read(self, blocks: IntArray) -> Window:
        return self.window


def memory_map_plain(store: Store, order: BlockShuffle, directory: Path) -> Stream:
    """The same without loader and threads: nothing but gathering, in a loop."""
    stream = memory_map(store, order, directory)
    window = stream.window  # type: ignore[attr-defined]

    def batches(epoch: int) -> Iterator[Any]:
        rows = np.concatenate([plan.rows for plan in order.windows(epoch)])
        for first in range(0, len(rows) - order.batch_size + 1, order.batch_size):
            yield make_batch([window.gather(rows[first : first + order.batch_size])])

    return batches


def public_zarr(store: Store, order: BlockShuffle, library: str) -> Stream:
    """Another Zarr reader under our windows: zarr-python, zarr-python with zarrs, tensorstore."""
    opened = {"zarr": _ZarrPython, "zarrs": _Zarrs, "tensorstore": _Tensorstore}[library](store)
    found = PublicStore(**{item.name: getattr(store, item.name) for item in fields(Store)})
    object.__setattr__(found, "opened", opened)
    return ours(found, order)


class PublicStore(Store):
    """Our store's layout, its values read by another library."""

    def read(self, name: str, blocks: Any = None, **_: Any) -> Array:
        plan, level = self.plan, self.spec(name).level
        chosen = np.asarray(blocks)
        used, capacity = plan.used(level)[chosen], plan.capacity(level)
        starts = np.flatnonzero(np.diff(chosen, prepend=-2) != 1)
        runs = [
            (int(chosen[first]) * capacity, (int(chosen[last - 1]) + 1) * capacity)
            for first, last in zip(starts, [*starts[1:], len(chosen)], strict=True)
        ]
        parts: list[Array] = self.opened.read(name, runs)  # type: ignore[attr-defined]
        blocks_read = (
            part[k : k + capacity] for part in parts for k in range(0, len(part), capacity)
        )
        return np.concatenate([b[:n] for b, n in zip(blocks_read, used, strict=True)])


class _ZarrPython:
    def __init__(self, store: Store) -> None:
        import zarr

        self.arrays = {
            name: zarr.open_array(Path(str(store.path)) / name, mode="r")
            for name in (*FIELDS, NODE)
        }

    def read(self, name: str, runs: Sequence[tuple[int, int]]) -> list[Array]:
        return [np.asarray(self.arrays[name][start:end]) for start, end in runs]


class _Zarrs(_ZarrPython):
    def __init__(self, store: Store) -> None:
        import zarr

        importlib.import_module("zarrs")
        pipeline = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
        with zarr.config.set(pipeline):
            super().__init__(store)


class _Tensorstore:
    def __init__(self, store: Store) -> None:
        import tensorstore

        self.arrays = {
            name: tensorstore.open(
                {
                    "driver": "zarr3",
                    "kvstore": {"driver": "file", "path": str(Path(str(store.path)) / name)},
                }
            ).result()
            for name in (*FIELDS, NODE)
        }

    def read(self, name: str, runs: Sequence[tuple[int, int]]) -> list[Array]:
        # All at once: its own threads read them side by side.
        reads = [self.arrays[name][start:end].read() for start, end in runs]
        return [read.result() for read in reads]


def pickled_lmdb(store: Store, order: BlockShuffle, directory: Path) -> Stream:
    """One pickled PyG Data a structure, as Open Catalyst keeps its datasets."""
    lmdb, geometric = (
        importlib.import_module("lmdb"),
        importlib.import_module("torch_geometric.data"),
    )

    def encode(rows: dict[str, Array]) -> bytes:
        tensors = {name: torch.from_numpy(array) for name, array in rows.items()}
        data = geometric.Data(
            atomic_numbers=tensors["atomic_numbers"].long(),
            pos=tensors["positions"].float(),
            cell=tensors["cell"].float(),
            pbc=tensors["pbc"],
            energy=tensors["energy"].float(),
            force=tensors["forces"].float(),
            edge_index=tensors["edge_index"].long().T.contiguous(),
            cell_offsets=tensors["edge_shift"].float(),
            node=tensors["node"].float(),
            natoms=len(rows["positions"]),
        )
        return pickle.dumps(data, protocol=-1)

    environment = _filled(lmdb, directory / "pickled.lmdb", store, directory, encode)
    random = np.random.default_rng(0)

    def batches(epoch: int) -> Iterator[Any]:
        rows = random.permutation(len(store))
        with environment.begin() as transaction:
            for first in range(0, len(rows) - order.batch_size + 1, order.batch_size):
                chosen = rows[first : first + order.batch_size].tolist()
                data = [pickle.loads(transaction.get(b"%d" % row)) for row in chosen]
                yield geometric.Batch.from_data_list(data)

    return batches


def raw_lmdb(store: Store, order: BlockShuffle, directory: Path) -> Stream:
    """The fields' bytes one after another, a value a structure, read at random without copies."""
    lmdb = importlib.import_module("lmdb")
    names = [*(name.rpartition("/")[2] for name in FIELDS), "node"]
    specs = {name.rpartition("/")[2]: store.spec(name) for name in (*FIELDS, NODE)}
    dtypes = {name: array.dtype for name, array in _flat_short(store, directory).items()}
    # Widest items first, so that every field starts where its dtype may.
    names.sort(key=lambda name: -dtypes[name].itemsize)

    def encode(rows: dict[str, Array]) -> bytes:
        return b"".join(np.ascontiguousarray(rows[name]).tobytes() for name in names)

    environment = _filled(lmdb, directory / "raw.lmdb", store, directory, encode)
    counts = {
        "structure": np.ones(len(store), np.int64),
        "atom": store.index.n_atoms,
        "edge": store.index.n_edges,
    }
    random = np.random.default_rng(0)

    def batches(epoch: int) -> Iterator[Any]:
        order_of_rows = random.permutation(len(store))
        with environment.begin(buffers=True) as transaction:
            for first in range(0, len(order_of_rows) - order.batch_size + 1, order.batch_size):
                chosen = order_of_rows[first : first + order.batch_size]
                values = [transaction.get(b"%d" % row) for row in chosen.tolist()]
                parts: dict[str, list[Array]] = {name: [] for name in names}
                for row, value in zip(chosen.tolist(), values, strict=True):
                    start = 0
                    for name in names:
                        n = int(counts[specs[name].level][row]) * specs[name].row_size
                        parts[name].append(np.frombuffer(value, dtypes[name], n, start))
                        start += n * dtypes[name].itemsize
                yield _joined(parts, specs, chosen, store)

    return batches


def _joined(
    parts: dict[str, list[Array]], specs: dict[str, Any], rows: IntArray, store: Store
) -> Any:
    whole: dict[str, Array] = {}
    for name, found in parts.items():
        array = np.concatenate(found).reshape(-1, *specs[name].shape)
        if array.dtype == np.float16:
            array = torch.from_numpy(array).float().numpy()
        elif array.dtype.kind == "f" or name == "edge_shift":
            array = array.astype(np.float32)
        whole["half/node" if name == "node" else name] = array
    whole["n_atoms"], whole["n_edges"] = store.index.n_atoms[rows], store.index.n_edges[rows]
    whole["rows"] = rows
    return make_batch([whole])


def nvalchemi(store: Store, order: BlockShuffle, directory: Path) -> Stream:
    """nvalchemi-toolkit's loader on its own Zarr format, our order, 16 batches to a read."""
    data = importlib.import_module("nvalchemi.data")
    pipes = importlib.import_module("nvalchemi.data.datapipes")
    backend = importlib.import_module("nvalchemi.data.datapipes.backends.zarr")
    path = directory / "nvalchemi.zarr"
    if not path.exists():
        chunks = backend.ZarrArrayConfig(chunk_size=4096)
        config = backend.ZarrWriteConfig(core=chunks, custom=chunks)
        rows = [
            data.AtomicData(
                atomic_numbers=torch.from_numpy(r["atomic_numbers"].astype(np.int64)),
                positions=torch.from_numpy(r["positions"]).float(),
                cell=torch.from_numpy(r["cell"]).float(),
                pbc=torch.from_numpy(r["pbc"]),
                energy=torch.from_numpy(r["energy"][:, None]).float(),
                forces=torch.from_numpy(r["forces"]).float(),
                neighbor_list=torch.from_numpy(r["edge_index"].astype(np.int64)),
                neighbor_list_shifts=torch.from_numpy(r["edge_shift"].astype(np.int64)),
                node_embeddings=torch.from_numpy(r["node"]).float(),
            )
            for r in _rows(store, directory)
        ]
        backend.AtomicDataZarrWriter(path, config=config).write(rows)
    # Written by its own writer, so its validation of every structure may be left out.
    dataset = pipes.Dataset(pipes.AtomicDataZarrReader(path), device="cpu", skip_validation=True)

    def batches(epoch: int) -> Iterator[Any]:
        rows = np.concatenate([plan.rows for plan in order.windows(epoch)]).tolist()
        loader = pipes.DataLoader(
            dataset, batch_size=order.batch_size, sampler=rows, prefetch_factor=16
        )
        yield from loader

    return batches


def litdata(store: Store, order: BlockShuffle, directory: Path) -> Stream:
    """litdata's streaming dataset of dictionaries of arrays, shuffled, cut by our batch code."""
    library = importlib.import_module("litdata")
    writer = importlib.import_module("litdata.streaming.writer")
    path = directory / "litdata"
    if not (path / "index.json").is_file():
        cache = writer.BinaryWriter(str(path), chunk_bytes="64MB")
        for row, arrays in enumerate(_rows(store, directory)):
            cache[row] = arrays
        cache.done()
        cache.merge()
    dataset = library.StreamingDataset(str(path), shuffle=True, seed=0)
    specs = {name.rpartition("/")[2]: store.spec(name) for name in (*FIELDS, NODE)}

    def batches(epoch: int) -> Iterator[Any]:
        held: list[dict[str, Array]] = []
        for item in dataset:
            held.append(item)
            if len(held) == order.batch_size:
                yield _joined_items(held, specs)
                held = []

    return batches


def _joined_items(items: list[dict[str, Array]], specs: dict[str, Any]) -> Any:
    whole: dict[str, Array] = {}
    for name in items[0]:
        array = np.concatenate([item[name] for item in items])
        if array.dtype == np.float16:
            array = torch.from_numpy(array).float().numpy()
        elif array.dtype.kind == "f" or name == "edge_shift":
            array = array.astype(np.float32)
        whole["half/node" if name == "node" else name] = array
    whole["n_atoms"] = np.array([len(item["positions"]) for item in items])
    whole["n_edges"] = np.array([len(item["edge_index"]) for item in items])
    whole["rows"] = np.arange(len(items))
    return make_batch([whole])


def _streamed(reader: Any, order: BlockShuffle) -> Stream:
    def batches(epoch: int) -> Iterator[Any]:
        with Loader([(reader, order)], start_step=epoch * order.steps_per_epoch) as loader:
            yield from loader

    batches.window = getattr(reader, "window", None)  # type: ignore[attr-defined]
    return batches


def _flat(store: Store, directory: Path) -> dict[str, Array]:
    """Every field in a file of its own, in store order and without padding, mapped."""
    flat = {}
    for name in (*FIELDS, NODE):
        file = directory / f"{name.rpartition('/')[2]}.npy"
        if not file.is_file():
            np.save(file, store.read(name))
        flat[name] = np.load(file, mmap_mode="r")
    return flat


def _flat_short(store: Store, directory: Path) -> dict[str, Array]:
    return {name.rpartition("/")[2]: array for name, array in _flat(store, directory).items()}


def _rows(store: Store, directory: Path) -> Iterator[dict[str, Array]]:
    """The fields of every structure, in store order."""
    flat = _flat(store, directory)
    ends = {
        "structure": np.arange(1, len(store) + 1),
        "atom": np.cumsum(store.index.n_atoms),
        "edge": np.cumsum(store.index.n_edges),
    }
    for row in range(len(store)):
        arrays = {}
        for name, array in flat.items():
            end = ends[store.spec(name).level]
            start = int(end[row - 1]) if row else 0
            arrays[name.rpartition("/")[2]] = np.array(array[start : int(end[row])])
        yield arrays


def _filled(
    lmdb: Any,
    path: Path,
    store: Store,
    directory: Path,
    encode: Callable[[dict[str, Array]], bytes],
) -> Any:
    if not path.exists():
        environment = lmdb.open(str(path), subdir=False, map_size=2**38, sync=False)
        with environment.begin(write=True) as transaction:
            for row, arrays in enumerate(_rows(store, directory)):
                transaction.put(b"%d" % row, encode(arrays), append=False)
        environment.close()
    return lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
