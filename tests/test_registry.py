from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.errors import ConfigError
from kdcache.registry import known_names, lookup


def install(directory: Path, package: str, entries: dict[str, str]) -> None:
    """What an installer leaves of a package with entry points in the group kdcache.models."""
    metadata = directory / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[kdcache.models]", *lines]) + "\n")


def test_built_in_models_are_found_by_their_entry_points() -> None:
    from kdcache.models.painn import PaiNN

    assert {"painn", "schnet"} <= set(known_names("kdcache.models"))
    assert lookup("kdcache.models", "painn") is PaiNN


def test_another_package_adds_a_name_but_cannot_take_a_built_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache.models.painn import PaiNN

    install(tmp_path, "elsewhere", {"painn": "json:loads", "other": "json:dumps"})
    monkeypatch.syspath_prepend(tmp_path)
    import json

    assert lookup("kdcache.models", "other") is json.dumps
    assert lookup("kdcache.models", "painn") is PaiNN


def test_a_stale_copy_of_our_metadata_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "kdcache", {})
    monkeypatch.syspath_prepend(tmp_path)
    assert {"painn", "schnet"} <= set(known_names("kdcache.models"))


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"models has no 'pain': did you mean painn\?"):
        lookup("kdcache.models", "pain")


def test_import_path_is_followed_only_where_allowed() -> None:
    import json

    with pytest.raises(ConfigError, match="would run its code"):
        lookup("kdcache.models", "json:loads")
    assert lookup("kdcache.models", "json:loads", allow_import=True) is json.loads


@pytest.mark.parametrize("name", ["json:lods", "no_such_package:x", "json:", ":x", "a:b:c"])
def test_import_path_that_leads_nowhere_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be imported") as raised:
        lookup("kdcache.models", name, allow_import=True)
    assert "\n" not in str(raised.value)
