"""Damage that knows a format: JSON, YAML, the footer and pages of Parquet, shards of a store.

Checksums are put right afterwards, as an attacker would. Invariant: as of `mutations`.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from crc32c import crc32c

from tests.hostile import thrift
from tests.hostile.mutations import Generator, extreme, mutate, place
from tests.hostile.seeds import npy, zipped

WORDS = (
    b"-1", b"0", b"1", b"9999999", b"10000000", b"10000001", b"99999999999999999999", b"1e999",
    b"nan",
    b"inf", b"-inf", b"0x10", b"1_000", b"T", b"F", b"", b"=", b'"', b"{", b"[", b"[1,2",
    b'{"a":1}',
    b'"1 0 0 0 1 0 0 0 1"', b"species:S:1:pos:R:3", b"species:S:1:pos:R:99999999", b"pos:R:-1",
    b"pos:R:0", b"Properties=", b"species:S:1:pos:R:3:forces:R:3:forces:R:3", b"_JSON", b"\xff\xfe",
    b'Lattice="1 0 0"', b"pbc=[T,T,T,T]", b"energy=[1,2]", b'energy=_JSON "[[1]]"', b"A" * 3000,
    "٣".encode(), "²".encode(), "Ⅷ".encode(), b"[" * 2000, b"{" * 2000, b'_JSON ' + b"[" * 3000,
    b"energy=1e308", b"REF_energy=1", b"X", b"Uuo", b"split=9", b"\x1b[31m", b"a\rb",
)  # fmt: skip
DESCRIPTORS = (
    "'|O'", "'<f8'", "'>f8'", "'<f4'", "'|V8'", "'<U9999999'", "'|S0'", "'<i8'", "'<M8[ns]'",
    "'<c16'",
    "[('a', '<f8'), ('b', '|O')]", "[('a', '<f8', (99999, 99999))]", "'object'", "'bool'", "'<f2'",
    "('<f8', (3,))", "__import__('os')", "1", "None", "'|S1'",
)  # fmt: skip
SHAPES = (
    "()", "(0,)", "(2, 3, 3)", "(1000000000000, 3, 3)", "(2, 1000000000000, 3)", "(-1, 3, 3)",
    "(9223372036854775807,)", "(18446744073709551616, 3, 3)", "(2, 0, 3)", "(0, 3, 3)",
    "(4294967296, 4294967296, 3)", "('a',)", "(1.5,)", "[2, 3, 3]", "(True,)", "(2,) * 999999999",
    "(" + "1, " * 70 + ")", "(1000000000,)", "(4, 3)", "(1000000000000, 0, 3)",
)  # fmt: skip
RAW = "@@{}@@"
# Spelt as they stand: what `json.dumps` would not write.
TOKENS = (
    "1e999", "-1e999", "NaN", "Infinity", "-0", "1E400", "0.1e-999", "9" * 400, "9" * 5000,
    "-" + "9" * 30, "[" * 200 + "]" * 200, "[" * 3000 + "]" * 3000,
    '{"a":' * 2000 + "1" + "}" * 2000,
    '"\\ud800"', '"\\u0000"', '"' + "A" * 40_000 + '"', "true", "null", "{}", "[]", '""',
    '"../../outside"', '"/etc/passwd"', '"a\\nb\\u001b[31m"', "[null,null]", '{"":{"":{}}}',
)  # fmt: skip
TEXTS = (
    "object", "|O", "pickle", "float128", "complex64", "<U9999999", "V8", "datetime64[ns]", "",
    "\0",
    "../../x", "os:system", "builtins:exec", "fixedscale", "zfpy", "pcodec", "gzip", "zstd", "half",
    "exact", "compact", "edge", "atom", "structure", "n_edges", "float64", "int64", "painn",
    "schnet",
    "gemnet-oc", "painn-small", "a\nb", "\x1b[2J", "é" * 99,
)  # fmt: skip
YAML_TEXTS = (
    '!!python/object/apply:os.system ["true"]', "!!python/name:os.system", "!!python/module:os",
    "!!python/object/new:subprocess.Popen [[true]]", "!!binary aGk=", "!!timestamp 2001-99-99",
    "2001-99-99", "2001-02-30 25:61:61", "1:60:99", "0x", "0b", "0o9", "0x_", "-_", "1_", ".inf",
    ".nan", "-.inf",
    "1e999", "9" * 400, "9" * 5000, "[" * 60 + "]" * 60, "[" * 5000, "{" * 3000, "- " * 3000,
    "? [a, b]", "? {a: b}", "&a [*a]", "*a", "*nowhere", "<<: [*a, *a]", "<<: 3", "!!set {a, b}",
    "!!omap [a: 1]", "!!pairs [a: 1]", "!!float x", "!!int x", "!!bool x", "!!null x", "!!str [a]",
    "!!map [a]", "!!seq {a: 1}", "%YAML 9.9", "---", "...", "\t- x", "'", '"\\ud800"',
    '"\\x1b[31m"',
    "\x00", "\ufeff", "|", ">-", "@", "`", "a: b: c", "{a, a}", "=", "~", "y", "off", "💥",
    "A" * 40_000,
)  # fmt: skip


def mutate_json(rng: Generator, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to three values, keys or items of a document made something else."""
    try:
        document = json.loads(data)
    except ValueError:
        return mutate(rng, data, others)
    tokens: list[str] = []
    for _ in range(int(rng.integers(1, 4))):
        document = _change(rng, document, tokens)
    text = json.dumps(document)
    for i, token in enumerate(tokens):
        text = text.replace(f'"{RAW.format(i)}"', token)
    return text.encode("utf-8", "surrogatepass")


