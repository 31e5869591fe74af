"""Where a store is: a directory, or the address of one on a server.

Owns what counts as an address. Invariant: an address names a folder, without credentials, so it
may stand in messages and reports.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kdcache.errors import StoreError

SCHEMES = ("https", "http", "s3", "gs", "az")
# `Path("https://host/x")` has one slash left; no local folder is called "https:".
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)/*([^/].*|)", re.DOTALL)


class StoreUrl(str):
    """The address of a store; made by `store_location`."""

    @property
    def name(self) -> str:
        """Its last part, as of a path."""
        return self.rpartition("/")[2]


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether this is meant as an address, not as a path."""
    match = _ADDRESS.fullmatch(os.fspath(path))
    return match is not None and (match[1].lower() in SCHEMES or match[2] == "/")


def store_location(path: str | os.PathLike[str]) -> Path | StoreUrl:
    """A path as it is, an address checked.

    Raises:
        StoreError: an address of a kind that is not read, or one that holds more than a folder.

    Example:
        >>> store_location("s3://bucket/features.zarr/")
        's3://bucket/features.zarr'
    """
    text = os.fspath(path)
    match = _ADDRESS.fullmatch(text)
    if match is None or not is_url(text):
        return Path(text)
    scheme, rest = match[1].lower(), match[3].rstrip("/")
    if scheme not in SCHEMES:
        raise StoreError(
            f"{text}: stores are read from {', '.join(f'{s}://' for s in SCHEMES)} and from local "
            f"paths, not from {scheme}://. Copy the store to one of these."
        )
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        host, extra = parts.hostname, parts.query or parts.fragment
        has_login = "@" in parts.netloc
    except ValueError as error:
        raise StoreError(f"{scheme}://{rest} is no address ({error}). Check it.") from None
    if has_login:
        # Not shown: it would end in logs.
        raise StoreError(
            f"The address of a store on {host} holds a user or password, which would stand in "
            f"messages and reports. Leave it out; credentials go into the environment."
        )
    if extra or not host or ".." in parts.path.split("/"):
        raise StoreError(
            f"{scheme}://{parts.netloc}{parts.path} must be the plain address of a folder, without "
            f"'?', '#' or '..': a store is many files, and a signed address opens one."
        )
    return StoreUrl(f"{scheme}://{rest}")


def without_file_scheme(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path that a file:// address names; all else as it is.

    Raises:
        StoreError: the address is of another machine.

    Example:
        >>> without_file_scheme("file:///data/features.zarr")
        '/data/features.zarr'
    """
    text = os.fspath(path)
    # `Path` leaves one slash of the three.
    match = re.fullmatch(r"(?i:file):/(?:/([^/]*)/)?([^/].*)", text, re.DOTALL)
    if match is None:
        return path
    if match[1] not in (None, "", "localhost"):
        raise StoreError(f"{text} is a path of the machine {match[1]}. Name one of this machine.")
    return "/" + unquote(match[2])


def local_path(path: str | os.PathLike[str], purpose: str) -> Path:
    """A path that something is written to.

    Args:
        path: as given.
        purpose: what would be written, for the message.

    Raises:
        StoreError: it is the address of a server.
    """
    if is_url(path):
        raise StoreError(
            f"{store_location(path)} is on a server, and {purpose} is written to a disk: a store "
            f"grows by files that are renamed when they are whole. Name a local path and copy the "
            f"finished store there."
        )
    return Path(path)
