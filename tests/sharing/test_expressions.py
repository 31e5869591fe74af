"""Conditions on an index: what they mean, and what is refused instead of being run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kdcache.errors import ConfigError
from kdcache.sharing.expressions import normal, where
from kdcache.store import StoreIndex
from tests.store.sample import Sample


@pytest.fixture(scope="module")
def index(sample: Sample) -> StoreIndex:
    return sample.index


@pytest.mark.parametrize(
    "text",
    [
        "n_atoms < 5",
        "5 <= n_atoms < 9",
        'split == "train" and n_atoms != 1',
        "not (split == 'val' or group == 'g1')",
        "group in ('g0', 'g2')",
        "group not in ['g0']",
        "n_atoms in (1, 3, 12)",
        "n_edges / n_atoms >= 2",
        "n_atoms * 2 - 1 > weight + -3.5",
        "structure_id > 'frame:5'",
        "source_index < 10 and n_edges == 0",
        "n_atoms < 99999999999999999999999999",
        "'train' == split",
    ],
)
def test_a_condition_means_what_it_means_in_python_of_every_row(
    index: StoreIndex, text: str
) -> None:
    names = ("n_atoms", "n_edges", "weight", "source_index", "structure_id", "split", "group")
    rows: list[dict[str, Any]] = [
        {name: getattr(index, name)[row] for name in names} for row in range(len(index))
    ]
    expected = [bool(eval(text, {}, row)) for row in rows]  # the texts above, no others
    assert len(set(expected)) == 2 or "999" in text
    np.testing.assert_array_equal(where(index, text), expected)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n_atom < 5", "did you mean n_atoms"),
        ("n_atoms", "is a number, which is neither true nor false"),
        ("n_atoms and split == 'val'", "'n_atoms' is a number, no condition"),
        ("split < 5", "compares a text with a number"),
        ("(n_atoms < 5) == (n_edges < 5)", "compares a condition with a condition"),
        ("n_atoms < ", "cannot be parsed"),
        ("", "cannot be parsed"),
        ("n_atoms < 5; n_edges", "cannot be parsed"),
        ("n_atoms\x00 < 5", "cannot be parsed"),
        ("__import__('os').system('true')", "is not part of the language"),
        ("n_atoms.__class__", "is not part of the language"),
        ("[n for n in (1,)]", "is not part of the language"),
        ("(lambda: 1)() == 1", "is not part of the language"),
        ("n_atoms < 9**9**9", "is not part of the language"),
        ("split[0] == 'v'", "is not part of the language"),
        ("n_atoms is 5", "write =="),
        ("split in 'train'", "values in brackets"),
        ("split in ()", "values in brackets"),
        ("n_atoms == True", "is no number and no text"),
        ("n_atoms == None", "is no number and no text"),
        ("n_atoms < 5" + " " * 2000, "at most 2000 are read"),
        ("not " * 60 + "n_atoms < 5", "nested more than 50 deep"),
        ("(" * 900 + "n_atoms" + ")" * 900, "cannot be parsed"),
        ("f(" + "-" * 1500 + "1)", "is not part of the language"),
        ("n_atoms" + "[0]" * 600, "is not part of the language"),
        ("content_hash == 'a'", "no column 'content_hash'"),
    ],
)
def test_what_is_no_condition_is_refused_in_one_line(
    index: StoreIndex, text: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        where(index, text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_spellings_of_one_condition_are_one() -> None:
    assert normal("n_atoms<5 and(split=='val')") == normal('n_atoms < 5 and split == "val"')
