"""What a user gets: the wheel, the names in it, the tested versions, the README's commands."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kdcache
from kdcache_cli.main import main

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Tools of the environment itself: pip brings them, or pins them when it builds.
NOT_PINNED = {"pip", "setuptools", "kdcache"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel, built from a copy so that no build folder is left here."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("kdcache", "cli", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    (source / "dist").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (built,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_a_wheel_holds_our_two_packages_and_nothing_else(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {"kdcache", "kdcache_cli", f"kdcache-{PROJECT['version']}.dist-info"}


def test_a_wheel_holds_every_module(wheel: list[str]) -> None:
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "kdcache").rglob("*.py")}
    modules |= {str(p.relative_to(ROOT / "cli")) for p in (ROOT / "cli").rglob("*.py")}
    assert {name for name in wheel if name.endswith(".py")} == modules


@pytest.mark.parametrize("name", ["kdcache/py.typed", "kdcache/store/FORMAT.md"])
def test_a_wheel_holds_the_format_and_the_types_marker(wheel: list[str], name: str) -> None:
    assert name in wheel


def test_versions_agree() -> None:
    assert version("kdcache") == PROJECT["version"] == kdcache.__version__


def declared() -> list[tuple[str, str, str]]:
    """(group, name, value) of every entry point in pyproject.toml."""
    groups = {"console_scripts": PROJECT["scripts"], **PROJECT["entry-points"]}
    return [(g, name, value) for g, named in groups.items() for name, value in named.items()]


@pytest.mark.parametrize(("group", "name", "value"), declared())
def test_every_entry_point_resolves_and_is_installed(group: str, name: str, value: str) -> None:
    module, _, attribute = value.partition(":")
    assert callable(getattr(import_module(module), attribute))
    assert value in [entry.value for entry in entry_points(group=group, name=name)]


def pins() -> dict[str, str]:
    """constraints.txt as version by name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): pinned for name, pinned in found}


def required() -> Iterator[tuple[str, Requirement]]:
    """(who, what) for the project, its extras, and whatever of these is installed."""
    extras = PROJECT["optional-dependencies"].values()
    asked = [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]
    todo = [("kdcache", Requirement(text)) for text in asked]
    seen = set()
    while todo:
        who, what = todo.pop()
        yield who, what
        key = (canonicalize_name(what.name), frozenset(what.extras))
        if key in seen or key[0] == "kdcache":
            continue
        seen.add(key)
        try:
            texts = requires(what.name) or []
        except PackageNotFoundError:
            continue
        for text in texts:
            following = Requirement(text)
            marker, wanted = following.marker, [*what.extras, ""]
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted):
                todo.append((what.name, following))


def test_every_requirement_is_pinned_to_a_version_that_satisfies_it() -> None:
    pinned, wrong = pins(), []
    for who, what in required():
        name = canonicalize_name(what.name)
        # torch's builds for GPUs need libraries that its CPU build does not; torch pins them.
        if name in NOT_PINNED or (who == "torch" and name not in pinned):
            continue
        if name not in pinned or not what.specifier.contains(pinned[name], prereleases=True):
            wrong.append(f"{who} needs {what}, pinned is {pinned.get(name, 'nothing')}")
    assert not wrong


def test_every_pin_is_needed() -> None:
    needed = {canonicalize_name(what.name) for _, what in required()}
    installed = {name for name in pins() if _is_installed(name)}
    assert not installed - needed


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def test_ci_finds_the_two_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"^commands=\$\((sed .*) README\.md\)$", script, re.M)
    assert pattern is not None
    command = [*shlex.split(pattern[1]), str(ROOT / "README.md")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(found) == 2
    assert all("pip install -c constraints.txt -e" in line for line in found)
    assert found[0].endswith("kdcache demo")
    assert found[1].split(" && ")[-1].startswith("pytest")


def readme_commands() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("kdcache ")]


@pytest.mark.parametrize("line", readme_commands())
def test_commands_of_the_readme_parse(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    context = click.Context(main)
    command = main.get_command(context, name)
    assert command is not None
    command.make_context(name, arguments, parent=context)


def test_the_readme_shows_commands() -> None:
    assert len(readme_commands()) >= 6
