"""One static HTML page about a store, for a web server or a colleague.

Owns what is on the page; every text of the store goes through `escaped`. Invariant: the page loads
nothing and runs nothing, whoever wrote the store.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kdcache.card.plots import draw
from kdcache.card.sample import Example, Sample, read_sample
from kdcache.errors import StoreError
from kdcache.progress import Progress, silent
from kdcache.store import Store, describe_store, open_store
from kdcache.store.location import local_path
from kdcache.store.shards import write_file

# What HTML has no place for: control characters, half of a pair of code units.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
# The architecture of a teacher may be megabytes of a stranger's JSON.
MAX_JSON = 20_000
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem;
  color: #1b1b1b; background: #fff; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top;
  border-bottom: 1px solid #eee; }
td, dd, code, pre { unicode-bidi: isolate; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; background: #f5f5f5; }
pre { padding: .8rem; overflow-x: auto; white-space: pre-wrap; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 1rem; white-space: pre-wrap; }
svg { max-width: 100%; height: auto; }
"""


def write_card(
    store: str | Path,
    path: str | Path,
    *,
    sample: int = 20_000,
    progress: Progress = silent,
) -> Path:
    """Write the card of a store.

    Args:
        store: path or address of a finished store.
        path: of the page; a new file.
        sample: structures whose values are read for distributions.
        progress: shows what is read.

    Returns:
        The path.

    Raises:
        StoreError: no store, a damaged one, or something is at `path` already.
    """
    target = local_path(path, "a card")
    refuse_existing(target)
    opened = open_store(store)
    found = read_sample(opened, sample, progress=progress)
    content = card(opened, describe_store(store), found)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, content.encode("utf-8"))
    return target


def refuse_existing(path: Path) -> None:
    """Nothing is overwritten.

    Raises:
        StoreError: something is there.
    """
    if path.exists():
        raise StoreError(f"{path} exists, and nothing is overwritten. Name another path.")


def escaped(value: object) -> str:
    """Any value as text within HTML, and within its quoted attributes."""
    return html.escape(_NO_TEXT.sub("\ufffd", str(value)), quote=True)


