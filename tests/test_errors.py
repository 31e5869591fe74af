"""What errors say: one line, bounded, whatever a library or a stranger put into it."""

from __future__ import annotations

import doctest

import pytest

from kdcache import errors
from kdcache.errors import LONGEST_REASON, KdcacheError, reason_of


def test_examples_in_docstrings_hold() -> None:
    assert doctest.testmod(errors).failed == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no such\n\n  thing. "), "no such thing"),
        (RuntimeError(), "RuntimeError"),
        (RuntimeError(" \n"), "RuntimeError"),
        (ValueError("a\x1b[31mred\x07\tone"), "a?[31mred? one"),
        (KeyError("shape"), "'shape'"),
        (
            RuntimeError("no bytes left\nException raised from read at a.cpp:1 (most recent\n#0 f"),
            "no bytes left",
        ),
    ],
)
def test_a_reason_is_one_line_without_its_stop(error: Exception, said: str) -> None:
    assert reason_of(error) == said


def test_a_reason_and_a_line_are_bounded() -> None:
    assert reason_of(ValueError("x" * LONGEST_REASON)) == "x" * LONGEST_REASON
    assert reason_of(ValueError("x " * 10**6)) == ("x " * LONGEST_REASON)[:LONGEST_REASON] + "…"
    assert str(KdcacheError("x" * 10**6)) == "x" * (errors.LONGEST_LINE - 1) + "…"
    assert str(KdcacheError("a\nb\x07")) == "a b?"
