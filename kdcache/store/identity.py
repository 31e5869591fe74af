"""Whether a store and a dataset belong together.

Content hashes decide, ids only help to say it. Invariant: a dataset passes exactly when it holds
the store's structures in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kdcache.errors import IdentityError
from kdcache.store.index import StoreIndex
from kdcache.store.location import StoreUrl
from kdcache.structures import dataset_digest

_CURE = (
    "Teacher rows would meet the wrong labels. Use the dataset the store was made from, or dump "
    "again."
)


def check_dataset(
    path: Path | StoreUrl,
    index: StoreIndex,
    content_hashes: Sequence[bytes],
    structure_ids: Sequence[str],
) -> None:
    """Compare a dataset with the one a store was made from.

    Args:
        path: of the store, for the message.
        index: of the store.
        content_hashes: of the dataset's structures, in its order.
        structure_ids: likewise.

    Raises:
        IdentityError: they differ; names the first structure that does and what happened: another
            dataset, the same structures in another order, or edited structures.
    """
    order = index.source_order
    expected = [row.tobytes() for row in index.content_hash[order]]
    given = [bytes(content_hash) for content_hash in content_hashes]
    if given == expected:
        return
    both = zip(given, expected, strict=False)
    first = next((i for i, (a, b) in enumerate(both) if a != b), min(len(given), len(expected)))
    theirs = str(structure_ids[first]) if first < len(given) else "none"
    ours = str(index.structure_id[order[first]]) if first < len(expected) else "none"
    said = f"first difference: structure {first}, {theirs!r}"
    if theirs != ours:
        said += f", in the store {ours!r}"
    if len(given) != len(expected):
        said = f"{len(given)} structures against {len(expected)}; {said}"
    raise IdentityError(
        f"{path} was made from dataset {dataset_digest(expected)[:12]}…, the data given is "
        f"{dataset_digest(given)[:12]}…: {_kind(given, expected, theirs == ours)} ({said}). {_CURE}"
    )


def _kind(given: list[bytes], expected: list[bytes], same_id: bool) -> str:
    if len(given) == len(expected):
        if Counter(given) == Counter(expected):
            return "the same structures in another order"
        changed = sum(a != b for a, b in zip(given, expected, strict=True))
        if same_id and 2 * changed <= len(given):
            return f"{changed} of {len(given)} structures were edited"
    shared = len(set(given) & set(expected))
    return f"another dataset, {shared} structures in common"
