"""Sign a store's root digest with Ed25519 (RFC 8032), and check whose signature one is.

The signature proves nothing of the files: their digests do, which `verify` computes. Invariant:
what is signed is `MESSAGE`, byte for byte as FORMAT.md says, and a key file is never overwritten.
"""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import StringConstraints, ValidationError

from kdcache.errors import ConfigError, IdentityError, StoreError, naming
from kdcache.store.entries import Part, Sha256
from kdcache.store.files import StoreFiles, check_size
from kdcache.store.location import local_path
from kdcache.store.manifest import Manifest
from kdcache.store.metadata import readable
from kdcache.store.shards import write_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

SIGNATURE = "signature.json"
PUBLIC_SUFFIX = ".pub"
# Names what is signed, so that no signature of a key means two things. ASCII, 91 bytes in all.
MESSAGE = "kdcache store signature 1\n{root_digest}\n"
MAX_BYTES = 4096

# 64 bytes in base64 (RFC 4648, with padding).
Base64Signature = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{86}==$")]


class SignatureFile(Part):
    """All of signature.json.

    Attributes:
        algorithm: "Ed25519".
        key_fingerprint: SHA-256 of the public key as DER SubjectPublicKeyInfo.
        root_digest: of the store that is signed.
        signature: of `MESSAGE` with that digest, base64.
    """

    algorithm: Literal["Ed25519"]
    key_fingerprint: Sha256
    root_digest: Sha256
    signature: Base64Signature


def make_keys(path: str | Path) -> tuple[Path, str]:
    """Draw a key pair: the private key at `path`, readable by its owner alone, the public one at
    `path`.pub; PEM both, PKCS #8 without a passphrase and SubjectPublicKeyInfo.

    Returns:
        Path of the public key, and its fingerprint.

    Raises:
        ConfigError: the package is missing, or a file is there: none is overwritten.
    """
    ed25519, serialization = _ed25519(), _serialization()
    private_path = local_path(path, "a key")
    public_path = private_path.with_name(private_path.name + PUBLIC_SUFFIX)
    for file in (private_path, public_path):
        if file.exists() or file.is_symlink():
            raise ConfigError(
                f"{file} exists, and a key that is lost cannot be made again. Name another path."
            )
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    _write_new(private_path, private, 0o600)
    try:
        _write_new(public_path, public, 0o644)
    except BaseException:
        private_path.unlink()
        raise
    return public_path, fingerprint(key.public_key())


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """The private key in a PEM file.

    Raises:
        ConfigError: the package is missing, or there is no such key in it.
    """
    ed25519, serialization = _ed25519(), _serialization()
    content = _key_file(path)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except TypeError:
        raise ConfigError(
            f"{path} is encrypted. Write it without a passphrase for a moment "
            f"(openssl pkey -in {path.name})."
        ) from None
    except Exception:  # whatever the parser says of bytes that are no key
        raise ConfigError(_no_key(path, content, "private")) from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(_no_key(path, content, "private"))
    private: Ed25519PrivateKey = key
    return private


