from __future__ import annotations

import os

import pytest

from kdcache.processors import n_processors


def test_no_more_than_the_process_was_given() -> None:
    assert 1 <= n_processors() <= (os.cpu_count() or 1)


def test_where_systems_give_none_out_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert n_processors() == 12