def _change(rng: Generator, document: Any, tokens: list[str]) -> Any:
    """A copy of a document with one thing done to a node at random."""
    path: list[Any] = []
    node = document
    while isinstance(node, dict | list) and node and rng.random() < 0.85:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        path.append(keys[int(rng.integers(len(keys)))])
        node = node[path[-1]]
    if not path:
        return _value(rng, document, tokens) if rng.random() < 0.1 else document
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    key, kind = path[-1], int(rng.integers(8))
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[str(_value(rng, key, []))[:60_000]] = parent.pop(key)
    elif kind == 1:
        parent[key:key] = [parent[key]] * int(rng.choice([1, 3, 200]))
    elif kind == 2 and isinstance(parent, dict):
        parent[TEXTS[int(rng.integers(len(TEXTS)))]] = parent[key]
    else:
        parent[key] = _value(rng, parent[key], tokens)
    return document


def _value(rng: Generator, old: Any, tokens: list[str]) -> Any:
    kind = int(rng.integers(5))
    if kind == 0:
        tokens.append(TOKENS[int(rng.integers(len(TOKENS)))])
        return RAW.format(len(tokens) - 1)
    if kind == 1:
        return extreme(rng)
    if kind == 2:
        return TEXTS[int(rng.integers(len(TEXTS)))]
    if kind == 3 and isinstance(old, int) and not isinstance(old, bool):
        return old + int(rng.integers(-3, 4))
    return [[old], {"a": old}, str(old), None, True, 0.5, [old] * 3][int(rng.integers(7))]


