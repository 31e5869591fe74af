"""What a store holds, for programs and for people, without reading a feature.

Owns what is shown, not what is true: `verify` checks. Invariant: what people read is in what
programs get.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import JsonValue

from kdcache.errors import StoreError, printable
from kdcache.fields import FieldSpec
from kdcache.store.contents import array_documents, groups, shard_file
from kdcache.store.entries import FieldEntry, TeacherEntry
from kdcache.store.licences import is_spdx
from kdcache.store.metadata import Json
from kdcache.store.reader import Store, open_store
from kdcache.store.signature import read_signature
from kdcache.store.work import unfinished_groups


def describe_store(path: str | Path) -> Json:
    """Counts, fields, teachers, provenance and identity of a store, as JSON values.

    Raises:
        StoreError: as `open_store`.
    """
    store = open_store(path)
    manifest = store.manifest
    sizes = _sizes(store)
    index = store.index
    fields = groups(manifest)
    teachers: Json = {
        name: {
            **_teacher(entry, fields[f"teachers/{name}"], sizes, f"teachers/{name}"),
            "n_edges": _own_edges(store, name),
        }
        for name, entry in manifest.teachers.items()
    }
    left_out: list[JsonValue] = [*sorted(manifest.withheld.structures if manifest.withheld else ())]
    splits, counts = np.unique(index.split.astype(str), return_counts=True)
    return {
        "path": str(path),
        "format_version": manifest.format_version,
        "root_digest": manifest.root_digest,
        "created": manifest.created,
        "n_bytes": sum(sizes.values()),
        "n_structures": len(index),
        "n_labelled": manifest.dataset.n_labelled,
        "n_atoms": manifest.n_atoms,
        "n_edges": manifest.n_edges,
        "smallest": int(index.n_atoms.min()),
        "largest": int(index.n_atoms.max()),
        "splits": dict(zip(splits.tolist(), counts.tolist(), strict=True)),
        "dataset": manifest.dataset.model_dump(mode="json"),
        "order": manifest.order.model_dump(mode="json"),
        "graph": manifest.graph.model_dump(mode="json") if manifest.graph else None,
        "layout": {
            **manifest.capacities.model_dump(mode="json"),
            "n_shards": store.plan.n_shards,
            "padding": round(1.0 - manifest.n_atoms / _rows(store), 4),
        },
        "structures": _fields(fields["structures"], sizes, "structures"),
        "teachers": teachers,
        "withheld": left_out,
        "whole_root_digest": manifest.whole().root_digest,
        "signature": _signature(store),
        "unfinished": dict(unfinished_groups(store.path)) if isinstance(store.path, Path) else {},
    }


def format_description(description: Json) -> str:
    """The description for people, licences included: a few lines and a table of fields."""
    d = description
    dataset = _table(d["dataset"])
    licences = _table(dataset["licences"])
    layout = _table(d["layout"])
    splits = ", ".join(f"{name or 'unnamed'} {n}" for name, n in _table(d["splits"]).items())
    sources, left_out = dataset["sources"], _names(d["withheld"])
    lines = [
        f"{d['path']}: format {d['format_version']}, {_size(d['n_bytes'])}, digest "
        f"{str(d['root_digest'])[:12]}…, {d['created']}",
        f"dataset     {d['n_structures']:,} structures ({d['n_labelled']:,} labelled), "
        f"{d['n_atoms']:,} atoms ({d['smallest']} to {d['largest']} each)",
        f"            digest {str(dataset['digest'])[:12]}…, from "
        f"{', '.join(map(str, sources)) if isinstance(sources, list) and sources else 'unknown'}",
        *(f"{key:<11} {dataset[key]}" for key in ("creator", "citation") if dataset.get(key)),
        f"splits      {splits}",
        f"order       {_order(_table(d['order']))}",
        f"graph       {_graph(d['graph'])}" + (f", {d['n_edges']:,} edges" if d["graph"] else ""),
        f"layout      {layout['n_blocks']} blocks of {layout['atom']:,} atoms in "
        f"{layout['n_shards']} shards, {100 * float(str(layout['padding'])):.1f} % padding",
        f"licences    structures: {_licence(licences['structures'])}; labels: "
        f"{_licence(licences['labels'])}",
        f"signature   {_signed(d)}",
        "structures" + (f" (left out: {', '.join(left_out)})" if left_out else ""),
        *_field_lines(_table(d["structures"])),
    ]
    for name, value in _table(d["teachers"]).items():
        teacher = _table(value)
        lines += [
            f"teacher {name}: {teacher['model']}, digest {str(teacher['digest'])[:12]}…, computed "
            f"in {teacher['precision'] or 'unknown precision'}, licence: "
            f"{_licence(teacher['licence'])}",
            *(
                [f"  software {_versions(_table(teacher['software']))}"]
                if teacher["software"]
                else []
            ),
            f"  graph {_graph(teacher['graph'])}"
            + (f", {teacher['n_edges']:,} edges kept" if teacher["n_edges"] is not None else ""),
            *_field_lines(_table(teacher["fields"])),
        ]
    for group, done in _table(d["unfinished"]).items():
        lines.append(f"unfinished: {group}, {done} of {layout['n_shards']} shards are written")
    return "\n".join(map(printable, lines))


def _signature(store: Store) -> Json | None:
    """The signature in a store, unchecked; a damaged one says so."""
    try:
        signed = read_signature(store.files)
    except FileNotFoundError:
        return None
    except StoreError as error:
        return {"problem": str(error)}
    return {"key_fingerprint": signed.key_fingerprint, "root_digest": signed.root_digest}


def _signed(description: Json) -> str:
    signed = description["signature"]
    if not isinstance(signed, dict):
        return "none"
    if "problem" in signed:
        return str(signed["problem"])
    of = ""
    if signed["root_digest"] != description["root_digest"]:
        whole = signed["root_digest"] == description["whole_root_digest"]
        of = " of the whole store" if whole else " of ANOTHER content"
    return (
        f"by key {str(signed['key_fingerprint'])[:16]}…{of}, not checked here "
        f"(kdcache verify --key)"
    )


def _licence(text: JsonValue) -> str:
    if not text:
        return "unknown"
    return str(text) if is_spdx(str(text)) else f"{text} (no SPDX identifier known here)"


def _order(order: Json) -> str:
    return "as recorded" if order["seed"] is None else f"{order['generator']}, seed {order['seed']}"


def _versions(software: Json) -> str:
    shown = [f"{name} {version}" for name, version in software.items()]
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    return ", ".join(shown[:8]) + more


def _names(value: JsonValue) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list) else []


def _teacher(
    entry: TeacherEntry, specs: dict[str, FieldSpec], sizes: dict[str, int], group: str
) -> Json:
    described: Json = entry.model_dump(mode="json", exclude={"fields", "errors"})
    fields = _fields(specs, sizes, group)
    for name in fields.keys() & entry.errors.keys():
        _table(fields[name]).update(entry.errors[name].model_dump(mode="json"))
    return {**described, "fields": fields}


def _own_edges(store: Store, teacher: str) -> int | None:
    own = store.teachers[teacher].has_own_edges
    return int(store.plans[f"teachers/{teacher}"].n_edges.sum()) if own else None


def _fields(specs: dict[str, FieldSpec], sizes: dict[str, int], group: str) -> Json:
    return {
        name: {
            **FieldEntry.describe(spec).model_dump(mode="json"),
            "n_bytes": sizes[f"{group}/{name}"],
        }
        for name, spec in specs.items()
    }


def _sizes(store: Store) -> dict[str, int]:
    """Bytes on disk by field; the scales of a compact field count as its own."""
    named: list[tuple[str, str]] = []
    for array, spec, document in array_documents(store.manifest, store.plans):
        field = f"{array.rpartition('/')[0]}/{spec.name}"
        named += [
            (field, shard_file(array, shard, document)) for shard in range(store.plan.n_shards)
        ]
    found = store.files.each(store.files.size, [name for _, name in named])
    sizes = dict.fromkeys((field for field, _ in named), 0)
    for (field, _), size in zip(named, found, strict=True):
        sizes[field] += size
    return sizes


def _field_lines(fields: Json) -> list[str]:
    lines = []
    for name, value in fields.items():
        entry = _table(value)
        shape = entry["shape"] if isinstance(entry["shape"], list) else []
        line = (
            f"  {name:<16} {entry['level']!s:<9} {'×'.join(map(str, shape)) or 'scalar':<8} "
            f"{entry['dtype']!s:<8} {entry['codec']!s:<8} {entry['unit'] or '–'!s:<5} "
            f"{_size(entry['n_bytes']):>10}"
        )
        if entry.get("relative"):
            line += f"  error {float(str(entry['relative'])):.1e}"
        for what in ("clipped", "nonfinite"):
            if entry.get(what):
                line += f"  {entry[what]} {what}"
        lines.append(line)
    return lines


def _graph(value: JsonValue) -> str:
    if not value:
        return "none kept"
    rule = _table(value)
    text = f"cutoff {rule['cutoff']} Å"
    if rule["max_neighbors"] is not None:
        text += f", at most {rule['max_neighbors']} neighbours"
    return text + (", symmetric" if rule["symmetric"] else "")


def _size(n_bytes: JsonValue) -> str:
    size = float(str(n_bytes))
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def _table(value: JsonValue) -> Json:
    if not isinstance(value, dict):
        raise TypeError(f"a JSON object is expected, got {type(value).__name__}")
    return value


def _rows(store: Store) -> int:
    return store.plan.n_blocks * store.plan.atom_capacity
