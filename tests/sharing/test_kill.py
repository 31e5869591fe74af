"""kill -9 at random points of a pull and of a publish; the same command goes on to the same end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from kdcache.sharing import publish_store, pull_store
from kdcache.store import verify_store
from kdcache.store.manifest import MANIFEST
from tests.cli.killing import run
from tests.sharing.buckets import bucket_server
from tests.sharing.counting import CountingServer
from tests.store.sample import files_of

KILLS = 3


def kdcache(
    *arguments: object,
    watch: Callable[[int], None] = lambda pid: None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Exit code of a command in a process of its own, told of before it does anything."""
    command = [sys.executable, "-m", "kdcache_cli", *map(str, arguments)]
    with subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, stderr=subprocess.PIPE
    ) as process:
        watch(process.pid)
        _, said = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said.decode()
    return process.returncode


def test_a_pull_killed_again_and_again_fetches_each_file_once(
    url: str, server: CountingServer, finished: Path, tmp_path: Path
) -> None:
    pull_store(url, tmp_path / "undisturbed.zarr")
    total = server.sent
    target = tmp_path / "target.zarr"
    command = ["pull", url, "-o", target, "--jobs", 2]
    server.ranges_asked.clear()
    kills = 0
    # Of the whole, in each attempt: together less than all, so that something is left to be killed.
    for share in np.random.default_rng().uniform(0.1, 0.3, KILLS):
        server.sent = 0

        def aim(pid: int, after: int = int(share * total)) -> None:
            server.victim = (pid, after)

        kills += kdcache(*command, watch=aim) < 0
        server.victim = None
        if target.exists():
            assert verify_store(target).problems == []
    assert kdcache(*command) == 0
    assert kills > 1
    assert files_of(target) == files_of(finished)
    # Two at once may be on their way at a kill, and one more is in doubt.
    again = [p for p, asked in server.ranges_asked.items() if MANIFEST not in p and len(asked) > 1]
    assert len(again) <= 3 * kills


def test_a_publish_to_s3_killed_again_and_again_ends_whole(finished: Path) -> None:
    pytest.importorskip("moto")
    with bucket_server() as service:
        command = ["publish", finished, "s3://bucket/features.zarr", "--jobs", 4]
        kills = 0
        for requests in np.random.default_rng().integers(5, 120, KILLS).tolist():
            service.requests.clear()

            def aim(pid: int, after: int = requests) -> None:
                service.victim = (pid, after)

            kills += kdcache(*command, watch=aim, environment=service.environment) < 0
            service.victim = None
        assert kdcache(*command, environment=service.environment) == 0
        assert kills > 0
        assert service.objects("features.zarr") == files_of(finished)


@pytest.mark.parametrize("replace", [False, True])
def test_a_kill_at_any_touch_of_a_directory_is_gone_on_from(
    finished: Path, tmp_path: Path, replace: bool
) -> None:
    target, old = tmp_path / "target.zarr", tmp_path / "old.zarr"
    publish_store(finished, old, fields=["node"])

    def begin() -> None:
        shutil.rmtree(target, ignore_errors=True)
        if replace:
            shutil.copytree(old, target)

    begin()
    # One file at a time: several that make folders at once touch them more or less often.
    command = ["publish", finished, target, "--jobs", 1, *(["--replace"] * replace)]
    touches = run(command, target)
    # The last touches are those at which the store takes its name.
    generator, few = np.random.default_rng(), 2 if replace else 1
    points = generator.integers(1, touches - 12, few).tolist()
    points += generator.integers(touches - 12, touches + 1, few).tolist()
    for point in points:
        begin()
        where = f"killed at touch {point} of {touches}"
        assert run(command, target, kill_at=point) == -signal.SIGKILL, where
        if target.exists():
            assert verify_store(target).problems == [], where
        assert run(command, target) >= 0, where
        assert files_of(target) == files_of(finished), where
        left = {file.name for file in tmp_path.iterdir()}
        assert left == {"target.zarr", "old.zarr"}, where
