"""`kdcache compare`: how alike the layers of two models are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcache.errors import ConfigError
from kdcache_cli.options import (
    AT_LEAST_ONE,
    check_writable,
    max_atoms_option,
    read_options,
    reading_options,
    refuse_runs,
    store_cache_options,
    store_or_address,
)
from kdcache_cli.progress import bars
from kdcache_cli.tables import table

SHOWN = 20


@click.command("compare")
@click.argument("a", type=store_or_address)
@click.argument("b", type=store_or_address)
@click.option("--data", multiple=True, help="Structures for two runs: files, globs or a store.")
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="Control of B: adds what its terms gained in similarity to A.",
)
@click.option("--tap", "taps", multiple=True, help="Inner module of B: node/msg2=message_layers.2.")
@click.option("--tap-a", "taps_a", multiple=True, help="The same of A, where it is a run.")
@click.option(
    "--max-structures",
    type=AT_LEAST_ONE,
    default=1000,
    show_default=True,
    help="A random sample of so many.",
)
@max_atoms_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("comparison"),
    show_default=True,
    help="Directory for cka.csv and cka.png.",
)
@store_cache_options
@reading_options
def compare_command(a: Path | str, b: Path | str, **values: Any) -> None:
    """Similarity (linear CKA) of all layers of A with all layers of B, stores or runs.

    Without --tap, every block of a run is a layer.

    \b
    kdcache compare features.zarr student --baseline control -o similarity
    kdcache compare teacher student --data test.extxyz
    """
    from kdcache.compare import compare_layers, draw, write_csv
    from kdcache.devices import find_device
    from kdcache.taps import Tap

    read = read_options(values)
    refuse_runs(values["data"])
    output = values["output"]
    if (output / "manifest.json").exists() or (output / "model.json").exists():
        raise ConfigError(f"{output} is a store or a run. Name another directory with -o.")
    check_writable(output / "cka.csv")
    comparison = compare_layers(
        a,
        b,
        data=values["data"],
        read=read,
        control=values["baseline"],
        taps_a=[Tap.parse(text) for text in values["taps_a"]],
        taps=[Tap.parse(text) for text in values["taps"]],
        max_structures=values["max_structures"],
        max_atoms=values["max_atoms"],
        device=str(find_device(values["device"], "--device")),
        progress=bars,
    )
    write_csv(comparison, output / "cka.csv")
    draw(comparison, output / "cka.png")
    click.echo(_shown(comparison))
    for note in comparison.notes:
        click.echo(note)
    click.echo(
        f"{len(comparison.pairs)} pairs of layers over {comparison.n_structures} structures: "
        f"{output / 'cka.csv'}, {output / 'cka.png'}"
    )


def _shown(comparison: Any) -> str:
    """The most alike pairs, those trained on among them."""
    pairs = sorted(comparison.pairs, key=lambda pair: (not pair.taught, -pair.cka))[:SHOWN]
    header = [comparison.a, comparison.b, "level", "rows", "CKA", "unbiased"]
    with_gain = any(pair.gain is not None for pair in pairs)
    rows = []
    for pair in pairs:
        row = [pair.a, pair.b + (" (trained on)" if pair.taught else ""), pair.level]
        row += [str(pair.n_rows), f"{pair.cka:.4f}", f"{pair.cka_unbiased:.4f}"]
        rows.append(row + ([f"{pair.gain:+.4f}"] if with_gain else []))
    return table(header + (["gain"] if with_gain else []), rows)
