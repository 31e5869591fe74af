"""Commands on the address of a store: what they print and write is what they do from a disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.cli.commands import kdcache, refused, settings
from tests.store.serving import FileServer, served

pytest.importorskip("obstore")


@pytest.fixture
def server(features: Path) -> Iterator[FileServer]:
    with served(features.parent) as running:
        yield running


@pytest.fixture
def url(server: FileServer, features: Path) -> str:
    return f"{server.url}/{features.name}"


@pytest.mark.parametrize("cached", [False, True])
def test_a_student_from_an_address_is_that_from_the_disk_bit_for_bit(
    features: Path, url: str, tmp_path: Path, cached: bool
) -> None:
    options = ["--preset", "painn-small", "--strategy", "n2n"]
    options += settings("training.max_steps=5", "training.eval_every=5")
    cache = ["--store-cache", tmp_path / "cache"] if cached else []
    for store, run in ((features, "local"), (url, "remote")):
        kdcache("train-student", store, "-o", tmp_path / run, *options, *cache)
    local, remote = (load_file(tmp_path / run / "model.safetensors") for run in ("local", "remote"))
    assert local.keys() == remote.keys()
    assert all(local[name].tobytes() == remote[name].tobytes() for name in local)
    assert (tmp_path / "cache").exists() == cached


def test_inspect_and_verify_say_what_they_say_of_the_disk(
    features: Path, url: str, server: FileServer, tmp_path: Path
) -> None:
    cache = ["--store-cache", tmp_path, "--store-cache-size", "1MB"]
    for command in (["inspect"], ["inspect", "--json"], ["verify"]):
        # Without the rate, which verify ends with.
        said = kdcache(*command, url, *cache).partition(" checked; ")[0]
        here = kdcache(*command, features).partition(" checked; ")[0]
        assert said == here.replace(str(features), url)
    assert "KDCACHE_STORE_CACHE" not in os.environ


def test_evaluate_and_compare_read_an_address(features: Path, url: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kdcache("train-student", features, "-o", run, "--preset", "painn-small", *settings())
    reports = []
    for number, store in enumerate((features, url)):
        file = tmp_path / f"{number}.json"
        kdcache("evaluate", run, store, "--json", file)
        report = json.loads(file.read_text())
        reports.append({key: report[key] for key in report if "second" not in key})
        kdcache("compare", store, run, "-o", tmp_path / f"compared{number}")
    assert reports[0] == reports[1]
    compared = [(tmp_path / f"compared{n}" / "cka.csv").read_text() for n in (0, 1)]
    assert compared[0] == compared[1]


def test_writing_to_an_address_is_refused_in_one_line(
    features: Path, url: str, server: FileServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    kdcache("train-student", features, "-o", run, "--preset", "painn-small", *settings())
    server.requests.clear()
    for arguments in (
        ["import", features, "-o", url],
        ["dump-teacher", "--into", url, "--teacher", run, "--name", "other"],
        ["dump-teacher", features, "-o", url, "--teacher", run],
    ):
        assert f"{url} is on a server" in refused(*arguments)
    assert not server.requests


def test_what_cannot_be_reached_is_one_line(server: FileServer, url: str, tmp_path: Path) -> None:
    server.status[f"{url.rpartition('/')[2]}/manifest.json"] = 403
    run = tmp_path / "run"
    for arguments in (["inspect", url], ["verify", url], ["train-student", url, "-o", run]):
        assert "denies access" in refused(*arguments)
    assert not run.exists()
