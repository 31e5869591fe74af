"""subset, merge, convert, stats and verify: what they print, make, and refuse in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ase.data import chemical_symbols

from kdcache.store import Store, open_store
from tests.cli.commands import kdcache, refused, settings, usage


@pytest.fixture(scope="module")
def opened(features: Path) -> Store:
    return open_store(features)


def rows_file(path: Path, rows: range) -> Path:
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


@pytest.fixture
def halves(features: Path, tmp_path: Path) -> list[Path]:
    """The store in two: rows 0 to 13, and 14 to 23."""
    made = []
    for name, rows in (("first", range(14)), ("second", range(14, 24))):
        file = rows_file(tmp_path / f"{name}.txt", rows)
        path = tmp_path / f"{name}.zarr"
        said = kdcache("subset", features, "-o", path, "--rows", file)
        assert said.startswith(f"{len(rows)} of 24 structures: {len(rows)} rows\n")
        made.append(path)
    return made


def trained(store: Path, directory: Path) -> str:
    """What a short run over a store ends with."""
    return kdcache(
        "train-student", store, "-o", directory, "--preset", "painn-small", "--strategy", "n2n",
        *settings(),
    )  # fmt: skip


def test_a_subset_is_whole_and_trains(features: Path, tmp_path: Path, opened: Store) -> None:
    path = tmp_path / "subset.zarr"
    elements = ",".join(chemical_symbols[1:60])
    said = kdcache("subset", features, "-o", path, "--max-atoms", "4", "--sample", "12",
                   "--seed", "3", "--elements", elements)  # fmt: skip
    first, last = said.splitlines()[0], said.splitlines()[-1]
    assert first.startswith("12 of 24 structures: at most 4 atoms; only elements 1, 2, 3")
    assert first.endswith("a sample of 12 with seed 3")
    assert re.fullmatch(
        rf"{path}: 12 structures, \d+ atoms, [\d.]+ kB, digest \w{{12}}…; [\d.]+ s \(.*B/s\)", last
    )
    assert "the store is whole" in kdcache("verify", path)
    assert open_store(path).index.n_atoms.max() <= 4
    assert trained(path, tmp_path / "run")


def test_merged_halves_are_the_whole_and_train(
    halves: list[Path], data: Path, features: Path, opened: Store, tmp_path: Path
) -> None:
    path = tmp_path / "merged.zarr"
    said = kdcache("merge", *halves, "-o", path, "--seed", "5", "--block-atoms", "9")
    assert f"{path}: 24 structures" in said.splitlines()[-1]
    merged = open_store(path)
    assert set(merged.index.structure_id) == set(opened.index.structure_id)
    assert merged.manifest.capacities.atom <= 9
    assert "the store is whole" in kdcache("verify", path)
    assert trained(path, tmp_path / "run")
    # The data is the same, its order another: verify says so.
    assert "in another order" in _wrong("verify", path, "--data", data)


def test_teachers_of_one_dataset_are_united(features: Path, opened: Store, tmp_path: Path) -> None:
    other = tmp_path / "compact.zarr"
    kdcache("convert", features, "-o", other, "--codec", "node=compact", "--block-atoms", "16")
    path, name = tmp_path / "both.zarr", next(iter(opened.teachers))
    line = refused("merge", features, other, "-o", path, "--same-structures")
    assert f"--rename 2:{name}=NEW" in line
    kdcache("merge", features, other, "-o", path, "--same-structures", "--rename", f"{name}=small")
    both = open_store(path)
    assert list(both.teachers) == sorted([name, "small"])
    assert both.spec("teachers/small/node").codec == "compact"
    assert both.manifest.capacities == opened.manifest.capacities
    assert "the store is whole" in kdcache("verify", path)
    kdcache("merge", features, other, "-o", tmp_path / "again.zarr", "--same-structures",
            "--rename", f"2:{name}=small", "--fields", "node")  # fmt: skip
    assert list(open_store(tmp_path / "again.zarr").fields("teachers/small")) == ["node"]


def test_a_converted_store_trains(features: Path, tmp_path: Path) -> None:
    path = tmp_path / "exact.zarr"
    kdcache("convert", features, "-o", path, "--codec", "exact", "--shard-blocks", "3")
    assert open_store(path).spec(f"teachers/{_teacher(path)}/node").codec == "exact"
    assert trained(path, tmp_path / "run")


def test_statistics_are_a_table_a_report_and_a_picture(
    features: Path, opened: Store, tmp_path: Path
) -> None:
    report, picture = tmp_path / "stats.json", tmp_path / "stats.png"
    said = kdcache("stats", features, "--channels", "--json", report, "--plot", picture)
    lines = said.splitlines()
    assert lines[0].split()[:4] == ["quantity", "unit", "count", "NaN"]
    node = f"{_teacher(features)}/node"
    assert any(line.startswith(f"{node} ") for line in lines)
    assert any(line.startswith(f"{node} channel ") for line in lines)
    assert any(line.split()[:1] == ["H"] for line in lines)
    assert lines[-1].startswith(f"{features}: 24 structures, ")
    numbers = json.loads(report.read_text())
    assert numbers["root_digest"] == opened.manifest.root_digest
    assert len(numbers["quantities"][node]["channel_mean"]) == 8
    assert picture.read_bytes().startswith(b"\x89PNG")
    kdcache("stats", features, "--plot", tmp_path / "stats.pdf")
    assert (tmp_path / "stats.pdf").read_bytes().startswith(b"%PDF")
    assert ".png, .pdf or .svg" in kdcache("stats", "--help")
    for name in ("stats", "stats.xyz"):
        assert "are drawn as .png, .pdf, .svg" in refused("stats", features, "--plot", name)


def _teacher(path: Path) -> str:
    return next(iter(open_store(path).teachers))


def _wrong(*arguments: object) -> str:
    from click.testing import CliRunner

    from kdcache_cli.main import main

    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    return result.stderr


REFUSALS: list[tuple[tuple[str, ...], str]] = [
    (("subset", "S", "-o", "N", "--split", "vla"), "has no split 'vla'"),
    (("subset", "S", "-o", "N", "--max-atoms", "5", "--rows", "none"), "rows 0, at most 5 "),
    (("subset", "S", "-o", "N", "--rows", "words"), "'x' is no row number"),
    (("subset", "S", "-o", "N", "--ids", "words"), "has no structure 'x'"),
    (("subset", "S", "-o", "N", "--ids", "missing"), "No such file"),
    (("subset", "S", "-o", "N", "--elements", "H,Xx"), "'Xx' is none"),
    (("subset", "S", "-o", "N", "--teachers", "x"), "holds no teacher 'x'"),
    (("subset", "S", "-o", "N", "--fields", "nod"), "a field 'nod': did you mean node"),
    (("subset", "S", "-o", "S"), "exists, and nothing is overwritten"),
    (("subset", "missing", "-o", "N"), "missing does not exist"),
    (("merge", "S", "-o", "N"), "a merge takes at least two"),
    (("merge", "S", "S", "-o", "N"), "is named twice"),
    (("merge", "S", "C", "-o", "N"), "Keep the first of each (--skip-repeated)"),
    (("merge", "S", "C", "-o", "N", "--rename", "a=b"), "--rename belongs to a merge with"),
    (("merge", "S", "C", "-o", "N", "--same-structures", "--seed", "1"), "--seed belongs to"),
    (("merge", "S", "C", "-o", "N", "--same-structures", "--rename", "a"), "[N:]OLD=NEW"),
    (("merge", "S", "C", "-o", "N", "--same-structures", "--rename", "3:a=b"), "stores 1 to 2"),
    (("merge", "S", "C", "-o", "N", "--same-structures", "--rename", "x=b"), "has a teacher 'x'"),
    (("convert", "S", "-o", "N"), "is stored like this already"),
    (("convert", "S", "-o", "N", "--codec", "node=int8"), "'int8' is no codec"),
    (("convert", "S", "-o", "N", "--codec", "nod=half"), "no teacher's field 'nod'"),
    (("convert", "S", "-o", "N", "--block-atoms", "2"), "the largest structure has"),
    (("stats", "missing"), "missing does not exist"),
    (("verify", "S", "--cluster", "tcp://127.0.0.1:1", "--workers", "2"), "Say one of them"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), REFUSALS)
def test_what_cannot_be_done_is_refused_in_one_line(
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("none").write_text("\n")
    Path("words").write_text("x\n")
    Path("C").symlink_to(features)
    Path("S").symlink_to(features)
    if arguments[:3] == ("merge", "S", "C"):
        Path("C").unlink()
        kdcache("convert", features, "-o", "C", "--block-atoms", "20")
    assert said in refused(*arguments)
    assert not Path("N").exists()


def test_options_that_are_no_numbers_are_refused_by_their_names(features: Path) -> None:
    assert "'--sample'" in usage("subset", features, "-o", "n.zarr", "--sample", "0")
    assert "'--on-overflow'" in usage("convert", features, "-o", "n.zarr", "--on-overflow", "cut")


def test_processes_do_the_same_work(features: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows.txt", range(9))
    for name, workers in (("here", ()), ("there", ("--workers", "1"))):
        kdcache("subset", features, "-o", tmp_path / name, "--rows", rows, *workers)
    here, there = (open_store(tmp_path / name) for name in ("here", "there"))
    assert here.manifest.root_digest == there.manifest.root_digest
