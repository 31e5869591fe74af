"""Signatures: those of RFC 8032 through our door, ours through openssl's, and every refusal."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import x25519

from kdcache.errors import ConfigError, IdentityError, StoreError
from kdcache.store import open_store, read_manifest, verify_store
from kdcache.store.files import LocalFiles
from kdcache.store.joining import join_store
from kdcache.store.reader import store_files
from kdcache.store.signature import (
    SIGNATURE,
    check_signature,
    fingerprint,
    is_signed,
    make_keys,
    read_private_key,
    read_public_key,
    read_signature,
    sign_message,
    sign_store,
    signed_message,
)
from kdcache.store.withholding import write_without_structures
from tests.store.sample import make_dataset, make_sample, write_store

# RFC 8032, section 7.1: tests 1, 2, 3 and SHA(abc): secret key, public key, message, signature.
RFC_8032 = (
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701c"
        "f9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0"
        "f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984"
        "dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
    (
        "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3f"
        "eebbd454d4423643ce80e2a9ac94fa54ca49f",
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b58909351fc9ac90b3ecfdfbc7c6643"
        "1e0303dca179c138ac17ad9bef1177331a704",
    ),
)


def pem(kind: str, prefix: str, key: str) -> str:
    """RFC 8410: the only bytes of an Ed25519 key file that differ are the key."""
    body = base64.b64encode(bytes.fromhex(prefix + key)).decode()
    return f"-----BEGIN {kind} KEY-----\n{body}\n-----END {kind} KEY-----\n"


@pytest.mark.parametrize(("secret", "public", "message", "signature"), RFC_8032)
def test_signatures_are_those_of_rfc_8032(
    secret: str, public: str, message: str, signature: str, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(pem("PRIVATE", "302e020100300506032b657004220420", secret))
    (tmp_path / "key.pub").write_text(pem("PUBLIC", "302a300506032b6570032100", public))
    content = bytes.fromhex(message)
    ours = sign_message(read_private_key(tmp_path / "key"), content)
    assert base64.b64decode(ours).hex() == signature
    key = read_public_key(tmp_path / "key.pub")
    assert is_signed(key, content, ours)
    assert not is_signed(key, content + b"\0", ours)
    flipped = bytearray(base64.b64decode(ours))
    flipped[40] ^= 1
    assert not is_signed(key, content, base64.b64encode(flipped).decode())


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "lab.pem"
    make_keys(path)
    return path


def public(keys: Path) -> Path:
    return keys.with_name(keys.name + ".pub")


@pytest.fixture
def signed(copied: Path, keys: Path) -> Path:
    """A store with its signature inside."""
    sign_store(read_manifest(copied), read_private_key(keys), copied / SIGNATURE)
    return copied


def test_openssl_accepts_our_signature_by_the_words_of_the_format(
    signed: Path, keys: Path, tmp_path: Path
) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl on this machine")
    document = json.loads((signed / SIGNATURE).read_text())
    root = json.loads((signed / "manifest.json").read_text())["root_digest"]
    message = b"kdcache store signature 1\n" + root.encode() + b"\n"
    assert len(message) == 91
    (tmp_path / "message").write_bytes(message)
    (tmp_path / "raw").write_bytes(base64.b64decode(document["signature"]))
    command = [openssl, "pkeyutl", "-verify", "-pubin", "-inkey", public(keys), "-rawin"]
    command += ["-in", tmp_path / "message", "-sigfile", tmp_path / "raw"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said
    assert "Verified Successfully" in said.stdout
    (tmp_path / "message").write_bytes(message.replace(root[:4].encode(), b"beef"))
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    der = [openssl, "pkey", "-pubin", "-in", public(keys), "-outform", "DER"]
    key = subprocess.run(der, capture_output=True, check=True).stdout
    digest = subprocess.run([openssl, "sha256", "-r"], input=key, capture_output=True, check=True)
    assert digest.stdout.decode().split()[0] == document["key_fingerprint"]


def test_openssls_keys_are_read(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl on this machine")
    key = tmp_path / "key"
    subprocess.run([openssl, "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    subprocess.run([openssl, "pkey", "-in", key, "-pubout", "-out", tmp_path / "pub"], check=True)
    mine = fingerprint(read_private_key(key).public_key())
    assert fingerprint(read_public_key(tmp_path / "pub")) == mine


def test_a_private_key_is_its_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "lab.pem"
    where, _ = make_keys(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert where == public(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"lab.pem exists"):
        make_keys(path)
    path.unlink()
    with pytest.raises(ConfigError, match=r"lab.pem.pub exists"):
        make_keys(path)
    assert not path.exists()
    make_keys(tmp_path / "other.pem")
    assert (tmp_path / "other.pem").read_bytes() != before


def test_keys_are_not_written_through_links_nor_over_what_comes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lab.pem", "lab.pem.pub"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ConfigError, match=f"{name} exists"):
            make_keys(tmp_path / "lab.pem")
        (tmp_path / name).unlink()
    real_open = os.open

    def late(path: Path, flags: int, mode: int = 0o777) -> int:
        path.write_text("somebody else's")
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(FileExistsError):
        make_keys(tmp_path / "lab.pem")
    assert (tmp_path / "lab.pem").read_text() == "somebody else's"
    assert [path.name for path in tmp_path.iterdir()] == ["lab.pem"]


@pytest.mark.parametrize("fails_at", [1, 2])
def test_half_a_pair_of_keys_is_none(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails while the private or the public key is written."""
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == fails_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"Input/output error: .*lab\.pem"):
        make_keys(tmp_path / "lab.pem")
    assert not list(tmp_path.iterdir())