def mutate_yaml(rng: Generator, data: bytes, others: Sequence[bytes]) -> bytes:
    """Lines and values of a text made what YAML reads in its own way."""
    lines = data.decode().splitlines()
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(lines) + 1))
        text = YAML_TEXTS[int(rng.integers(len(YAML_TEXTS)))]
        kind = int(rng.integers(6))
        if kind == 0 or at == len(lines):
            lines.insert(at, text)
        elif kind == 1:
            lines[at] = lines[at].partition(":")[0] + ": " + text
        elif kind == 2:
            del lines[at]
        elif kind == 3:
            lines.insert(at, lines[int(rng.integers(len(lines)))])
        elif kind == 4:
            lines[at] = " " * int(rng.integers(5)) + lines[at].strip()
        else:
            key, colon, value = lines[at].partition(":")
            lines[at] = f"{key}{colon} &a{value}" if rng.random() < 0.5 else f"{text}: {value}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutate_parquet(rng: Generator, data: bytes, others: Sequence[bytes]) -> bytes:
    """The footer, or the header of a page, with values changed and written anew."""
    try:
        footer_start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        footer, _ = thrift.read(data, footer_start)
        body = data[:footer_start]
        if rng.random() < 0.5:
            _change_struct(rng, footer)
        else:
            body = _change_page(rng, body, footer)
        if rng.random() < 0.2:
            body = mutate(rng, body, others)
        written = thrift.write(footer)
        return body + written + len(written).to_bytes(4, "little") + b"PAR1"
    except (ValueError, IndexError, StopIteration, OverflowError, TypeError):
        return mutate(rng, data, others)


def _leaves(value: Any, kind: int) -> list[tuple[Any, Any, int]]:
    """(container, key, type) of every number, text and list in a struct."""
    found: list[tuple[Any, Any, int]] = []
    if kind == thrift.STRUCT:
        for field in value:
            found.append((field, None, field.kind))
            found += _leaves(field.value, field.kind)
    elif kind in (thrift.LIST, thrift.SET):
        for i, item in enumerate(value.values):
            found.append((value.values, i, value.kind))
            found += _leaves(item, value.kind)
    return found


