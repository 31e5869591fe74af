"""Every kind of file that comes in: real small ones, how they are damaged, and what reads them.

Stores are sealed again after the damage, as a hostile author would publish them.
Invariant: an input is given by kind, seed and number alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.checkpoint import (
    MODEL_CARD,
    MODEL_WEIGHTS,
    State,
    load_potential,
    load_state,
    save_potential,
    save_state,
)
from kdcache.config import dump_config, load_config
from kdcache.fields import FieldSpec
from kdcache.models import build_model
from kdcache.pickles import load_restricted
from kdcache.readers import ReadOptions, read_structures
from kdcache.readers.lmdb import _allowed
from kdcache.store import TeacherEntry, add_teacher, open_store, verify_store
from kdcache.store.failures import FAILURES
from kdcache.store.index import INDEX
from kdcache.store.metadata import canonical
from kdcache.teachers.torch_files import read_torch_file
from tests.chain import make_potential, student
from tests.hostile import seeds as real
from tests.hostile.mutations import Generator, mutate
from tests.hostile.structured import (
    mutate_json,
    mutate_npz,
    mutate_parquet,
    mutate_safetensors,
    mutate_shard,
    mutate_xyz,
    mutate_yaml,
)
from tests.readers.identity import numbered_structure
from tests.readers.lmdb_files import record_of, write_lmdb
from tests.store.sample import Sample, make_sample, write_store

Mutator = Callable[[Generator, bytes, Sequence[bytes]], bytes]
# More than any file here holds; a hostile one may go on for ever.
MOST_STRUCTURES = 20_000
TABLES = ReadOptions(energy_unit="eV", unlabelled=True)
# Chosen so that a few bytes stand for many: shards of three blocks, as in the sample.
SHARDS = {"raw": "teachers/painn/node/c/0/0", "blosc": "structures/forces/c/0/0"}


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    Attributes:
        name: of the kind.
        seeds: real files.
        mutators: one is drawn for each input.
        put: places an input below a folder; what is read is below it too.
        read: reads all of it.
        others: further files that pieces are taken from.
        refused: even the real files are.
        weight: how many of them there are among many of all kinds.
    """

    name: str
    seeds: tuple[bytes, ...]
    mutators: tuple[Mutator, ...]
    put: Callable[[Path, bytes], None]
    read: Callable[[Path], object]
    others: tuple[bytes, ...] = ()
    refused: bool = False
    weight: int = 4

    def make(self, seed: int, number: int) -> bytes:
        """The input of a number."""
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), seed, number])
        data = self.seeds[int(rng.integers(len(self.seeds)))]
        mutator = self.mutators[int(rng.integers(len(self.mutators)))]
        return mutator(rng, data, (*self.seeds, *self.others))

    def __call__(self, folder: Path, data: bytes) -> None:
        self.put(folder, data)
        self.read(folder)


