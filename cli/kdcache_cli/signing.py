"""`kdcache keygen` and `kdcache sign`: say whose a store is. `kdcache verify --key` checks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcache.errors import ConfigError

KEY = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command("keygen")
@click.argument("path", type=click.Path(path_type=Path))
def keygen_command(path: Path) -> None:
    """Make a key pair to sign stores with: PATH, which nobody else may see, and PATH.pub.

    \b
    kdcache keygen lab.pem
    """
    from kdcache.store.signature import make_keys

    public, fingerprint = make_keys(path)
    click.echo(f"private key {path}: keep it to yourself")
    click.echo(f"public key  {public}, fingerprint {fingerprint}: give both away, by two ways")


@click.command("sign")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--key", type=KEY, required=True, help="Private key (kdcache keygen).")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File of the signature (default: signature.json in STORE).",
)
def sign_command(store: Path, key: Path, output: Path | None) -> None:
    """Sign the root digest of STORE, which stands for every byte of it.

    \b
    kdcache sign features.zarr --key lab.pem
    kdcache verify features.zarr --key lab.pem.pub
    """
    from kdcache.store import open_store
    from kdcache.store.location import local_path
    from kdcache.store.signature import SIGNATURE, read_private_key, sign_store
    from kdcache.store.work import refuse_unfinished

    private = read_private_key(key)
    path = local_path(store, "a signature")
    target = path / SIGNATURE if output is None else local_path(output, "a signature")
    manifest = open_store(path).manifest
    refuse_unfinished(path, "sign")
    signed = sign_store(manifest, private, target)
    click.echo(f"{target}: {signed.root_digest[:12]}… signed by key {signed.key_fingerprint[:16]}…")


def signature_options(command: Any) -> Any:
    """`--key` and `--signature`: whose signature a store must have."""
    signature = click.option(
        "--signature", type=KEY, help="File of the signature (default: the one in STORE)."
    )
    key = click.option("--key", type=KEY, help="Public key that STORE must be signed by.")
    return key(signature(command))


def check_signed(store: Path | str, key: Path | None, signature: Path | None) -> str:
    """What to say of the signature of a store; nothing where none is asked for.

    Raises:
        StoreError: there is no signature, or none of this key and this store.
    """
    from kdcache.errors import StoreError
    from kdcache.store import open_store, read_manifest
    from kdcache.store.reader import store_files
    from kdcache.store.signature import check_signature, read_public_key, read_signature

    if key is None:
        if signature is not None:
            raise ConfigError("--signature needs the --key that it must be by.")
        return ""
    public, files = read_public_key(key), store_files(store)
    try:
        manifest = read_manifest(files)
    except FileNotFoundError:
        open_store(files)  # says what there is instead
        raise
    try:
        signed = read_signature(files if signature is None else signature)
    except FileNotFoundError:
        raise StoreError(
            f"{store} is not signed. Ask for its signature, and name it (--signature)."
        ) from None
    check_signature(signed, public, manifest)
    return f"; signed by key {signed.key_fingerprint[:16]}…"
