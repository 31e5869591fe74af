"""A folder of an object store as the place where a store arrives: s3://, gs://, az://.

Objects appear whole under their names, each with its SHA-256 as metadata (`sha256`), which a later
attempt compares instead of fetching them. Invariant: while objects are exchanged there is no
manifest, and an object whose bytes were not found right never appears.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kdcache.errors import StoreError
from kdcache.sharing.shipment import Parcel, Shipment
from kdcache.sharing.transfer import Moved, checked
from kdcache.store.contents import ZARR
from kdcache.store.files import inside
from kdcache.store.index import INDEX
from kdcache.store.location import StoreUrl
from kdcache.store.manifest import MANIFEST, Manifest, read_manifest
from kdcache.store.remote import RemoteFiles, connect, reason_and_status
from kdcache.store.signature import SIGNATURE

DIGEST = "sha256"  # name of the metadata; Azure allows letters and digits alone
MARK = ".work/publish.json"
RETRIES = 8
# Larger files go up in parts of this size, two at a time: 8 jobs hold some 200 MB.
PART = 8 * 2**20
PARTS_AT_ONCE = 2
MOST_PARTS = 9000  # S3 and Google take 10,000


class BucketTarget:
    """A folder on s3://, gs:// or az://.

    Args:
        location: its address.
        client: an obstore store whose root is the folder; by default made of the address.

    Raises:
        StoreError: obstore is not installed, the address lacks something, or nothing can be
            written to addresses of its kind.
    """

    def __init__(self, location: StoreUrl, client: Any = None) -> None:
        if location.startswith(("http:", "https:")):
            raise StoreError(
                f"{location} is a web address, which is read from only. Publish to a directory "
                f"that the server shows, or to s3://, gs:// or az://."
            )
        self.location = location
        self._client = connect(location, RETRIES) if client is None else client

    def found(self) -> Manifest | None:
        """As `Target.found`."""
        sizes = self._sizes()
        if MARK in sizes:  # interrupted, and what it replaces was asked for
            return None
        if MANIFEST in sizes:
            return read_manifest(RemoteFiles(self.location, self._client))
        if sizes:
            raise self._occupied(sizes)
        return None

    @contextmanager
    def receive(self, shipment: Shipment, replace: bool) -> Iterator[BucketDelivery | None]:
        """As `Target.receive`; what is there is looked at object by object, without fetching it."""
        sizes = self._sizes()
        stale = self._replaced(shipment.manifest, sizes, replace)
        delivery = BucketDelivery(self.location, self._client, shipment, sizes, stale)
        delivery.begin()
        yield delivery

    def _sizes(self) -> dict[str, int]:
        with _refusals(str(self.location)):
            sizes = {
                str(one["path"]): int(one["size"]) for page in self._client.list() for one in page
            }
        sizes.pop("", None)  # what web consoles make of "create folder"
        return sizes

    def _occupied(self, sizes: Mapping[str, int]) -> StoreError:
        return StoreError(
            f"{self.location} holds {len(sizes)} objects (such as {min(sizes)}) and no store. "
            f"Nothing is overwritten: name another folder."
        )

    def _replaced(self, manifest: Manifest, sizes: Mapping[str, int], replace: bool) -> list[str]:
        """Objects of another store that are no part of this one.

        Raises:
            StoreError: another store is there or was begun, and does not give way; or no store is.
        """
        begun, stale = read_mark(self._client, self.location) if MARK in sizes else ("", [])
        if MANIFEST in sizes:
            found = read_manifest(RemoteFiles(self.location, self._client))
            root, held = found.root_digest, set(found.digests)
        elif begun:
            root, held = begun, set(stale)
        elif sizes:
            raise self._occupied(sizes)
        else:
            return []
        # A mark of this store says that what it replaces was asked for.
        if root != manifest.root_digest and begun != manifest.root_digest and not replace:
            state = "is another store" if MANIFEST in sizes else "holds a part of another store"
            raise StoreError(
                f"{self.location} {state} ({root[:12]}…, this one is {manifest.root_digest[:12]}…)."
                f" Nothing is overwritten: name another folder, or ask for it (--replace)."
            )
        if root != manifest.root_digest and MANIFEST not in sizes:
            held |= {name for name in sizes if _is_of_a_store(name)}  # what an attempt left
        # A manifest of somebody's own may list whatever lies there; what is deleted is a store's.
        removable = {name for name in held | set(stale) if _is_of_a_store(name)}
        return sorted(removable - manifest.digests.keys())


class BucketDelivery:
    """A store that is arriving in a bucket; made by `BucketTarget`."""

    def __init__(
        self,
        location: StoreUrl,
        client: Any,
        shipment: Shipment,
        sizes: Mapping[str, int],
        stale: list[str],
    ) -> None:
        self._location = location
        self._client = client
        self._manifest = shipment.manifest
        self._signature = shipment.signature
        self._sizes = sizes
        self._stale = stale
        self._is_marked = False

    def begin(self) -> None:
        """Say what comes; a manifest of another store goes before its objects do."""
        content = self._manifest.to_bytes()
        if MANIFEST in self._sizes and self._is(MANIFEST, len(content), _sha256(content)):
            return
        self._is_marked = True
        mark = {"root_digest": self._manifest.root_digest, "replaces": self._stale}
        self._put(MARK, json.dumps(mark).encode())
        if MANIFEST in self._sizes:
            self._delete([MANIFEST])

    def has(self, parcel: Parcel) -> bool:
        """By its size and the SHA-256 it was put with, in a request that fetches a byte."""
        return self._is(parcel.name, parcel.size, parcel.sha256)

    def put(self, parcel: Parcel, moved: Moved) -> None:
        """As `Delivery.put`: an error in the middle, or a wrong digest, leaves no object."""
        pieces = checked(parcel, 0, hashlib.sha256(), moved)
        if parcel.size <= PART:
            self._put(parcel.name, b"".join(pieces), parcel.sha256)
        else:
            self._put(parcel.name, pieces, parcel.sha256, max(PART, parcel.size // MOST_PARTS))

    def finish(self) -> None:
        """As `Delivery.finish`; then what another store left goes."""
        if not self._is_marked:
            # The manifest stands; a signature beside it may be another person's, and stays.
            if self._signature is not None and SIGNATURE not in self._sizes:
                self._put(SIGNATURE, self._signature)
            self._delete([name for name in (*self._stale, MARK) if name in self._sizes])
            return
        root = read_mark(self._client, self._location)[0]
        if root != self._manifest.root_digest:
            what = f"began to publish {root[:12]}…" if root else "published or deleted"
            raise StoreError(
                f"{self._location}: somebody else {what} there meanwhile. Objects may be of both "
                f"stores; agree on who publishes, and run the command again."
            )
        if self._signature is not None:
            self._put(SIGNATURE, self._signature)
        elif SIGNATURE in self._sizes:
            self._delete([SIGNATURE])
        content = self._manifest.to_bytes()
        self._put(MANIFEST, content, _sha256(content))
        self._delete([*self._stale, MARK])

    def _is(self, name: str, size: int, sha256: str) -> bool:
        if self._sizes.get(name) != size:
            return False
        with _refusals(self._where(name)):
            result = self._client.get(name, options={"range": (0, 1)})
            found = {str(key).lower(): value for key, value in result.attributes.items()}
        return found.get(DIGEST) == sha256

    def _put(
        self, name: str, content: bytes | Iterable[bytes], sha256: str = "", part: int = PART
    ) -> None:
        with _refusals(self._where(name)):
            self._client.put(
                inside(name),
                content,
                attributes={DIGEST: sha256} if sha256 else None,
                use_multipart=not isinstance(content, bytes),
                chunk_size=part,
                max_concurrency=PARTS_AT_ONCE,
            )

    def _delete(self, names: list[str]) -> None:
        with _refusals(str(self._location)):
            for name in names:
                try:
                    self._client.delete(name)
                except FileNotFoundError:
                    continue  # an earlier attempt came so far

    def _where(self, name: str) -> str:
        return f"{self._location}/{name}"


def read_mark(client: Any, location: StoreUrl) -> tuple[str, list[str]]:
    """Root digest of the store that is being published, "" for none, and the objects it replaces.

    Raises:
        StoreError: the object is none of ours.
    """
    try:
        with _refusals(f"{location}/{MARK}"):
            try:
                content = bytes(client.get(MARK).bytes())
            except FileNotFoundError:
                return "", []
        mark = json.loads(content)
        return str(mark["root_digest"]), [inside(str(name)) for name in mark["replaces"]]
    except (ValueError, TypeError, KeyError):
        raise StoreError(
            f"{location}/{MARK} is none of ours, though of its name. Remove it, or name another "
            f"folder."
        ) from None


def _is_of_a_store(name: str) -> bool:
    return name in (INDEX, ZARR) or name.startswith(("structures/", "teachers/"))


@contextmanager
def _refusals(where: str) -> Iterator[None]:
    """What a service answers, as one line that names the object."""
    try:
        yield
    except Exception as error:
        kind = type(error)
        if kind.__module__.partition(".")[0] != "obstore" and not isinstance(error, OSError):
            raise
        if kind.__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
            raise StoreError(
                f"{where}: the service denies access. Publishing lists, reads, writes and deletes "
                f"in this folder; give credentials that may, in the environment."
            ) from None
        raise StoreError(
            f"{where} cannot be written: {reason_and_status(error)[0]}. What arrived is kept; the "
            f"same command goes on."
        ) from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
