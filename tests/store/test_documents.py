"""A document of a store is the one its fields give, or is refused with the place that differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdcache.errors import StoreError
from kdcache.store import open_store

ARRAY = "structures/forces/zarr.json"


def edit(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((store / ARRAY).read_text())
    change(document)
    (store / ARRAY).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(shape=[4, 3]), "has shape [4, 3], the manifest gives [120, 3]"),
        (lambda d: d.pop("data_type"), 'has data_type nothing, the manifest gives "float64"'),
        # A key that is null is there: Zarr refuses keys it does not know.
        (lambda d: d.update(more=None), "has more null, the manifest gives nothing"),
        (lambda d: d["attributes"].update(more=None), "has attributes more null"),
        (lambda d: d["attributes"].update(unit="eV"), 'has attributes unit "eV", the manifest'),
        (lambda d: d.update(codecs={}), "has codecs {}, the manifest gives [{"),
        (lambda d: d.update({"\x1b[2J": 1}), "has ?[2J 1, the manifest gives nothing"),
    ],
)
def test_the_first_difference_is_named_with_both_values(
    copied: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    edit(copied, change)
    with pytest.raises(StoreError) as raised:
        open_store(copied)
    assert said in str(raised.value)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("content", ["3", "[]", "null", '"text"'])
def test_what_is_no_object_is_refused(copied: Path, content: str) -> None:
    (copied / ARRAY).write_text(content)
    with pytest.raises(StoreError, match=r"forces/zarr\.json is .*, the manifest gives"):
        open_store(copied)


def test_another_spelling_is_the_same_document(copied: Path) -> None:
    edit(copied, lambda d: d.update(dict(reversed(d.items()))))
    open_store(copied)
