"""`kdcache card`: a page about a store, and its description for search engines."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.errors import ConfigError
from kdcache_cli.options import AT_LEAST_ONE, REPORT, store_cache_options, store_or_address
from kdcache_cli.progress import bars


@click.command("card")
@click.argument("store", type=store_or_address)
@click.option("-o", "--output", type=REPORT, help="HTML page to write.")
@click.option("--croissant", type=REPORT, help="Croissant metadata (JSON-LD) to write.")
@click.option("--url", help="Address STORE is published under, for --croissant.")
@click.option(
    "--sample",
    type=AT_LEAST_ONE,
    default=20_000,
    show_default=True,
    help="Structures read for the distributions, at most 256 MB.",
)
@store_cache_options
def card_command(
    store: Path | str,
    output: Path | None,
    croissant: Path | None,
    url: str | None,
    sample: int,
) -> None:
    """Write what STORE holds, where it comes from and how it is loaded: one HTML page without
    scripts or links, or metadata that search engines of datasets read.

    \b
    kdcache card features.zarr -o card.html
    kdcache card features.zarr --croissant metadata.json --url https://example.org/features.zarr
    """
    from kdcache.card import write_card, write_croissant
    from kdcache.card.page import refuse_existing

    if output is None and croissant is None:
        raise ConfigError("Say what to write: -o card.html, --croissant metadata.json, or both.")
    if url is not None and croissant is None:
        raise ConfigError("--url is for --croissant. Give both, or neither.")
    for path in (output, croissant):
        if path is not None:
            refuse_existing(path)
    if croissant is not None:
        click.echo(write_croissant(store, croissant, url=url))
    if output is not None:
        click.echo(write_card(store, output, sample=sample, progress=bars))
