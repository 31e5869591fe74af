"""The command itself: help at once, nearest names, one line for what goes wrong, pipes, signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdcache_cli.main import COMMANDS
from tests.cli.commands import kdcache, refused, settings, usage

COMMAND = [sys.executable, "-m", "kdcache_cli"]


def test_help_names_every_command_and_imports_no_library() -> None:
    program = (
        "import sys; from kdcache_cli.main import main; main(['--help'], standalone_mode=False);"
        "sys.exit(bool({'torch', 'numpy', 'zarr', 'ase', 'tqdm'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    for name in COMMANDS:
        assert f"  {name} " in found.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_a_line_for_each_option(name: str) -> None:
    shown = kdcache(name, "--help")
    assert shown.startswith(f"Usage: main {name}")
    assert "--help" in shown


def test_help_of_commands_imports_no_torch() -> None:
    program = (
        "import sys; from kdcache_cli.main import main, COMMANDS\n"
        "for name in COMMANDS: main([name, '--help'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_a_misspelt_command_or_option_is_answered_with_the_nearest() -> None:
    assert "did you mean import?" in usage("imprt", "a.xyz")
    assert "'--output'" in usage("import", "a.xyz", "--outptu", "b.zarr")


def test_the_module_runs_as_the_script_does() -> None:
    found = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("kdcache, version ")


def test_errors_of_the_system_are_one_line(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refused("import", data, "-o", tmp_path / "file" / "data.zarr")
    assert line.endswith("Not a directory.")


def test_a_closed_pipe_ends_in_silence(features: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "inspect", str(features), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.proof
def test_an_interrupted_training_says_so_and_goes_on(features: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["train-student", str(features), "-o", str(run), *settings("training.max_steps=9999")]
    with subprocess.Popen([*COMMAND, *command], stderr=subprocess.PIPE, text=True) as process:
        while not (run / "model.json").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 130
    assert said == "kdcache: stopped. The same command goes on where this one ended.\n"
    last = max(int(path.name.removeprefix("step-")) for path in (run / "state").glob("step-*[0-9]"))
    kdcache(*command, "--stop-after", last + 3)
    assert (run / "state" / f"step-{last + 3:09d}").is_dir()
