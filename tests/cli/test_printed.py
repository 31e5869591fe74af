"""No text of a stranger's store moves the terminal of whoever looks at it, or begins a line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from kdcache.dump import DumpReport
from kdcache.store import Store, open_store
from kdcache.store.failures import one_line
from kdcache.store.index import INDEX, read_index
from kdcache.store.manifest import MANIFEST
from kdcache_cli.dumped import report_dump
from kdcache_cli.main import main
from kdcache_cli.tables import table
from tests.audit.damage import damaged
from tests.cli.commands import kdcache
from tests.store.test_verify import reseal

# Sets the title of a terminal, turns a line red, goes to its first column, and forges a line.
STRANGE = "\x1b]0;x\x07\x9b31m\rforged\nforged\u202e"
# And what is no formula, where units are drawn.
UNIT = f"{STRANGE}$\\frac{{1}}{{$"
NAMES = np.array([f"{STRANGE}{k}" for k in range(24)], object)


@pytest.fixture(scope="module")
def strange(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a teacher, in which every text that may be strange is."""
    path = tmp_path_factory.mktemp("strange") / "strange.zarr"
    shutil.copytree(features, path)
    index = read_index(path, 24)
    changed = replace(
        index, structure_id=NAMES, group=np.array([STRANGE, f"{STRANGE}2"] * 12, object)
    )
    (path / INDEX).write_bytes(changed.to_bytes())
    document = json.loads((path / MANIFEST).read_text())
    dataset, teacher = document["dataset"], document["teachers"]["teacher"]
    dataset |= {"sources": [STRANGE], "notes": [STRANGE], "creator": STRANGE, "citation": STRANGE}
    dataset |= {"keys": {STRANGE: STRANGE}, "units": {STRANGE: STRANGE}}
    dataset["licences"] = {"structures": STRANGE, "labels": STRANGE}
    teacher |= {"model": STRANGE, "precision": STRANGE, "licence": STRANGE}
    teacher["software"] = {STRANGE: STRANGE}
    teacher["fields"]["node"]["unit"] = UNIT
    (path / MANIFEST).write_text(json.dumps(document))
    node = path / "teachers" / "teacher" / "node" / "zarr.json"
    attributes = json.loads(node.read_text())
    attributes["attributes"]["unit"] = UNIT
    node.write_text(json.dumps(attributes))
    reseal_root(path)
    return path


def reseal_root(path: Path) -> None:
    """The root's copy of every node, then all digests, as an author who edits a store would."""
    root = json.loads((path / "zarr.json").read_text())
    kept = root["consolidated_metadata"]["metadata"]
    for name in kept:
        kept[name] = json.loads((path / name / "zarr.json").read_text())
    (path / "zarr.json").write_text(json.dumps(root))
    reseal(path)


def printed(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], color=True)
    assert result.exit_code == code, result.stderr or repr(result.exception)
    # Red is ours to use.
    shown = result.output.replace("\x1b[31m", "").replace("\x1b[0m", "")
    for line in shown.split("\n"):
        assert line.isprintable(), repr(line)
        assert not line.startswith("forged"), repr(line)
    return shown


def test_a_store_is_inspected(strange: Path) -> None:
    shown = printed("inspect", strange)
    assert shown.count("?]0;x??31m forged forged?") >= 8
    assert json.loads(printed("inspect", strange, "--json"))["dataset"]["creator"] == STRANGE


def test_its_values_are_shown_and_drawn(strange: Path, tmp_path: Path) -> None:
    assert "?]0;x" in printed("stats", strange, "--plot", tmp_path / "a.png")


def test_errors_are_by_group(strange: Path, teacher: Path) -> None:
    shown = printed("evaluate", teacher, strange)
    assert sum(line.startswith("?]0;x??31m forged forged?") for line in shown.splitlines()) == 2


def test_the_worst_structure_is_named(strange: Path, teacher: Path, tmp_path: Path) -> None:
    shown = printed("audit", strange, "--teacher", teacher, code=2)
    assert "invariant in ?]0;x" in shown
    wrong = damaged(open_store(strange), tmp_path / "c.zarr", "teachers/teacher/node", lambda v: -v)
    assert "wrong: node" in printed("audit", wrong.path, "--teacher", teacher, code=2)


def test_layers_are_compared(strange: Path, teacher: Path, tmp_path: Path) -> None:
    printed("compare", strange, teacher, "-o", tmp_path / "c")


def test_it_is_verified(strange: Path, tmp_path: Path) -> None:
    printed("verify", strange)
    copied = Path(shutil.copytree(strange, tmp_path / "c.zarr"))
    index = read_index(copied, 24)
    (copied / INDEX).write_bytes(replace(index, structure_id=NAMES[::-1]).to_bytes())
    assert "wrong: " in printed("verify", copied, code=2)


def test_it_is_read_again_and_written_anew(strange: Path, tmp_path: Path) -> None:
    printed("import", strange, "-o", tmp_path / "a.zarr")
    printed("convert", strange, "-o", tmp_path / "b.zarr", "--codec", "node=compact")
    printed("subset", strange, "-o", tmp_path / "c.zarr", "--sample", 5)
    printed("export", strange, "-o", tmp_path / "d.extxyz", "--teacher", "teacher")
    printed("card", strange, "-o", tmp_path / "e.html", "--croissant", strange.parent / "m.json")


def test_what_a_system_says_of_a_file_is_one_line(strange: Path, tmp_path: Path) -> None:
    rows = tmp_path / "none\x1b]0;x\x07\nforged"
    shown = printed("subset", strange, "-o", tmp_path / "a.zarr", "--rows", rows, code=2)
    assert shown.endswith("none?]0;x? forged: No such file or directory.\n")
    assert shown.count("\n") == 1


def test_what_a_teacher_failed_on_is_named(
    taught_store: Store,
) -> None:
    entry = taught_store.teachers["teacher"]
    failed = {STRANGE: f"{STRANGE}: too hot"}
    shown = report_dump(DumpReport(40, 160, 0, 1.0, 40, failed, 0, entry))
    assert all(line.isprintable() for line in shown.split("\n"))
    assert "  ?]0;x??31m forged forged?: ?]0;x??31m forged forged?: too hot" in shown


def test_what_was_read_from_a_file_is_said(data: Path, tmp_path: Path) -> None:
    source = tmp_path / "a\x1b]0;x\x07\nb.extxyz"
    source.write_bytes(data.read_bytes())
    assert "a?]0;x? b.extxyz" in printed("import", source, "-o", tmp_path / "a.zarr")


def test_what_another_programs_file_holds_is_named(features: Path, tmp_path: Path) -> None:
    labelled = tmp_path / "labelled.zarr"
    kdcache("export", features, "-o", labelled, "--to", "nvalchemi", "--teacher", "teacher")
    root = zarr.open_group(labelled)
    name = "teacher_\x1b]0;x\x07\nforged"
    root["core"].create_array(name, data=np.zeros((24, 1)))  # type: ignore[union-attr]
    fields: Any = root.attrs["fields"]
    root.attrs["fields"] = {**fields, "core": {**fields["core"], name: "system"}}
    shown = printed("import-nvalchemi", labelled, "-o", tmp_path / "a.zarr")
    assert "left out: teacher_?]0;x? forged" in shown


def test_reasons_are_kept_without_what_moves_a_terminal() -> None:
    assert one_line("out of \x1b[31mmemory\x07").isprintable()


def test_cells_of_a_table_stay_in_their_line() -> None:
    header, _, row = table(["a\tb", "c"], [[STRANGE, "1"]]).split("\n")
    assert header.isprintable()
    assert row == "?]0;x??31m forged forged?  1"