def card(store: Store, description: dict[str, Any], sample: Sample) -> str:
    """The page as text."""
    name = store.path.name or "store"
    parts = [
        f"<h1>{escaped(name)}</h1>",
        _summary(description),
        _section("Fields", _fields(description)),
        _section("Provenance", _provenance(description)),
        _section("Licences", _licences(description)),
        *(_teacher(name, teacher) for name, teacher in description["teachers"].items()),
        _section("Distributions", _distributions(store, sample)),
        _section("Examples", "".join(map(_example, sample.examples))),
        _section("Loading", _loading(store, name)),
        _section("Identity", _identity(description)),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escaped(title)}</h2>\n{content}\n</section>"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]], numbers: int = 0) -> str:
    """A table whose last `numbers` columns are aligned to the right."""

    def line(kind: str, cells: Sequence[object]) -> str:
        first = len(cells) - numbers
        made = (
            f"<{kind}{' class=number' if k >= first else ''}>{escaped(cell)}</{kind}>"
            for k, cell in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f"<table>\n<thead>\n{line('th', header)}\n</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _list(pairs: Iterable[tuple[str, object]]) -> str:
    items = "".join(f"<dt>{escaped(k)}</dt><dd>{escaped(v)}</dd>\n" for k, v in pairs)
    return f"<dl>\n{items}</dl>"


def _summary(d: dict[str, Any]) -> str:
    teachers = ", ".join(f"{n} ({t['model']})" for n, t in d["teachers"].items()) or "none"
    return _list(
        [
            (
                "structures",
                f"{d['n_structures']:,} of {d['smallest']} to {d['largest']} atoms, "
                f"{d['n_labelled']:,} labelled",
            ),
            ("atoms", f"{d['n_atoms']:,}"),
            ("edges", f"{d['n_edges']:,}" if d["graph"] else "no neighbour list kept"),
            ("teachers", teachers),
            ("size", _size(d["n_bytes"])),
            ("splits", ", ".join(f"{k or 'unnamed'} {v:,}" for k, v in d["splits"].items())),
        ]
    )


def _fields(d: dict[str, Any]) -> str:
    header = ["field", "level", "shape of a row", "dtype", "unit", "symmetry", "codec"]
    header += ["relative error", "size"]
    groups = [("structures", d["structures"])]
    groups += [(f"teachers/{name}", t["fields"]) for name, t in d["teachers"].items()]
    rows = [
        [
            f"{group}/{name}",
            f["level"],
            "×".join(map(str, f["shape"])) or "scalar",
            f["dtype"],
            f["unit"] or "–",
            f["symmetry"],
            f["codec"],
            _error(f),
            _size(f["n_bytes"]),
        ]
        for group, fields in groups
        for name, f in fields.items()
    ]
    withheld = ", ".join(map(str, d.get("withheld") or []))
    note = f"<p>Left out of this copy: {escaped(withheld)}.</p>" if withheld else ""
    return _table(header, rows, numbers=2) + note


def _error(field: dict[str, Any]) -> str:
    if "relative" not in field:
        return "exact"
    odd = [f"{field[k]} {k}" for k in ("clipped", "nonfinite") if field[k]]
    return ", ".join([f"{field['relative']:.1e}" if field["relative"] else "exact", *odd])


def _provenance(d: dict[str, Any]) -> str:
    dataset = d["dataset"]
    pairs: list[tuple[str, object]] = [
        (key, dataset[key]) for key in ("creator", "citation") if dataset.get(key)
    ]
    pairs += [
        ("files", ", ".join(dataset["sources"]) or "unknown"),
        ("keys of the files", _pairs(dataset["keys"])),
        ("units of the files", f"{_pairs(dataset['units'])}; the store is in eV, Å, eV/Å"),
        ("notes", "\n".join(dataset["notes"]) or "none"),
        ("neighbours", _pairs(d["graph"]) if d["graph"] else "none kept"),
        ("order", _pairs(d["order"])),
        ("created", d["created"]),
    ]
    return _list(pairs)


def _licences(d: dict[str, Any]) -> str:
    licences = d["dataset"]["licences"]
    pairs = [("structures", licences["structures"]), ("labels", licences["labels"])]
    pairs += [(f"teacher {name}", t["licence"]) for name, t in d["teachers"].items()]
    return _list((name, text or "unknown: ask before you pass it on") for name, text in pairs)


def _teacher(name: str, teacher: dict[str, Any]) -> str:
    text = json.dumps(teacher["architecture"], indent=1, ensure_ascii=False)
    cut = text if len(text) <= MAX_JSON else text[:MAX_JSON] + " …"
    pairs: list[tuple[str, object]] = [
        ("model", teacher["model"]),
        ("digest", teacher["digest"]),
        ("precision", teacher["precision"] or "unknown"),
        ("neighbours", _pairs(teacher["graph"]) if teacher["graph"] else "unknown"),
        ("reference energies, eV", _pairs(teacher["references"])),
        ("computed with", _pairs(teacher["software"])),
    ]
    if teacher.get("n_failed"):
        pairs.append(("failed on", f"{teacher['n_failed']:,} structures, which have no features"))
    return _section(
        f"Teacher {name}", f"{_list(pairs)}<h3>Architecture</h3><pre>{escaped(cut)}</pre>"
    )


def _distributions(store: Store, sample: Sample) -> str:
    of = "all" if sample.n_structures == len(store) else f"the first {sample.n_structures:,} of"
    return (
        f"<p>Of {of} {len(store):,} structures, which stand in random order; counts on a "
        f"logarithmic axis.</p>\n<figure>{draw(sample)}</figure>"
    )


def _example(example: Example) -> str:
    rows = [
        (name, " ".join(f"{value:.6g}" for value in values) or "none", n)
        for name, (values, n) in example.fields.items()
    ]
    table = _table(["field", "values of its first row", "values in all"], rows, numbers=1)
    atoms = "1 atom" if example.n_atoms == 1 else f"{example.n_atoms} atoms"
    return f"<h3>{escaped(example.structure_id)}, {atoms}</h3>\n{table}"


def _loading(store: Store, name: str) -> str:
    teachers = [
        f"teachers/{teacher}/{field}"
        for teacher in store.teachers
        for field, spec in store.fields(f"teachers/{teacher}").items()
        if spec.level == "atom"
    ]
    field = next(iter(teachers), "structures/energy")
    shown = json.dumps(name, ensure_ascii=False)
    codec = store.spec(field).codec if teachers else "exact"
    scale = (
        f'\nscale = root["{field}.scale"]  # compact: times the scale of block and channel'
        if codec == "compact"
        else ""
    )
    return "".join(
        f"<h3>{escaped(title)}</h3>\n<pre>{escaped(text)}</pre>\n"
        for title, text in (
            (
                "kdcache",
                f"from kdcache.store import open_store\n\nstore = open_store({shown})\n"
                f'values = store.read("{field}")  # rows in store order\n'
                f"structure = store.structure(0)\n\n# kdcache verify {name}",
            ),
            (
                "zarr-python",
                f'import zarr\n\nroot = zarr.open_group({shown}, mode="r")\n'
                f'rows = root["{field}"]  # with padding{scale}\n'
                "# Which rows belong to which structure: index.parquet, and FORMAT.md of kdcache.",
            ),
        )
    )


def _identity(d: dict[str, Any]) -> str:
    return _list(
        [
            ("root digest (SHA-256)", d["root_digest"]),
            ("dataset digest (SHA-256)", d["dataset"]["digest"]),
            ("format", d["format_version"]),
        ]
    )


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in values.items()) or "none"


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"