def test_a_signed_store_is_whole_and_its_owners(signed: Path, keys: Path) -> None:
    found = read_signature(LocalFiles(signed))
    assert json.loads((signed / SIGNATURE).read_text())["algorithm"] == "Ed25519"
    check_signature(found, read_public_key(public(keys)), read_manifest(signed))
    assert verify_store(signed).problems == []


def test_a_signature_is_read_from_a_server(copied: Path, keys: Path, url: str) -> None:
    with pytest.raises(FileNotFoundError):
        read_signature(store_files(url))
    sign_store(read_manifest(copied), read_private_key(keys), copied / SIGNATURE)
    files = store_files(url)
    check_signature(read_signature(files), read_public_key(public(keys)), read_manifest(files))


def test_signatures_beside_the_store_count_too_and_are_not_overwritten(
    copied: Path, keys: Path, tmp_path: Path
) -> None:
    target = tmp_path / "copied.sig.json"
    sign_store(read_manifest(copied), read_private_key(keys), target)
    with pytest.raises(FileNotFoundError):
        read_signature(LocalFiles(copied))
    check_signature(read_signature(target), read_public_key(public(keys)), read_manifest(copied))
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "nowhere")
    for there in (target, link):
        with pytest.raises(StoreError, match="nothing is overwritten"):
            sign_store(read_manifest(copied), read_private_key(keys), there)
    target.write_bytes(b" " * 5000)
    with pytest.raises(StoreError, match="5000 bytes"):
        read_signature(target)


def test_another_key_another_store_and_another_signature_are_refused(
    signed: Path, keys: Path, tmp_path: Path
) -> None:
    found, manifest = read_signature(LocalFiles(signed)), read_manifest(signed)
    ours = read_public_key(public(keys))
    make_keys(tmp_path / "stranger")
    with pytest.raises(IdentityError, match="whoever signed is not whom you trust"):
        check_signature(found, read_public_key(tmp_path / "stranger.pub"), manifest)
    # A stranger who writes our fingerprint over his.
    stranger = read_private_key(tmp_path / "stranger")
    forged = found.model_copy(
        update={"signature": sign_message(stranger, signed_message(found.root_digest))}
    )
    with pytest.raises(IdentityError, match="is not one of key"):
        check_signature(forged, ours, manifest)
    other = read_manifest(write_store(tmp_path / "other.zarr", make_sample((2, 3))))
    with pytest.raises(IdentityError, match="another store, or one that was changed"):
        check_signature(found, ours, other)
    # Who writes the other store's digest into the signature has no signature of it.
    moved = found.model_copy(update={"root_digest": other.root_digest})
    with pytest.raises(IdentityError, match="is not one of key"):
        check_signature(moved, ours, other)
    # The digest alone, without what it is the digest of: another use of the key is no signature.
    bare = found.model_copy(
        update={"signature": sign_message(read_private_key(keys), found.root_digest.encode())}
    )
    with pytest.raises(IdentityError, match="is not one of key"):
        check_signature(bare, ours, manifest)