def make_kinds(folder: Path) -> dict[str, Kind]:
    """All kinds by name; what they read again and again is made below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    # A store takes a hundredth of a second to open.
    stores = [replace(kind, weight=1) for kind in _store_kinds(folder)]
    found = [*stores, *_checkpoint_kinds(folder), *_data_kinds(folder)]
    return {kind.name: kind for kind in found}


def failing_store(path: Path, sample: Sample) -> Path:
    """A store with a teacher that failed on two structures."""
    write_store(path, sample)
    entry = TeacherEntry.describe(digest="cd" * 32, fields=FAILING, model="numbers")
    with add_teacher(path, "numbers", entry, FAILING) as writer:
        for shard in writer.pending_shards():
            failed = {2: "no reason", 7: "nan"} if shard == 0 else {}
            rows = writer.plan.shard_structures(shard)
            inside = {k: v for k, v in failed.items() if rows.start <= k < rows.stop}
            writer.write_shard(shard, sample.shard(FAILING, shard), failures=inside)
        writer.commit()
    return path


def seal(store: Path, manifest: Mapping[str, Any], changed: Mapping[str, bytes]) -> None:
    """Write files of a store and a manifest that vouches for them."""
    document = dict(manifest) | {"digests": dict(manifest["digests"])}
    for name, content in changed.items():
        (store / name).write_bytes(content)
        document["digests"][name] = hashlib.sha256(content).hexdigest()
    (store / "manifest.json").write_bytes(sealed(document))


def sealed(document: Mapping[str, Any]) -> bytes:
    """A manifest with the root digest of its content."""
    own = {k: v for k, v in document.items() if k not in ("root_digest", "created")}
    try:
        digest = hashlib.sha256(canonical(own)).hexdigest()
    except ValueError:  # a number or text that JSON has not
        digest = "0" * 64
    return json.dumps({**document, "root_digest": digest}).encode("utf-8", "surrogatepass")


def read_whole(store: Path) -> None:
    """Open a store and read every field, failure and structure of it."""
    opened = open_store(store)
    for group in opened.plans:
        for name in opened.fields(group):
            opened.read(f"{group}/{name}")
    for teacher in opened.teachers:
        opened.failures(teacher)
    for _ in opened.structures():
        pass


def read_dataset(name: str, options: ReadOptions, folder: Path) -> None:
    """Read structures of a file to its end, or as many as anybody would wait for."""
    for _ in islice(read_structures(folder / name, options), MOST_STRUCTURES):
        pass


def _store_kinds(folder: Path) -> list[Kind]:
    sample = make_sample((3, 1, 5, 2, 1, 4, 1, 6))
    whole = failing_store(folder / "whole.zarr", sample)
    manifest = json.loads((whole / "manifest.json").read_bytes())
    content = {
        p.relative_to(whole).as_posix(): p.read_bytes() for p in whole.rglob("*") if p.is_file()
    }
    failures = f"teachers/numbers/{FAILURES}"

    def store_in(child: Path) -> Path:
        """One store for a child; each input undoes the last."""
        store = child / "store.zarr"
        if not store.exists():
            shutil.copytree(whole, store)
        return store

    def put(name: str, child: Path, data: bytes) -> None:
        seal(store_in(child), manifest, {name: data})

    def put_manifest(child: Path, data: bytes) -> None:
        file = store_in(child) / "manifest.json"
        try:
            document = json.loads(data)
            # Most are sealed: a wrong root digest would be all that is ever seen.
            data = sealed(document) if len(data) % 5 and isinstance(document, dict) else data
        except (ValueError, RecursionError):
            pass
        file.write_bytes(data)

    def kind(name: str, file: str, mutators: Sequence[Mutator]) -> Kind:
        seeds, shared = (content[file],), partial(put, file)
        return Kind(name, seeds, tuple(mutators), shared, lambda f: read_whole(f / "store.zarr"))

    raw, blosc = SHARDS["raw"], SHARDS["blosc"]
    shard = partial(mutate_shard, entries=sample.plan.blocks_per_shard)

    def read_verified(child: Path) -> None:
        verify_store(child / "store.zarr")

    return [
        Kind(
            "manifest.json",
            (content["manifest.json"],),
            (mutate_json, mutate_json, mutate_json, mutate),
            put_manifest,
            lambda f: read_whole(f / "store.zarr"),
        ),
        kind("index.parquet", INDEX, [mutate_parquet, mutate_parquet, mutate]),
        kind("failures.parquet", failures, [mutate_parquet, mutate_parquet, mutate]),
        kind("zarr.json of an array", "structures/forces/zarr.json", [mutate_json, mutate]),
        kind("zarr.json of the store", "zarr.json", [mutate_json, mutate]),
        kind("shard, raw", raw, [shard, shard, mutate]),
        kind("shard, Blosc", blosc, [shard, shard, mutate]),
        Kind(
            "shard, verified",
            (content[blosc],),
            (shard, mutate),
            partial(put, blosc),
            read_verified,
        ),
    ]


SMALLEST: dict[str, dict[str, object]] = {
    "schnet": {"hidden_channels": 8, "num_filters": 8, "num_interactions": 1},
    "gemnet-oc": {"num_blocks": 1, "emb_size_edge": 8, "emb_size_atom": 8},
}
FAILING = (FieldSpec("node", "atom", (5,), codec="half"),)


def _checkpoint_kinds(folder: Path) -> list[Kind]:
    run = folder / "run"
    potential = make_potential()
    save_potential(run, potential, {"metrics": {"mae": 0.5}})
    weights = potential.model.state_dict()
    state = State(3, {"model": weights}, {"identity": {"store": "ab", "configuration": "{}"}})
    save_state(run, state)
    newest = "state/step-000000003"

    def put(name: str, child: Path, data: bytes) -> None:
        if not (child / "run").exists():
            shutil.copytree(run, child / "run")
        (child / "run" / name).write_bytes(data)

    def kind(name: str, file: str, mutators: tuple[Mutator, ...], read: Any) -> Kind:
        return Kind(name, ((run / file).read_bytes(),), mutators, partial(put, file), read)

    def model(child: Path) -> None:
        load_potential(child / "run")

    def training(child: Path) -> None:
        load_state(child / "run")

    # Architectures are imported when they are named: of kdcache's own, so that is no defect.
    for name in ("schnet", "gemnet-oc"):
        build_model({"name": name, **SMALLEST.get(name, {})})
    stored = f"{newest}/model.safetensors"
    return [
        kind("model.json", MODEL_CARD, (mutate_json, mutate_json, mutate), model),
        kind("model.safetensors", MODEL_WEIGHTS, (mutate_safetensors, mutate), model),
        kind("state.json", f"{newest}/state.json", (mutate_json, mutate), training),
        kind("state, safetensors", stored, (mutate_safetensors, mutate), training),
        _torch_kind(allow_pickle=False),
        _torch_kind(allow_pickle=True),
    ]


def _torch_kind(*, allow_pickle: bool) -> Kind:
    seeds = []
    for modern in (True, False):
        sink = io.BytesIO()
        content = {"state_dict": {"a": torch.arange(6.0).reshape(2, 3)}, "epoch": 3, "name": "x"}
        torch.save(content, sink, _use_new_zipfile_serialization=modern)
        seeds.append(sink.getvalue())

    def put(child: Path, data: bytes) -> None:
        (child / "teacher.pt").write_bytes(data)

    def read(child: Path) -> None:
        read_torch_file(child / "teacher.pt", allow_pickle=allow_pickle)

    name = f"teacher.pt{', --allow-pickle' if allow_pickle else ''}"
    return Kind(name, tuple(seeds), (mutate,), put, read)


def _data_kinds(folder: Path) -> list[Kind]:
    def kind(
        name: str,
        file: str,
        seeds: Sequence[bytes],
        *mutators: Mutator,
        options: ReadOptions = TABLES,
        refused: bool = False,
    ) -> Kind:
        def put(child: Path, data: bytes) -> None:
            (child / file).write_bytes(data)

        read = partial(read_dataset, file, options)
        return Kind(name, tuple(seeds), mutators, put, read, refused=refused)

    structures = [numbered_structure(s) for s in range(5)]
    lmdb = write_lmdb(folder / "records.lmdb", structures).read_bytes()
    records = tuple(record_of(s, i) for i, s in enumerate(structures))
    return [
        Kind(
            "configuration, YAML",
            (dump_config(student("loss.energy=mse", strategy="n2n")).encode(), real.YAML),
            (mutate_yaml, mutate_yaml, mutate),
            lambda child, data: (child / "run.yaml").write_bytes(data) and None,
            lambda child: load_config(child / "run.yaml"),
        ),
        kind("extended XYZ", "data.extxyz", [real.XYZ, real.XYZ_MASKED], mutate, mutate_xyz),
        kind(
            "npz", "data.npz", [real.npz(stacked=False), real.npz(stacked=True)], mutate, mutate_npz
        ),
        kind("HDF5", "data.h5", [real.hdf5(packed=False), real.hdf5(packed=True)], mutate),
        kind("Parquet", "data.parquet", real.parquet(), mutate_parquet, mutate_parquet, mutate),
        kind("LMDB without --allow-pickle", "data.lmdb", [lmdb], mutate, refused=True),
        Kind(
            "Open Catalyst record",
            records,
            (mutate,),
            lambda child, data: (child / "record").write_bytes(data) and None,
            lambda child: load_restricted((child / "record").read_bytes(), _allowed()),
        ),
    ]
