"""Bars on a terminal, a line now and then in a log, and nothing for what is short."""

from __future__ import annotations

import io
import sys
from itertools import count

import pytest

from kdcache_cli import progress


def test_a_short_step_leaves_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bars("read", 3, "structures") as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


def test_a_long_step_leaves_a_line_each_half_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count(0.0, 10.0)  # ten seconds pass between two looks at it
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.bars("train run", 100, "steps") as advance:
        for _ in range(7):
            advance(10, note="E 12.0 meV")
    assert capsys.readouterr().err.splitlines() == [
        "train run: 30 of 100 steps, 1/s, E 12.0 meV",
        "train run: 60 of 100 steps, 1/s, E 12.0 meV",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.bars("read", None, "structures") as advance:
        advance(5, note="loss 1")
    assert "read: 5.00 structures" in terminal.getvalue()
    assert "loss 1" in terminal.getvalue()
