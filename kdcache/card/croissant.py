"""A store as a Croissant dataset: JSON-LD that search engines and loaders of datasets read.

Files and their digests are those of the manifest; index.parquet is described column by column, Zarr
arrays as files, for Croissant knows no Zarr. Invariant: nothing is claimed that the manifest does
not say.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kdcache.card.page import refuse_existing
from kdcache.errors import StoreError
from kdcache.store import Store, open_store
from kdcache.store.index import INDEX
from kdcache.store.location import StoreUrl, local_path
from kdcache.store.manifest import MANIFEST, MAX_MANIFEST_BYTES
from kdcache.store.metadata import readable
from kdcache.store.shards import write_file

CONFORMS_TO = "http://mlcommons.org/croissant/1.0"
UNKNOWN_LICENCE = "unknown"
ENCODINGS = {".parquet": "application/x-parquet", ".json": "application/json"}
BINARY = "application/octet-stream"
COLUMNS = {
    "structure_id": ("sc:Text", "unique in the dataset"),
    "source_index": ("sc:Integer", "place in the dataset"),
    "block": ("sc:Integer", "block the structure lies in"),
    "structure_row": ("sc:Integer", "its row in arrays of level structure"),
    "atom_start": ("sc:Integer", "its first row in arrays of level atom"),
    "n_atoms": ("sc:Integer", "its rows in arrays of level atom"),
    "edge_start": ("sc:Integer", "its first row in arrays of level edge"),
    "n_edges": ("sc:Integer", "its rows in arrays of level edge"),
    "origin": ("sc:Text", "data, or how the structure was made"),
    "split": ("sc:Text", "train, val, test or empty"),
    "group": ("sc:Text", "what errors are reported by"),
    "weight": ("sc:Float", "weight in the ground-truth loss"),
}
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def write_croissant(store: str | Path, path: str | Path, *, url: str | None = None) -> Path:
    """Write the Croissant description of a store.

    Args:
        store: path or address of a finished store.
        path: of a new file, beside the store or above it unless `url` is given.
        url: address the store is published under; without, files are named relative to `path`, or
            by the address of a store that is read from one.

    Returns:
        The path.

    Raises:
        StoreError: no store, files that could not be named, or something is at `path` already.
    """
    target = local_path(path, "a description")
    refuse_existing(target)
    opened = open_store(store)
    document = croissant(opened, url.rstrip("/") if url else _relative(opened, target))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, readable(document))
    return target


def croissant(store: Store, base: str) -> dict[str, Any]:
    """The JSON-LD document.

    Args:
        store: an open store.
        base: what stands before the name of each file of it, without the last slash.
    """
    manifest, dataset = store.manifest, store.manifest.dataset
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", store.path.name) or "store"
    content = store.files.read(MANIFEST, MAX_MANIFEST_BYTES)
    digests = {**manifest.digests, MANIFEST: hashlib.sha256(content).hexdigest()}
    document: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": name,
        "description": _description(store),
        "identifier": f"sha256:{manifest.root_digest}",
        "version": "1.0.0",
        "url": base,
        "license": _licences(store),
        "distribution": [
            _file(one, digest, base, _size(store, one)) for one, digest in sorted(digests.items())
        ],
        "recordSet": [_index()],
    }
    if manifest.created:
        document["datePublished"] = manifest.created
    if dataset.creator:
        document["creator"] = {"@type": "Person", "name": dataset.creator}
    if dataset.citation:
        document["citeAs"] = dataset.citation
    return document


def _relative(store: Store, target: Path) -> str:
    if isinstance(store.path, StoreUrl):
        return str(store.path)
    named = os.path.relpath(store.path.resolve(), target.parent.resolve())
    if named.startswith(".."):
        raise StoreError(
            f"{target} does not lie beside {store.path} or above it, so whoever gets both could "
            f"not find one from the other. Write it there, or give the address with --url."
        )
    if named == ".":
        raise StoreError(
            f"{target} would be a file of the store that its manifest does not name. Write it "
            f"beside the store."
        )
    return quote(Path(named).as_posix())


def _description(store: Store) -> str:
    manifest = store.manifest
    lines = [
        f"{len(store)} atomic structures, {manifest.n_atoms} atoms; energies in eV, lengths in Å, "
        f"forces in eV/Å. A kdcache store: Zarr v3 arrays, index.parquet and manifest.json."
    ]
    for group in store.plans:
        fields = [
            f"{name} ({spec.level}{''.join(f' x {n}' for n in spec.shape)}"
            f"{', ' + spec.unit if spec.unit else ''})"
            for name, spec in store.fields(group).items()
        ]
        lines.append(f"{group}: {', '.join(fields)}.")
    for name, entry in store.teachers.items():
        lines.append(f"Teacher {name}: {entry.model}, digest {entry.digest}.")
    return "\n".join(lines)


def _licences(store: Store) -> list[str]:
    """Every licence that is stated, once; what each is of, the manifest says."""
    said = store.manifest.dataset.licences
    texts = [said.structures, said.labels, *(entry.licence for entry in store.teachers.values())]
    return list(dict.fromkeys(text or UNKNOWN_LICENCE for text in texts))


def _file(name: str, digest: str, base: str, size: int) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": f"{base}/{quote(name)}",
        "contentSize": f"{size} B",
        "encodingFormat": ENCODINGS.get(Path(name).suffix, BINARY),
        "sha256": digest,
    }


def _size(store: Store, name: str) -> int:
    return store.files.size(name)


def _index() -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": "structures",
        "name": "structures",
        "description": "A row per structure, in store order.",
        "key": {"@id": "structures/structure_id"},
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"structures/{column}",
                "name": column,
                "description": text,
                "dataType": kind,
                "source": {"fileObject": {"@id": INDEX}, "extract": {"column": column}},
            }
            for column, (kind, text) in COLUMNS.items()
        ],
    }