def test_truncated_signatures_are_refused_in_one_line(signed: Path) -> None:
    content = (signed / SIGNATURE).read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 3):
        (signed / SIGNATURE).write_bytes(content[:length])
        with pytest.raises(StoreError, match="is no signature") as raised:
            read_signature(LocalFiles(signed))
        assert "\n" not in str(raised.value)
    document = json.loads(content)
    for change in (
        {"signature": document["signature"][:80]},
        {"algorithm": "none"},
        {"key": "x"},
        {"signature": "A" * 85 + "==="},
    ):
        (signed / SIGNATURE).write_text(json.dumps(document | change))
        with pytest.raises(StoreError, match="is no signature"):
            read_signature(LocalFiles(signed))
    (signed / SIGNATURE).write_bytes(b" " * 5000)
    with pytest.raises(StoreError, match="5000 bytes"):
        read_signature(LocalFiles(signed))


def test_a_signature_of_the_whole_store_goes_with_its_part(
    signed: Path, keys: Path, tmp_path: Path
) -> None:
    ours = read_public_key(public(keys))
    write_without_structures(open_store(signed), tmp_path / "part.zarr")
    part = open_store(tmp_path / "part.zarr")
    check_signature(read_signature(part.files), ours, part.manifest)
    join_store(part, make_dataset(), tmp_path / "full.zarr")
    full = open_store(tmp_path / "full.zarr")
    check_signature(read_signature(full.files), ours, full.manifest)
    data = make_dataset()
    data[0].energy = 1.0
    join_store(part, data, tmp_path / "own.zarr", own_labels=True)
    assert not (tmp_path / "own.zarr" / SIGNATURE).exists()


NO_KEYS = (b"", b"hello", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")


@pytest.mark.parametrize("content", NO_KEYS)
def test_what_is_no_key_is_said_in_one_line(content: bytes, tmp_path: Path, keys: Path) -> None:
    (tmp_path / "key").write_bytes(content)
    for read in (read_private_key, read_public_key):
        with pytest.raises(ConfigError, match=r"is no (private|public) key of Ed25519 as PEM"):
            read(tmp_path / "key")
    with pytest.raises(ConfigError, match="the other key of a pair"):
        read_public_key(keys)
    with pytest.raises(ConfigError, match="the other key of a pair"):
        read_private_key(public(keys))


def test_keys_of_another_kind_and_what_is_too_long_for_one_are_refused(
    tmp_path: Path, keys: Path
) -> None:
    key, public_key = tmp_path / "key", tmp_path / "key.pub"
    other = x25519.X25519PrivateKey.generate()
    public_format = serialization.PublicFormat.SubjectPublicKeyInfo
    pem_of = serialization.Encoding.PEM
    plain = (pem_of, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key.write_bytes(other.private_bytes(*plain))
    public_key.write_bytes(other.public_key().public_bytes(pem_of, public_format))
    with pytest.raises(ConfigError, match="is no private key of Ed25519"):
        read_private_key(key)
    with pytest.raises(ConfigError, match="is no public key of Ed25519"):
        read_public_key(public_key)
    # A parser of PEM passes over what stands behind a key.
    for read, file in ((read_private_key, keys), (read_public_key, public(keys))):
        (tmp_path / "long").write_bytes(file.read_bytes() + b"\n" * 5000)
        with pytest.raises(StoreError, match="at most 4096 are expected"):
            read(tmp_path / "long")


def test_an_encrypted_key_says_what_to_do(tmp_path: Path, keys: Path) -> None:
    locked = read_private_key(keys).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (tmp_path / "key").write_bytes(locked)
    with pytest.raises(ConfigError, match=r"is encrypted\. .*openssl pkey -in key"):
        read_private_key(tmp_path / "key")
