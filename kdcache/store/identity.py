"""Whether a store and a dataset belong together, and which structure is which.

Content hashes decide; ids only help to say it, and to tell equal structures apart. Invariant: a
dataset passes the check exactly when it holds the store's structures in the same order, and no
structure is matched with a row of another content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
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


class ContentMatch:
    """Finds the rows of a store that the structures of a dataset belong to, in whatever order they
    come.

    Structures with equal contents take their rows by id where an id fits, else in dataset order.

    Args:
        index: of the store.

    Attributes:
        n_superfluous: structures no row was left for.
        first_superfluous: id of the first of them.
    """

    def __init__(self, index: StoreIndex) -> None:
        self.n_superfluous = 0
        self.first_superfluous = ""
        self._index = index
        self._waiting: dict[bytes, list[int]] = {}
        self._taken: dict[bytes, int] = {}
        self._edited: set[str] = set()
        for row in index.source_order.tolist():
            self._waiting.setdefault(index.content_hash[row].tobytes(), []).append(row)

    def row(self, content_hash: bytes, structure_id: str) -> int | None:
        """The row of one more structure of the dataset; None where it is superfluous."""
        rows = self._waiting.get(content_hash)
        if not rows:
            self.n_superfluous += 1
            self.first_superfluous = self.first_superfluous or structure_id
            if content_hash not in self._taken:
                self._edited.add(structure_id)
            return None
        ids = self._index.structure_id
        row = next((row for row in rows if ids[row] == structure_id), rows[0])
        rows.remove(row)
        self._taken.setdefault(content_hash, row)
        return row

    def repeats(self) -> Iterator[tuple[int, int]]:
        """Rows that got no structure of their own, each with a row of the same content that did.

        One copy of a structure stands for all, as its contents are the same to the last bit.
        """
        for content_hash, rows in self._waiting.items():
            if content_hash in self._taken:
                yield from ((row, self._taken[content_hash]) for row in rows)

    def check(self, path: Path | StoreUrl, n_given: int) -> None:
        """Every row has a structure.

        Args:
            path: of the store, for the message.
            n_given: structures of the dataset.

        Raises:
            IdentityError: how many have none, the first of them, and how many of those the dataset
                holds under the same id with other contents.
        """
        ids = self._index.structure_id
        missing = [
            row
            for row in self._index.source_order.tolist()
            if self._index.content_hash[row].tobytes() not in self._taken
        ]
        if not missing:
            return
        edited = [row for row in missing if ids[row] in self._edited]
        said = f"{len(missing)} of {len(ids)} structures are not in it, the first is "
        said += repr(str(ids[missing[0]]))
        if edited:
            said += (
                f"; {len(edited)} of these are there under the same id with other contents, the "
                f"first is {str(ids[edited[0]])!r}"
            )
        if self.n_superfluous:
            said += (
                f"; {self.n_superfluous} structures of it are not in the store, the first is "
                f"{self.first_superfluous!r}"
            )
        raise IdentityError(
            f"{path} cannot be joined with this data of {n_given} structures: {said}. Features "
            f"would have no atoms. Give all the data that the store was made from, in the same "
            f"numbers (keys, units, --tags-key)."
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
