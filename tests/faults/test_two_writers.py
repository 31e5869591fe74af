"""Two dumps into one store at once, and a dump beside a training: nothing is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from torch import Tensor

from kdcache.dump import DumpOptions, DumpReport, Part, dump_teacher
from kdcache.errors import IdentityError, StoreError
from kdcache.progress import Advance
from kdcache.store import Store, open_store, verify_store
from kdcache.structures import Batch
from kdcache.train import train_student
from tests.chain import dump, loss_curve, make_store, make_teacher, student
from tests.cli.commands import refused
from tests.dump.failing import Behaviour, Failing
from tests.faults.dumping import OPTIONS, behave, command, problems, write_undumped

pytestmark = pytest.mark.fault


@dataclass
class Meanwhile(Failing):
    """A teacher during whose second batch something else happens."""

    happens: Callable[[], None] = lambda: None

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        said = super().compute(batch)
        if len(self.batches) == 2:
            self.happens()
        return said


@pytest.mark.parametrize("more", [("--name", "other"), (), ("--part", "0/2")])
def test_of_two_dumps_the_second_is_refused_in_one_line(
    more: tuple[str, ...], tmp_path: Path
) -> None:
    store, digest = write_undumped(tmp_path)
    second = command(store.path, behave(tmp_path), *more)
    said: list[str] = []
    first = Meanwhile(Behaviour(), happens=lambda: said.append(refused(*second)))
    report = dump_teacher(store.path, first, OPTIONS)
    assert "Another process is writing to" in said[0]
    assert "wait until it ends" in said[0]
    assert report.computed == len(store)
    assert problems(store.path, digest) == []
    assert list(open_store(store.path).teachers) == ["teacher"]


def test_a_whole_dump_beside_a_part_is_refused_in_one_line(tmp_path: Path) -> None:
    store, digest = write_undumped(tmp_path)
    second = command(store.path, behave(tmp_path))
    said: list[str] = []
    first = Meanwhile(Behaviour(), happens=lambda: said.append(refused(*second)))
    dump_teacher(store.path, first, OPTIONS, part=Part(0, 2))
    assert "Another process is writing to" in said[0]
    assert problems(store.path, digest) == []


def test_a_part_of_another_dump_of_the_same_name_is_refused(tmp_path: Path) -> None:
    store, digest = write_undumped(tmp_path)
    others: list[tuple[Failing, DumpOptions]] = [
        (Failing(Behaviour(), digest="0" * 64), OPTIONS),
        (Failing(Behaviour()), replace(OPTIONS, codec="exact")),
    ]

    def happens() -> None:
        for teacher, options in others:
            with pytest.raises((IdentityError, StoreError), match="unfinished teachers/teacher"):
                dump_teacher(store.path, teacher, options, part=Part(1, 2))

    first = Meanwhile(Behaviour(), happens=happens)
    dump_teacher(store.path, first, OPTIONS, part=Part(0, 2))
    assert len(first.batches) > 2
    assert problems(store.path, digest) == []


def test_parts_of_two_teachers_share_a_store_in_peace(tmp_path: Path) -> None:
    store, _ = write_undumped(tmp_path)

    def one(name: str, k: int) -> None:
        options = replace(OPTIONS, name=name)
        dump_teacher(store.path, Failing(Behaviour()), options, part=Part(k, 2))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, ["a", "b", "a", "b"], [0, 0, 1, 1]))
    found = open_store(store.path)
    assert sorted(found.teachers) == ["a", "b"]
    assert (found.read("teachers/a/node") == found.read("teachers/b/node")).all()
    assert not (store.path / ".work").exists()
    assert verify_store(store.path).problems == []


def test_a_training_goes_on_undisturbed_while_a_teacher_is_added(tmp_path: Path) -> None:
    def dumped(name: str) -> Store:
        folder = tmp_path / name
        folder.mkdir()
        made = make_store(folder)
        dump(made, make_teacher(folder))
        return open_store(made.path)

    store, peaceful = dumped("disturbed"), dumped("peaceful")
    assert store.manifest.root_digest == peaceful.manifest.root_digest
    config = student(strategy="n2n")
    train_student(peaceful.path, tmp_path / "undisturbed", config)
    steps = 0

    @contextmanager
    def progress(label: str, total: int | None, unit: str) -> Iterator[Advance]:
        """The first steps are taken before a dump, the next beside it, the last behind it."""
        with ThreadPoolExecutor(1) as pool:
            dumps: list[Future[DumpReport]] = []

            def advance(n: int = 1, /, note: str = "") -> None:
                nonlocal steps
                steps += n if unit == "steps" else 0
                if steps == 2 and not dumps:
                    options = DumpOptions("second", fields=("node", "energy"), threads=1)
                    second = Failing(Behaviour())
                    dumps.append(pool.submit(dump_teacher, store.path, second, options))
                elif steps == 9:
                    dumps[0].result()

            yield advance

    train_student(store.path, tmp_path / "run", config, progress=progress)
    assert steps == 12
    assert sorted(open_store(store.path).teachers) == ["second", "teacher"]
    assert verify_store(store.path).problems == []
    for column in ("train_loss", "val_energy_mae_mev"):
        expected = loss_curve(tmp_path / "undisturbed", column)
        assert loss_curve(tmp_path / "run", column) == expected
