"""Stores that are damaged, hostile or none: each refused in one line, before it can do harm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import zarr

from kdcache.errors import KdcacheError
from kdcache.store import Store, create_store, manifest, open_store
from tests.store.sample import STRUCTURES, Sample, begin_structures, write_all

RAW, BLOSC, COMPACT = "teachers/painn/node", "structures/forces", "teachers/painn/vector"


@pytest.fixture(scope="module")
def store(finished: Path) -> Store:
    return open_store(finished)


def refusal(action: Callable[[], object]) -> str:
    """The message, which must be a single line."""
    with pytest.raises(KdcacheError) as raised:
        action()
    message = str(raised.value)
    assert "\n" not in message
    return message


def shard_of(path: Path, field: str, shard: int = 1) -> Path:
    folder = path / field / "c" / str(shard)
    return folder if folder.is_file() else next(f for f in folder.rglob("*") if f.is_file())


@pytest.mark.parametrize("field", [RAW, BLOSC, COMPACT, f"{COMPACT}.scale"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_shard_is_refused(copied: Path, field: str, kept: float) -> None:
    shard = shard_of(copied, field)
    content = shard.read_bytes()
    shard.write_bytes(content[: int(kept * len(content))])
    message = refusal(lambda: open_store(copied).read(field.removesuffix(".scale")))
    assert str(shard) in message
    assert "truncated" in message


@pytest.mark.parametrize("field", [RAW, BLOSC, COMPACT, f"{COMPACT}.scale"])
def test_a_flipped_bit_anywhere_in_a_shard_is_refused(copied: Path, field: str) -> None:
    shard = shard_of(copied, field)
    content = shard.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 40)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        shard.write_bytes(damaged)
        message = refusal(lambda: open_store(copied).read(field.removesuffix(".scale")))
        assert str(shard) in message


def test_other_blocks_of_a_damaged_shard_can_still_be_read(copied: Path, store: Store) -> None:
    shard = shard_of(copied, RAW)
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    first = store.plan.shard_blocks(1).start
    damaged = open_store(copied)
    assert f"block {first}:" in refusal(lambda: damaged.read(RAW, [first]))
    assert np.array_equal(damaged.read(RAW, [first + 1]), store.read(RAW, [first + 1]))


@pytest.mark.parametrize("field", [RAW, BLOSC, f"{COMPACT}.scale"])
def test_a_missing_shard_is_refused_on_opening(copied: Path, field: str) -> None:
    shard = shard_of(copied, field)
    shard.unlink()
    assert f"{shard} is missing (shard 1 of" in refusal(lambda: open_store(copied))


def test_a_shard_that_vanishes_later_is_refused_on_reading(copied: Path) -> None:
    store = open_store(copied)
    shard_of(copied, RAW).unlink()
    assert "is missing" in refusal(lambda: store.read(RAW))


def test_shards_of_another_size_are_not_exchanged(copied: Path) -> None:
    shutil.copy(shard_of(copied, "teachers/painn/message"), shard_of(copied, RAW))
    assert "are expected" in refusal(lambda: open_store(copied))


def test_a_foreign_zarr_is_refused(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "other.zarr").create_array("x", shape=(3,), dtype="f4")
    assert "is Zarr but no kdcache store" in refusal(lambda: open_store(tmp_path / "other.zarr"))


def test_nothing_and_something_else_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(lambda: open_store(tmp_path / "none"))
    assert "is no kdcache store" in refusal(lambda: open_store(tmp_path))
    (tmp_path / "manifest.json").write_text('{"name": "a browser extension"}')
    assert "is not a kdcache manifest" in refusal(lambda: open_store(tmp_path))


def test_an_unfinished_store_says_how_far_it_is(tmp_path: Path, sample: Sample) -> None:
    path = tmp_path / "store.zarr"
    write_all(begin_structures(path, sample), sample, [0, 1])
    message = refusal(lambda: open_store(path))
    assert "unfinished: 2 shards" in message
    assert "again" in message


def edit(path: Path, change: Callable[[dict[str, Any]], object], *, seal: bool = True) -> None:
    """Change the manifest; sealed, it is what a hostile author would publish."""
    document = json.loads((path / "manifest.json").read_text())
    change(document)
    (path / "manifest.json").write_text(json.dumps(document))
    if seal:
        parsed = manifest.Manifest.model_validate_json(json.dumps(document))
        (path / "manifest.json").write_bytes(parsed.sealed().to_bytes())


def test_a_newer_format_is_refused_whatever_else_it_says(copied: Path) -> None:
    edit(copied, lambda m: m.update(format_version=3, new_key={}), seal=False)
    message = refusal(lambda: open_store(copied))
    assert "has format version 3, this kdcache reads 1 to 2. Install a newer kdcache." in message


def test_an_edited_manifest_is_refused(copied: Path) -> None:
    edit(copied, lambda m: m["dataset"]["licences"].update(labels="CC0"), seal=False)
    assert "edited or damaged" in refusal(lambda: open_store(copied))


def taught(document: dict[str, Any], field: str) -> dict[str, Any]:
    """The entry of a teacher's field, which may have any shape and dtype."""
    return cast(dict[str, Any], document["teachers"]["painn"]["fields"][field])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["capacities"].update(atom=2**40), "has block 1, the layout gives 0"),
        (lambda m: m["capacities"].update(edge=2**40), "edge capacity 1099511627776"),
        (lambda m: m["capacities"].update(structure=2**39), "structure capacity"),
        (lambda m: m["capacities"].update(n_blocks=2**40), "n_blocks 1099511627776"),
        (lambda m: m["dataset"].update(n_structures=2**40), "the manifest says 1099511627776"),
        (lambda m: m.update(n_atoms=7), "n_atoms 7"),
        (lambda m: taught(m, "node").update(shape=[2**24, 2**24]), "than a chunk may"),
        (lambda m: taught(m, "node").update(shape=[4]), "has chunk_grid"),
        (lambda m: taught(m, "atomic_energy").update(dtype="int64"), "has attributes"),
        (lambda m: taught(m, "atomic_energy").update(dtype="object"), "has dtype object"),
        (lambda m: m["structures"].pop("energy"), None),
        (lambda m: m["dataset"].update(digest="0" * 64), "says dataset 000000000000"),
        (lambda m: m["digests"].update({"index.parquet": "0" * 64}), "the manifest says 0000"),
    ],
)
def test_a_manifest_that_disagrees_with_the_files_is_refused_before_anything_is_allocated(
    copied: Path, change: Callable[[dict[str, Any]], object], message: str | None
) -> None:
    edit(copied, change)
    if message is None:
        # A field less is a smaller store, as a licence may ask for; what it lists is whole.
        assert "energy" not in open_store(copied).fields("structures")
        return
    assert message in refusal(lambda: open_store(copied))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("forces", {"level": "structure"}, "float64 [3] of each structure"),
        ("forces", {"shape": ()}, "float64 [] of each atom"),
        ("energy", {"shape": (2,)}, "float64 [2] of each structure"),
        ("positions", {"dtype": "float32"}, "float32 [3] of each atom"),
        ("pbc", {"dtype": "uint8"}, "uint8 [3] of each structure"),
        ("edge_index", {"shape": (5,)}, "int32 [5] of each edge"),
    ],
)
def test_a_field_of_fixed_meaning_has_its_shape_and_dtype(
    tmp_path: Path, sample: Sample, name: str, change: dict[str, Any], said: str
) -> None:
    """All documents and digests agree: only the format says otherwise."""
    fields = [replace(spec, **change) if spec.name == name else spec for spec in STRUCTURES]
    path, plan = tmp_path / "store.zarr", sample.plan
    writer = create_store(path, index=sample.index, plan=plan, fields=fields, dataset=sample.entry)
    with writer:
        for shard in range(plan.n_shards):
            arrays = sample.shard(STRUCTURES, shard)
            (spec,) = (spec for spec in fields if spec.name == name)
            rows = int(plan.counts(spec.level)[plan.shard_structures(shard)].sum())
            arrays[name] = np.zeros((rows, *spec.shape), spec.dtype)
            writer.write_shard(shard, arrays)
        writer.commit()
    message = refusal(lambda: open_store(path))
    assert f"structures/{name} is {said} in the manifest, the format has " in message


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["teachers"].update({"../../outside": m["teachers"]["painn"]}),
        lambda m: m["structures"].update({"../x": m["structures"]["energy"]}),
        lambda m: m["digests"].update({"a b": "0" * 64}),
        lambda m: m["structures"]["energy"].update(codec="pickle"),
        lambda m: m["structures"]["energy"].update(shape=[0]),
        lambda m: m["structures"]["energy"].update(shape=[-1]),
        lambda m: m["capacities"].update(atom="12"),
        lambda m: m.update(command="rm"),
        lambda m: m["dataset"].update(sources=["/home/someone/frames.extxyz"]),
        lambda m: m.pop("order"),
    ],
)
def test_a_manifest_outside_the_format_is_refused(
    copied: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(copied, change, seal=False)
    assert "does not follow format 1" in refusal(lambda: open_store(copied))


def test_a_manifest_of_any_size_is_not_read(copied: Path) -> None:
    with open(copied / "manifest.json", "r+b") as file:
        file.truncate(2**40)  # sparse: the disk holds none of it
    assert "is not read" in refusal(lambda: open_store(copied))


@pytest.mark.parametrize("name", ["index.parquet", "zarr.json", "structures/forces/zarr.json"])
def test_a_missing_or_edited_document_is_refused(copied: Path, name: str) -> None:
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content.replace(b"lz4", b"zst") + b" ")
    if name != "zarr.json":
        assert str(copied / name) in refusal(lambda: open_store(copied))
    (copied / name).unlink()
    assert f"{copied / name} is missing" in refusal(lambda: open_store(copied))
