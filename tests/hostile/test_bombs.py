"""Small files that stand for large ones, or lead elsewhere: refused by name, before they cost."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
from crc32c import crc32c

from tests.hostile import bombs, seeds, thrift
from tests.hostile.conftest import Feeding
from tests.hostile.kinds import TABLES, Kind, read_dataset
from tests.hostile.watch import Found, feed_many

pytestmark = pytest.mark.hostile

PARQUET = seeds.parquet()
LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 10)]
)
MERGES = "\n".join(
    ["a0: &a0 {x: 1}"]
    + [f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 9)}]}}" for k in range(1, 10)]
)


def refused(found: Found, message: str) -> None:
    assert (found.defects, found.refused) == ([], 1), found
    assert message in found.said


NPZ: dict[str, tuple[Callable[[], bytes], str]] = {
    "zeros": (bombs.npz_zeros, "would take"),
    "objects": (bombs.npz_objects, "holds Python objects"),
    "objects in a header": (lambda: bombs.npz_member(bombs.header("|O")), "holds Python objects"),
    "a shape": (
        lambda: bombs.npz_member(bombs.header(shape="(2, 100000000000, 3)")),
        "would take 4800000000000",
    ),
    "a shape, column-major": (
        lambda: bombs.npz_member(bombs.header(shape="(2, 100000000000, 3)", order="True")),
        "would take",
    ),
    "a shape that wraps around": (
        lambda: bombs.npz_member(bombs.header(shape="(4294967296, 4294967296, 3)")),
        "would take",
    ),
    "a negative shape": (lambda: bombs.npz_member(bombs.header(shape="(-2, 3, 3)")), "[-2, 3, 3]"),
    "texts of no width": (lambda: bombs.npz_member(bombs.header("|S0")), "numbers or texts"),
    "wide texts": (lambda: bombs.npz_member(bombs.header("<U99999999")), "numbers or texts"),
    "records": (lambda: bombs.npz_member(bombs.header("|V8")), "numbers or texts"),
    "bzip2": (lambda: bombs.npz_member(bombs.header(), method=zipfile.ZIP_BZIP2), "method 12"),
    "LZMA": (lambda: bombs.npz_member(bombs.header(), method=zipfile.ZIP_LZMA), "method 14"),
}


@pytest.mark.parametrize("name", NPZ)
def test_an_npz_that_is_more_than_it_seems_is_refused(name: str, fed: Feeding) -> None:
    make, message = NPZ[name]
    refused(fed("npz", make()), message)


HDF5: dict[str, tuple[Callable[[], bytes], str]] = {
    "never written": (
        lambda: bombs.hdf5_with(shape=(10**12, 3, 3), chunks=(8, 3, 3)),
        "would take",
    ),
    "extents that wrap around": (
        lambda: bombs.hdf5_with(shape=(2**40, 2**20, 3), chunks=(8, 8, 3)),
        "would take",
    ),
    "zeros": (bombs.hdf5_zeros, "would take 1207959552"),
    "an unknown filter": (lambda: bombs.hdf5_filter(32015), "packed by the filter 32015"),
    "objects": (
        lambda: bombs.hdf5_typed(h5py.vlen_dtype(np.float64)),
        "holds object, and numbers or texts",
    ),
    "references": (lambda: bombs.hdf5_typed(h5py.ref_dtype), "holds object"),
    "records": (lambda: bombs.hdf5_typed([("a", "f8"), ("b", "i4")]), "numbers or texts"),
    "a circle": (lambda: bombs.hdf5_linked("circle", Path("/")), "has no group with one of"),
    "depth": (bombs.hdf5_deep, "has no group with one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", HDF5)
def test_an_hdf5_that_is_more_than_it_seems_is_refused(name: str, fed: Feeding) -> None:
    make, message = HDF5[name]
    refused(fed("HDF5", make()), message)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("external link", "has no group with one of"),
        ("soft link", "has no group with one of"),
        ("virtual dataset", "takes its values from another file"),
        ("external storage", "takes its values from another file"),
    ],
)
def test_an_hdf5_leads_to_no_other_file(
    kind: str, message: str, fed: Feeding, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("private") / "other.h5"
    elsewhere.write_bytes(bombs.hdf5_with())
    refused(fed("HDF5", bombs.hdf5_linked(kind, elsewhere)), message)


@pytest.mark.parametrize(
    ("packed", "text"), [("gz", "line"), ("bz2", "line"), ("xz", "line"), ("gz", "atoms")]
)
def test_text_that_is_mostly_packed_is_refused(
    packed: str, text: str, warm: Callable[[str], Kind], tmp_path: Path
) -> None:
    kind = warm("extended XYZ")
    name = f"data.xyz.{packed}"
    kind = Kind(
        kind.name, kind.seeds, kind.mutators,
        lambda folder, data: (folder / name).write_bytes(data) and None,
        partial(read_dataset, name, TABLES),
    )  # fmt: skip
    data = bombs.xyz_packed(packed, text)
    # Lines are held until their structure is whole. LZMA itself takes 64 MiB.
    found = feed_many(lambda _: data, kind, range(1), tmp_path, max_resident=2**27)
    refused(found, "more than 1,048,576 characters" if text == "line" else "would take")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Properties=species:S:1:pos:R:99999999", "'pos' has 99999999 columns"),
        ("Properties=species:S:1:pos:R:-3", "'pos' has -3 columns"),
        ("Properties=species:S:1:pos:R:0", "'pos' has 0 columns"),
        ('energy="_JSON ' + "[" * 5000 + '"', "is no extended XYZ"),
    ],
)
def test_columns_and_values_that_are_absurd_are_refused(
    line: str, message: str, fed: Feeding
) -> None:
    refused(fed("extended XYZ", f"1\n{line}\nH 0 0 0\n".encode()), message)


def test_a_count_of_atoms_beyond_the_file_is_refused(fed: Feeding) -> None:
    refused(fed("extended XYZ", b"9999999\n\nH 0 0 0\n"), "ends after 1 of 9999999 atoms")


PARQUETS: dict[str, tuple[Callable[[], bytes], str]] = {
    "one long row": (bombs.parquet_row, "would take"),
    "one long row, packed": (lambda: bombs.parquet_row("zstd"), "would take"),
    "texts as differences": (lambda: bombs.parquet_text("delta"), "encoding 7, which is not read"),
    "a page of other values": (
        lambda: bombs.parquet_page(1, bombs.MANY, PARQUET[0]),
        "and has pages of",
    ),
    "a page that says more bytes": (
        lambda: bombs.parquet_page(2, 2**31 - 1, PARQUET[1]),
        "would take 2147",
    ),
    "an unknown codec": (
        lambda: bombs.parquet_footer(lambda f: thrift.put(bombs.first_chunk(f), 4, -1), PARQUET[0]),
        "unknown codec -1",
    ),
    "another file": (
        lambda: bombs.parquet_footer(
            lambda f: thrift.get(thrift.get(f, 4).values[0], 1).values[0].insert(
                0, thrift.Field(1, thrift.BINARY, b"/etc/passwd")
            ),
            PARQUET[0],
        ),
        "a column in another file",
    ),
    "a deep schema": (
        lambda: bombs.parquet_footer(
            lambda f: [thrift.get(f, 2).values.insert(1, _group()) for _ in range(40)],
            PARQUET[0],
        ),
        "no tree, or too deep",
    ),
    "rows that are not there": (
        lambda: bombs.parquet_footer(lambda f: thrift.put(f, 3, 2**40), PARQUET[0]),
        "1099511627776 rows, 6 in its row groups",
    ),
}  # fmt: skip


def _group() -> thrift.Struct:
    return [
        thrift.Field(3, thrift.I32, 0),
        thrift.Field(4, thrift.BINARY, b"g"),
        thrift.Field(5, thrift.I32, 1),
    ]


@pytest.mark.parametrize("name", PARQUETS)
def test_a_parquet_that_is_more_than_it_seems_is_refused(name: str, fed: Feeding) -> None:
    make, message = PARQUETS[name]
    refused(fed("Parquet", make()), message)


def test_a_long_text_that_every_row_repeats_is_held_once(fed: Feeding) -> None:
    found = fed("Parquet", bombs.parquet_text("dictionary"))
    assert (found.defects, found.accepted) == ([], 1), found


@pytest.mark.parametrize("name", ["index.parquet", "failures.parquet"])
def test_tables_of_a_store_are_held_to_their_sizes(
    name: str, fed: Feeding, kinds: dict[str, Kind]
) -> None:
    (whole,) = kinds[name].seeds
    many = bombs.MANY
    for data, message in (
        (bombs.parquet_page(1, many, whole), "and has pages of"),
        (bombs.parquet_page(2, 2**31 - 1, whole), "that says"),
        (bombs.parquet_footer(lambda f: thrift.put(f, 3, many), whole), "rows, "),
    ):
        refused(fed(name, data), message)
    for number, value, message in ((4, 99, "codec 99"), (4, 6, "compressed"), (5, many, "values")):
        data = bombs.parquet_footer(
            lambda f, n=number, v=value: thrift.put(bombs.first_chunk(f), n, v),  # type: ignore[misc]
            whole,
        )
        refused(fed(name, data), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "its aliases stand for more than 100,000 values"),
        (MERGES, "its aliases stand for more than 100,000 values"),
        ("a: &a [*a]", "is not valid YAML"),
        ("training: " + "[" * 900 + "]" * 900, "more than 50 levels"),
        ("training: " + "{a: " * 60 + "1" + "}" * 60, "more than 50 levels"),
        ("a: " + "[" * 100_000, "more than 50 levels"),
        ("\n".join(["[" * 40, "[" * 5000]), "more than 50 levels"),
        ("- " * 5000, "more than 50 levels"),
        ("training: {max_steps: " + "9" * 5000 + "}", "is not valid YAML"),
        ("a: " + "x" * 2**21, "has more than 131,072 characters"),
        ('a: !!python/object/apply:os.system ["true"]', "is not valid YAML"),
        ("a: 0x_", "is not valid YAML"),
        ("a: 2001-99-99", "is not valid YAML"),
        ("a: !!map [b]", "is not valid YAML"),
        ("? [a, b]\n: c", "is not valid YAML"),
        ('"\\e[2J": 1', "unknown key ?[2J"),
        ("training: {max_steps: " + "x" * 9000 + "}", "training.max_steps"),
    ],
)
def test_yaml_that_grows_or_runs_is_refused(text: str, message: str, fed: Feeding) -> None:
    refused(fed("configuration, YAML", text.encode()), message)


def test_a_chunk_whose_frame_lies_about_its_sizes_is_refused(
    fed: Feeding, kinds: dict[str, Kind]
) -> None:
    """Checksums and digests are right: only the frame of Blosc is not."""
    (whole,) = kinds["shard, Blosc"].seeds
    (size,) = struct.unpack_from("<Q", whole, len(whole) - 4 - 48 + 8)
    for place, width, value in (
        (4, "<I", 2**31 - 1),  # bytes of the block
        (8, "<I", 2**31 - 1),  # bytes of a part
        (8, "<I", 0),
        (12, "<I", 2**31 - 1),  # bytes of the frame
        (3, "<B", 0),  # bytes of an item
        (2, "<B", 0xFF),  # flags
        (0, "<B", 0xFF),  # version
        (16, "<I", 2**31 - 1),  # where the first part begins
    ):
        changed = bytearray(whole)
        struct.pack_into(width, changed, place, value)
        changed[size - 4 : size] = crc32c(bytes(changed[: size - 4])).to_bytes(4, "little")
        found = fed("shard, Blosc", bytes(changed))
        assert found.defects == [], (place, value, found)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(data_type="object"),
        lambda d: d.update(data_type={"name": "fixed_length_utf32", "configuration": {}}),
        lambda d: inner(d).insert(1, {"name": "numcodecs.pickle", "configuration": {}}),
        lambda d: inner(d).__setitem__(1, {"name": "numcodecs.zfpy"}),
        lambda d: inner(d).__setitem__(1, {"name": "zstd", "configuration": {"level": 0}}),
        lambda d: d["codecs"].insert(0, {"name": "vlen-bytes"}),
    ],
)
def test_another_dtype_or_codec_of_zarr_is_refused_by_name(
    change: Callable[[dict[str, object]], object], fed: Feeding, kinds: dict[str, Kind]
) -> None:
    kind = "zarr.json of an array"
    document = json.loads(kinds[kind].seeds[0])
    before = json.dumps(document)
    change(document)
    changed = next(k for k in document if document[k] != json.loads(before)[k])
    refused(fed(kind, json.dumps(document).encode()), f"has {changed} ")


def inner(document: dict[str, object]) -> list[object]:
    found: list[object] = document["codecs"][0]["configuration"]["codecs"]  # type: ignore[index]
    return found


@pytest.mark.parametrize("name", ["zarr.json of an array", "model.json", "state.json"])
def test_json_as_deep_as_it_is_long_is_refused(name: str, fed: Feeding) -> None:
    refused(fed(name, b"[" * 200_000), "JSON")


@pytest.mark.parametrize(
    "sizes",
    [
        {"name": "painn", "hidden_channels": 8192, "num_layers": 64},
        {"name": "schnet", "hidden_channels": 8192, "num_filters": 8192, "num_interactions": 64},
        {"name": "gemnet-oc", "emb_size_edge": 8192, "num_blocks": 64},
    ],
)
def test_a_model_larger_than_its_weights_is_not_built(
    sizes: dict[str, object], fed: Feeding, kinds: dict[str, Kind]
) -> None:
    card = json.loads(kinds["model.json"].seeds[0])
    card["model"] = sizes
    refused(fed("model.json", json.dumps(card).encode()), "do not fit into the")


def test_an_extension_type_of_arrow_is_not_unpickled(fed: Feeding) -> None:
    """pyarrow once unpickled the class of a column (CVE-2023-47248)."""
    import base64
    import io

    import pyarrow.parquet as pq

    sink = io.BytesIO()
    marked = pa.field(
        "energy", pa.float64(),
        metadata={
            b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": b"cos\nsystem\n(S'touch /tmp/owned'\ntR.",
        },
    )  # fmt: skip
    table = pq.read_table(io.BytesIO(PARQUET[0]))
    place = table.schema.get_field_index("energy")
    pq.write_table(table.set_column(place, marked, table["energy"]), sink)
    assert b"py_extension_type" in base64.b64decode(
        pq.read_metadata(io.BytesIO(sink.getvalue())).metadata[b"ARROW:schema"]
    )
    found = fed("Parquet", sink.getvalue())
    assert found.defects == [], found