def _change_struct(rng: Generator, fields: thrift.Struct) -> None:
    for _ in range(int(rng.integers(1, 4))):
        leaves = _leaves(fields, thrift.STRUCT)
        container, key, kind = leaves[int(rng.integers(len(leaves)))]
        old = container.value if key is None else container[key]
        if kind in (thrift.I16, thrift.I32, thrift.I64):
            bits = 32 if kind == thrift.I32 else 64
            new: Any = old + int(rng.integers(-3, 4)) if rng.random() < 0.3 else extreme(rng)
            new = (new + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
        elif kind == thrift.BINARY:
            new = mutate(rng, old, [])[:4096]
        elif kind in (thrift.LIST, thrift.SET) and old.values:
            new, at = copy.deepcopy(old), int(rng.integers(len(old.values)))
            if rng.random() < 0.5:
                del new.values[at]
            else:
                new.values[at:at] = [copy.deepcopy(new.values[at])] * int(rng.choice([1, 50]))
        else:
            continue
        if key is None:
            container.value = new
        else:
            container[key] = new


def _change_page(rng: Generator, body: bytes, footer: thrift.Struct) -> bytes:
    """Another header for the first data page of a column, or for its dictionary."""
    groups = thrift.get(footer, 4).values
    columns = thrift.get(groups[int(rng.integers(len(groups)))], 1).values
    chunk = thrift.get(columns[int(rng.integers(len(columns)))], 3)
    start = thrift.get(chunk, 9)
    dictionary = thrift.get(chunk, 11)
    if dictionary and rng.random() < 0.4:
        start = dictionary
    header, end = thrift.read(body, start)
    _change_struct(rng, header)
    written = thrift.write(header)
    moved = len(written) - (end - start)
    for group in groups:
        for column in thrift.get(group, 1).values:
            meta = thrift.get(column, 3)
            for number in (9, 11):
                offset = thrift.get(meta, number)
                if offset and offset > start:
                    thrift.put(meta, number, offset + moved)
                elif offset == start and number == 9 and thrift.get(meta, 7):
                    thrift.put(meta, 7, thrift.get(meta, 7) + moved)
    return body[:start] + written + body[end:]


def mutate_shard(rng: Generator, data: bytes, others: Sequence[bytes], entries: int) -> bytes:
    """A chunk or the index changed; checksums are right again, mostly."""
    tail = 16 * entries + 4
    if len(data) <= tail:
        return mutate(rng, data, others)
    body, index = bytearray(data[:-tail]), np.frombuffer(data[-tail:-4], "<u8").copy()
    kind = int(rng.integers(4))
    if kind == 0:
        at = int(rng.integers(len(index)))
        index[at] = extreme(rng) % 2**64 if rng.random() < 0.6 else index[at] ^ np.uint64(1)
    elif kind == 1:
        pairs = index.reshape(-1, 2)
        pairs[:] = pairs[rng.permutation(len(pairs))]
    else:
        used = index.reshape(-1, 2)
        used = used[used[:, 0] < len(body)]
        offset, size = (int(n) for n in used[int(rng.integers(len(used)))])
        chunk = bytearray(body[offset : offset + size - 4])
        if kind == 2 and len(chunk) >= 16:
            # The head of a Blosc frame: version, flags, item size, then three sizes.
            width = int(rng.choice([1, 4]))
            start = int(rng.integers(4)) if width == 1 else 4 * int(rng.integers(1, 4))
            value = extreme(rng) % 2 ** (8 * width)
            chunk[start : start + width] = value.to_bytes(width, "little")
        else:
            for _ in range(int(rng.integers(1, 4))):
                if chunk:
                    chunk[place(rng, chunk)] = int(rng.integers(256))
        body[offset : offset + size] = bytes(chunk) + crc32c(bytes(chunk)).to_bytes(4, "little")
    written = index.tobytes()
    if rng.random() < 0.95:
        return bytes(body) + written + crc32c(written).to_bytes(4, "little")
    return bytes(body) + written + data[-4:]


def mutate_safetensors(rng: Generator, data: bytes, others: Sequence[bytes]) -> bytes:
    """The JSON header changed, its length put right."""
    size = int.from_bytes(data[:8], "little")
    header = mutate_json(rng, data[8 : 8 + size], others)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def mutate_xyz(rng: Generator, data: bytes, others: Sequence[bytes]) -> bytes:
    """Tokens of the text made numbers and words that parsers stumble over."""
    lines = data.split(b"\n")
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(lines)))
        word = WORDS[int(rng.integers(len(WORDS)))]
        tokens = lines[at].split(b" ")
        kind = int(rng.integers(4))
        if kind == 0:
            tokens[int(rng.integers(len(tokens)))] = word
        elif kind == 1:
            tokens.insert(int(rng.integers(len(tokens) + 1)), word)
        elif kind == 2:
            key, equals, _ = tokens[int(rng.integers(len(tokens)))].partition(b"=")
            tokens.append(key + (equals or b"=") + word)
        else:
            tokens = [word]
        lines[at] = b" ".join(tokens)
    return b"\n".join(lines)


def mutate_npz(rng: Generator, data: bytes, others: Sequence[bytes]) -> bytes:
    """The header of one array spelt anew; the archive's checksums are right."""
    with np.load(io.BytesIO(data)) as archive:
        arrays = {name: archive[name] for name in archive.files}
    name = list(arrays)[int(rng.integers(len(arrays)))]
    array = arrays.pop(name)
    header = f"{{'descr': {_pick(rng, DESCRIPTORS)}, 'fortran_order': " \
        f"{_pick(rng, ('False', 'True', '1'))}, 'shape': {_pick(rng, SHAPES)}, }}"  # fmt: skip
    version = (1, 0) if rng.random() < 0.7 else (2, 0)
    width = 2 if version == (1, 0) else 4
    head = header.encode("latin1").ljust(118) + b"\n"
    member = b"\x93NUMPY" + bytes(version) + len(head).to_bytes(width, "little") + head
    return zipped({**{k: npy(v) for k, v in arrays.items()}, name: member + array.tobytes()})


def _pick(rng: Generator, texts: Sequence[str]) -> str:
    return texts[int(rng.integers(len(texts)))]
