"""One static HTML page about a store, for a web server or a colleague.

Owns what is on the page; every text of the store goes through `escaped`. Invariant: the page loads
nothing and runs nothing, whoever wrote the store.
"""

from __future__ import annotations

import html
import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kdcache.card.plots import draw
from kdcache.card.sample import Example, Sample, read_sample
from kdcache.errors import StoreError, printable
from kdcache.progress import Progress, silent
from kdcache.store import Store, describe_store, open_store
from kdcache.store.location import local_path
from kdcache.store.shards import write_file

# What HTML has no place for: control characters, half of a pair of code units; and what shows the
# characters after it in another order.
_NO_TEXT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069"
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
# What a stranger says may be megabytes.
MAX_TEXT = 20_000
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem;
  color: #1b1b1b; background: #fff; }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .9rem; }
th, td { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top;
  border-bottom: 1px solid #eee; max-width: 32rem; }
td, dd, pre { unicode-bidi: isolate; } td, th { overflow-wrap: break-word; }
td.number, th.number { text-align: right; }
pre { font: .875rem/1.5 ui-monospace, monospace; background: #f5f5f5; padding: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(6rem, 14rem) 1fr; gap: .3rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; white-space: pre-wrap; }
dt, dd { overflow-wrap: anywhere; min-width: 0; }
summary { cursor: pointer; font-weight: 600; }
figure { margin: 0; } svg { width: 100%; height: auto; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  figure { overflow-x: auto; } svg { min-width: 48rem; } }
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
        "<p>Atomic structures and what teacher models say of them, for training students: a kdcache"
        " store, which any Zarr v3 reader opens.</p>",
        _summary(description),
        _section("Licences", _licences(description)),
        _section("Fields", _fields(description)),
        _section("Distributions", _distributions(store, sample)),
        _section("Examples", "".join(map(_example, sample.examples))),
        _section("Loading", _loading(store, name)),
        *(_teacher(name, teacher) for name, teacher in description["teachers"].items()),
        _section("Provenance", _provenance(description)),
        _section("Identity", _identity(description)),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
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
    items = "".join(f"<dt>{escaped(k)}</dt><dd>{escaped(_cut(str(v)))}</dd>\n" for k, v in pairs)
    return f"<dl>\n{items}</dl>"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …"


def _summary(d: dict[str, Any]) -> str:
    teachers = ", ".join(f"{n} ({t['model']})" for n, t in d["teachers"].items()) or "none"
    few, many = d["smallest"], d["largest"]
    sizes = f"{few}" if few == many else f"{few} to {many}"
    stated = [(key, d["dataset"][key]) for key in ("creator", "citation") if d["dataset"].get(key)]
    return _list(
        [
            *stated,
            (
                "structures",
                f"{d['n_structures']:,} of {sizes} atoms, {d['n_labelled']:,} labelled",
            ),
            ("atoms", f"{d['n_atoms']:,}"),
            ("edges", f"{d['n_edges']:,}" if d["graph"] else "no neighbour lists kept"),
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
        ("files", ", ".join(dataset["sources"]) or "unknown"),
        ("keys of the files", _pairs(dataset["keys"])),
        ("units of the files", f"{_pairs(dataset['units'])}; the store is in eV, Å, eV/Å"),
        ("notes", "\n".join(dataset["notes"]) or "none"),
        ("neighbours", _graph(d["graph"]) if d["graph"] else "none kept"),
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
    text = _cut(json.dumps(teacher["architecture"], indent=1, ensure_ascii=False))
    pairs: list[tuple[str, object]] = [
        ("model", teacher["model"]),
        ("digest", teacher["digest"]),
        ("precision", teacher["precision"] or "unknown"),
        ("neighbours", _graph(teacher["graph"]) if teacher["graph"] else "unknown"),
        ("reference energies, eV", _pairs(teacher["references"])),
        ("computed with", _pairs(teacher["software"])),
    ]
    if teacher.get("n_failed"):
        pairs.append(("failed on", f"{teacher['n_failed']:,} structures, which have no features"))
    return _section(
        f"Teacher: {name}",
        f"{_list(pairs)}<details>\n<summary>Architecture</summary>\n<pre>{escaped(text)}</pre>\n"
        f"</details>",
    )


def _distributions(store: Store, sample: Sample) -> str:
    of = "all structures"
    if sample.n_structures < len(store):
        of = (
            f"the first {sample.n_structures:,} of {len(store):,} structures, which stand in "
            f"random order"
        )
    left_out = f" {sample.n_left_out:,} further quantities are left out." * bool(sample.n_left_out)
    return (
        f"<p>Of {of}; counts on a logarithmic axis.{left_out}</p>\n<figure>{draw(sample)}</figure>"
    )


def _example(example: Example) -> str:
    rows = [
        (name, _first_row(values, n_of_row), n)
        for name, (values, n_of_row, n) in example.fields.items()
    ]
    table = _table(["field", "values of its first row", "values in all"], rows, numbers=1)
    atoms = "1 atom" if example.n_atoms == 1 else f"{example.n_atoms} atoms"
    return f"<h3>{escaped(example.structure_id)}, {atoms}</h3>\n{table}"


def _first_row(values: Sequence[float], n_values: int) -> str:
    # NaN is how a missing label is stored.
    if not values or all(math.isnan(value) for value in values):
        return "none"
    return " ".join(f"{value:.6g}" for value in values) + (" …" if n_values > len(values) else "")


def _loading(store: Store, name: str) -> str:
    """Lines to be copied: nothing of a name stands in them but as a quoted text."""
    named = printable(name)
    shown = json.dumps(named, ensure_ascii=False)
    ours = f"from kdcache.store import open_store\n\nstore = open_store({shown})\n"
    public = f'import zarr\n\nroot = zarr.open_group({shown}, mode="r")\n'
    field = _shown_field(store)
    if field:
        ours += f'values = store.read("{field}")  # rows in store order\n'
        public += f'rows = root["{field}"]  # with padding\n'
        if store.spec(field).codec == "compact":
            public += f'scale = root["{field}.scale"]  # of a block and channel: rows times scale\n'
    if not store.manifest.withheld:
        ours += "structure = store.structure(0)\n"
    public += "# Which rows belong to which structure: index.parquet, and FORMAT.md of kdcache.\n"
    parts = {
        "kdcache": ours,
        "zarr-python": public,
        "Is it whole?": f"kdcache verify {shlex.quote(named)}",
    }
    return "".join(
        f"<h3>{escaped(title)}</h3>\n<pre>{escaped(text)}</pre>\n" for title, text in parts.items()
    )


def _shown_field(store: Store) -> str:
    """A feature of atoms, else any field; "" where there is none."""
    found = [
        (f"{group}/{name}", spec.level)
        for group in reversed(list(store.plans))
        for name, spec in store.fields(group).items()
    ]
    of_atoms = [name for name, level in found if level == "atom" and name.startswith("teachers/")]
    return next(iter(of_atoms), next((name for name, _ in found), ""))


def _identity(d: dict[str, Any]) -> str:
    whole = [("root digest of the whole store", d["whole_root_digest"])] * bool(d["withheld"])
    return _list(
        [
            ("root digest (SHA-256)", d["root_digest"]),
            *whole,
            ("dataset digest (SHA-256)", d["dataset"]["digest"]),
            ("signature", _signature(d["signature"])),
            ("format", d["format_version"]),
        ]
    )


def _signature(signed: dict[str, str] | None) -> str:
    if signed is None:
        return "none"
    if "problem" in signed:
        return signed["problem"]
    return (
        f"by the key with fingerprint {signed['key_fingerprint']}. This page does not check it: "
        f"kdcache verify --key does, with a key you have from elsewhere"
    )


def _graph(rule: dict[str, Any]) -> str:
    """The rule of a neighbour list, in words."""
    limit = rule["max_neighbors"]
    parts = [f"cutoff {rule['cutoff']} Å"]
    parts += [f"the nearest {limit} of an atom"] if limit is not None else []
    parts += ["made symmetric"] if rule["symmetric"] else []
    parts += ["some were dropped by that limit"] if rule["truncated"] else []
    return ", ".join(parts)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in values.items()) or "none"


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"
