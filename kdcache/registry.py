"""Names that open extensions: models, readers and others by entry point, or by import path.

Built-ins use the same door as anybody's package: an entry-point group in pyproject.toml.
Invariant: a name never imports code that was not installed for it; `package.module:attribute` is
followed only where the caller allows it, which is the command line and never a file.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, distributions

from kdcache.errors import ConfigError, did_you_mean


def known_names(group: str) -> list[str]:
    """The names installed in an entry-point group, sorted."""
    return sorted(_entries(group))


def lookup(group: str, name: str, *, allow_import: bool = False) -> object:
    """The object behind a name.

    Args:
        group: entry-point group, such as "kdcache.models".
        name: an installed name, or "package.module:attribute".
        allow_import: follow an import path. True only for what a person typed.

    Raises:
        ConfigError: an unknown name, an import path where none is allowed, or an object that
            cannot be imported.
    """
    kind = group.rpartition(".")[2]
    if ":" in name:
        if not allow_import:
            raise ConfigError(
                f"{name} is an import path, and importing it would run its code. "
                f"Name an installed one of {kind} ({', '.join(known_names(group))}), or give the "
                "path on the command line."
            )
        return _load(EntryPoint(name=name, value=name, group=group), kind)
    entries = _entries(group)
    if name not in entries:
        raise ConfigError(f"{kind} has no {name!r}: {did_you_mean(name, entries)}.")
    return _load(entries[name], kind)


def _entries(group: str) -> dict[str, EntryPoint]:
    # Not entry_points(): it reads one copy of each distribution, and in a source tree that may be
    # what an earlier build left there, without the names added since.
    found: dict[str, EntryPoint] = {}
    built_in: dict[str, EntryPoint] = {}
    for distribution in distributions():
        entries = distribution.entry_points.select(group=group)
        # Asked only of those with entries: parsing every package's metadata takes 0.15 s.
        kept = built_in if entries and distribution.metadata["Name"] == "kdcache" else found
        for entry in entries:
            kept.setdefault(entry.name, entry)
    return found | built_in  # nobody else's package can take a built-in name


def _load(entry: EntryPoint, kind: str) -> object:
    # Not EntryPoint.load: an import path from a person may be malformed in ways it does not name.
    module_name, _, attributes = entry.value.partition(":")
    try:
        found: object = import_module(module_name)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{entry.value} of {kind} cannot be imported: {error}. "
            "Install its package in this environment, or correct the path."
        ) from error
    return found
