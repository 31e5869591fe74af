"""`kdcache inspect` and `kdcache verify`: look at a store, and check it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from kdcache_cli.options import (
    cluster_of,
    cluster_options,
    read_options,
    reading_options,
    refuse_runs,
    store_cache_options,
    store_or_address,
)
from kdcache_cli.progress import bars
from kdcache_cli.signing import check_signed, signature_options
from kdcache_cli.tables import size


@click.command("inspect")
@click.argument("store", type=store_or_address)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@store_cache_options
def inspect_command(store: Path | str, as_json: bool) -> None:
    """What STORE holds: counts, fields, teachers, licences, identity. Reads no features."""
    from kdcache.store import describe_store, format_description

    description = describe_store(store)
    if as_json:
        click.echo(json.dumps(description, indent=1))
    else:
        click.echo(format_description(description))


@click.command("verify")
@click.argument("store", type=store_or_address)
@click.option("--data", multiple=True, help="Also check that the store was made from this dataset.")
@signature_options
@cluster_options
@store_cache_options
@reading_options
def verify_command(store: Path | str, data: tuple[str, ...], **values: Any) -> None:
    """Check every digest, checksum and count of STORE; exit 2 when something is wrong.

    \b
    kdcache verify features.zarr --data train.extxyz
    kdcache verify features.zarr --key lab.pem.pub
    """
    import time

    from kdcache.cluster import open_cluster
    from kdcache.readers import read_structures
    from kdcache.store import verify_store

    options = read_options(values)
    refuse_runs(data)
    structures = read_structures(list(data), options) if data else None
    # First: of a store from somebody else, no byte needs to be read.
    signed = check_signed(store, values["key"], values["signature"])
    started = time.perf_counter()
    with open_cluster(cluster_of(values)) as cluster:
        report = verify_store(store, data=structures, cluster=cluster, progress=bars)
    seconds = max(time.perf_counter() - started, 1e-3)
    for problem in report.problems:
        click.secho(f"wrong: {problem}", err=True, fg="red")
    for group in report.unfinished:
        click.echo(f"unfinished, so not checked: {group}", err=bool(report.problems))
    if report.problems:
        click.echo(f"kdcache: {store}: {report.summary}", err=True)
        sys.exit(2)
    click.echo(
        f"{report.summary}{signed}; {seconds:.1f} s ({size(int(report.n_bytes / seconds))}/s)"
    )