def read_public_key(path: Path) -> Ed25519PublicKey:
    """The public key in a PEM file.

    Raises:
        ConfigError: the package is missing, or there is no such key in it.
    """
    ed25519, serialization = _ed25519(), _serialization()
    content = _key_file(path)
    try:
        key = serialization.load_pem_public_key(content)
    except Exception:  # as above
        raise ConfigError(_no_key(path, content, "public")) from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise ConfigError(_no_key(path, content, "public"))
    public: Ed25519PublicKey = key
    return public


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 (hex) of a public key as DER: `openssl pkey -pubin -outform DER | sha256sum`."""
    serialization = _serialization()
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()


def sign_message(key: Ed25519PrivateKey, message: bytes) -> str:
    """The signature of a message, base64."""
    return base64.b64encode(key.sign(message)).decode()


def is_signed(key: Ed25519PublicKey, message: bytes, signature: str) -> bool:
    """Whether a signature is that of a message by the owner of a key."""
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(base64.b64decode(signature, validate=True), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def signed_message(root_digest: str) -> bytes:
    """What is signed of a store."""
    return MESSAGE.format(root_digest=root_digest).encode("ascii")


def sign_store(manifest: Manifest, key: Ed25519PrivateKey, target: Path) -> SignatureFile:
    """Write the signature of a store.

    Args:
        manifest: of the store, as it was read.
        key: of whoever answers for the store.
        target: signature.json of the store, or another file.

    Raises:
        StoreError: something is at `target`.
    """
    if target.exists() or target.is_symlink():
        raise StoreError(
            f"{target} exists, and nothing is overwritten. Delete it, if it is of earlier "
            f"content, or name another file (-o)."
        )
    signed = SignatureFile(
        algorithm="Ed25519",
        key_fingerprint=fingerprint(key.public_key()),
        root_digest=manifest.root_digest,
        signature=sign_message(key, signed_message(manifest.root_digest)),
    )
    write_file(target, readable(signed.model_dump(mode="json")))
    return signed


def refuse_signed(path: Path, root_digest: str) -> None:
    """A store whose content is about to change has no signature.

    Args:
        path: of the store.
        root_digest: of what it holds now.

    Raises:
        StoreError: it has one.
    """
    if (path / SIGNATURE).exists():
        raise StoreError(
            f"{path} is signed, and its signature would be of another content than "
            f"{root_digest[:12]}…. Remove it (--remove-signature) and sign again."
        )


def read_signature(source: StoreFiles | Path) -> SignatureFile:
    """The signature in a store, or in a file of its own.

    Raises:
        FileNotFoundError: there is none.
        StoreError: the file is no signature.
    """
    if isinstance(source, Path):
        where = str(source)
        with naming(where), open(source, "rb") as file:
            check_size(where, os.fstat(file.fileno()).st_size, MAX_BYTES)
            content = file.read()
    else:
        where, content = source.where(SIGNATURE), source.read(SIGNATURE, MAX_BYTES)
    try:
        return SignatureFile.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = ".".join(str(part) for part in first["loc"]) or "the file"
        raise StoreError(
            f"{where} is no signature: {at}: {first['msg']}. It is truncated or damaged: fetch it "
            f"again."
        ) from None


def check_signature(signed: SignatureFile, key: Ed25519PublicKey, manifest: Manifest) -> None:
    """A signature is that of a store, by the owner of a key.

    One of the whole store counts for what is passed on without its structures, too: the manifest
    holds the whole one's digests. `withholding.check_part` checks what these leave open.

    Args:
        signed: as it was read.
        key: which the receiver trusts.
        manifest: of the store, as it was read: its content has its root digest.

    Raises:
        IdentityError: another key's, of another content, or nobody's.
    """
    given = fingerprint(key)
    if signed.key_fingerprint != given:
        raise IdentityError(
            f"The signature is by key {signed.key_fingerprint[:16]}…, the key given is "
            f"{given[:16]}…: whoever signed is not whom you trust. Ask for the right public key."
        )
    if not is_signed(key, signed_message(signed.root_digest), signed.signature):
        raise IdentityError(
            f"The signature of {signed.root_digest[:12]}… is not one of key {given[:16]}…: the "
            f"signature was edited or damaged. Fetch it again."
        )
    if signed.root_digest not in (manifest.root_digest, manifest.whole().root_digest):
        raise IdentityError(
            f"Key {given[:16]}… signed {signed.root_digest[:12]}…, this store is "
            f"{manifest.root_digest[:12]}…: another store, or one that was changed after it was "
            f"signed. Ask for its own signature."
        )


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Create a file that must not exist, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with naming(str(path)), os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise


def _key_file(path: Path) -> bytes:
    with naming(str(path)), open(path, "rb") as file:
        check_size(str(path), os.fstat(file.fileno()).st_size, MAX_BYTES)
        return file.read()


def _no_key(path: Path, content: bytes, wanted: str) -> str:
    other = {"private": b"PUBLIC KEY", "public": b"PRIVATE KEY"}[wanted]
    swapped = ", but the other key of a pair" if other in content else ""
    return (
        f"{path} is no {wanted} key of Ed25519 as PEM{swapped}. Make a pair with `kdcache keygen`."
    )


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ConfigError(
            "Signatures need the package cryptography: pip install 'kdcache[sign]'."
        ) from None
    return ed25519


def _serialization() -> Any:
    _ed25519()
    from cryptography.hazmat.primitives import serialization

    return serialization
