"""No path, user or host name gets into a store, whatever made it.

The machine is given tell-tale names; then every byte of every file is searched, decompressed too.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numcodecs
import numpy as np
import pyarrow.parquet as pq

from kdcache.fields import POSITIONS
from kdcache.store import (
    DatasetEntry,
    create_store,
    index_from_plan,
    open_store,
    plan_blocks,
    verify_store,
)
from kdcache.store.failures import FAILURES
from kdcache.structures import dataset_digest
from tests.cli.commands import SMALL_BLOCKS, dataset, write_structures

FOLDER, USER, HOST = "telltalefolder", "telltaleuser", "telltalehost"
ROOT = Path(__file__).parents[2]

# One process for all commands: importing torch takes longer than any of them.
PROGRAM = f"""
import getpass, os, platform, socket, sys

socket.gethostname = socket.getfqdn = platform.node = lambda *_: {HOST!r}
uname = os.uname()
os.uname = lambda: os.uname_result((uname[0], {HOST!r}, *uname[2:]))
getpass.getuser = os.getlogin = lambda: {USER!r}
from kdcache_cli.main import main

for command in sys.stdin.read().splitlines():
    main(command.split("\\t"), standalone_mode=False)
"""

# A teacher whose errors name a place, as those of missing tables do: the whole path, a part of one.
FAILING = f"""
from kdcache.teachers.native import load_native


def make(*arguments, **options):
    teacher = load_native(*arguments, **options)
    compute = teacher.compute

    def failing(batch):
        if (batch.structure_index.bincount() == 1).any():
            raise ValueError("no table in {FOLDER}/tables/{USER}.bin or ~/{USER} or /home/{USER}/x")
        return compute(batch)

    teacher.compute = failing
    return teacher
"""


def told(words: tuple[str, ...]) -> Iterator[bytes]:
    for word in words:
        for spelling in (word, word.upper()):
            yield spelling.encode()
            yield spelling.encode("utf-16-le")


def contents(store: Path) -> Iterator[tuple[str, bytes]]:
    """Every file as it is; tables, strings and Blosc chunks as they read, too."""
    for file in sorted(path for path in store.rglob("*") if path.is_file()):
        name, content = file.relative_to(store).as_posix(), file.read_bytes()
        yield name, content
        yield f"the name of {name}", name.encode()
        if name.endswith(".parquet"):
            parquet = pq.ParquetFile(io.BytesIO(content))
            yield name, str(parquet.read().to_pylist()).encode()
            yield name, str(parquet.schema_arrow.metadata).encode() + str(parquet.metadata).encode()
    opened = open_store(store)
    n_shards, size = opened.plan.n_shards, opened.plan.blocks_per_shard
    for group in opened.plans:
        for field, spec in opened.fields(group).items():
            yield f"{group}/{field}", opened.read(f"{group}/{field}").tobytes()
            if spec.codec != "exact":
                continue
            for shard in range(n_shards):  # padding, which no reader shows
                folder = store / group / field / "c" / str(shard)
                data = next(f for f in (folder, *folder.rglob("*")) if f.is_file()).read_bytes()
                for k in range(size):
                    entry = data[len(data) - 16 * size - 4 + 16 * k :][:16]
                    start, length = (int.from_bytes(entry[i : i + 8], "little") for i in (0, 8))
                    if start < len(data):
                        chunk = numcodecs.Blosc().decode(data[start : start + length - 4])
                        yield f"{group}/{field}", bytes(chunk)


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    """In a table, and in an array that is compressed on the disk."""
    # Eight float64 that spell the word, and zeros that compress.
    spelt = np.frombuffer(USER.encode().ljust(24, b"\0") * 100, "<f8").reshape(-1, 3)
    structure = replace(
        dataset(1)[0],
        structure_id=f"a {FOLDER}",
        atomic_numbers=np.ones(len(spelt), np.int64),
        positions=spelt.copy(),
        energy=None,
        forces=None,
    )
    whole = plan_blocks([structure.n_atoms])
    hashes = [structure.content_hash()]
    index = index_from_plan(
        whole, structure_id=[structure.structure_id], content_hash=hashes, source_index=[0]
    )
    entry = DatasetEntry(digest=dataset_digest(hashes), n_structures=1, n_labelled=0)
    with create_store(
        tmp_path / "s.zarr", index=index, plan=whole, fields=[POSITIONS], dataset=entry
    ) as writer:
        writer.write_shard(0, {"positions": structure.positions})
        writer.commit()
    found = {
        name
        for name, content in contents(tmp_path / "s.zarr")
        for word in told((FOLDER, USER))
        if word in content
    }
    assert found == {"index.parquet", "structures/positions"}


def test_no_path_user_or_host_name_gets_into_a_store(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    folder = tmp_path / FOLDER / f"home-{USER}"
    folder.mkdir(parents=True)
    shutil.copy(data, folder / "frames.extxyz")
    shutil.copytree(teacher, folder / "run")
    write_structures(folder / "others.extxyz", dataset(30)[24:])
    (folder / "failing.py").write_text(FAILING)
    dump = ("--teacher", folder / "run", "--tap", "node/msg=message_layers.0", "--env-report")
    labelled = folder / "run" / "labelled.zarr"
    skip = ("--teacher-format", "failing:make", "--on-error", "skip", "--name", "failing")
    commands = [
        ("import", folder / "frames.extxyz", "-o", "imported.zarr", "--cutoff", "3"),
        ("dump-teacher", folder / "frames.extxyz", *dump, "-o", "dumped.zarr", *SMALL_BLOCKS),
        ("dump-teacher", "--into", folder / "imported.zarr", *dump, "--name", "second"),
        ("subset", folder / "dumped.zarr", "-o", "subset.zarr", "--sample", "9"),
        ("merge", "dumped.zarr", folder / "imported.zarr", "-o", "merged.zarr",
         "--same-structures"),
        # Their lists differ, which the merged store says without saying where they lay.
        ("import", folder / "frames.extxyz", "-o", folder / "wide.zarr", "--cutoff", "3"),
        ("import", folder / "others.extxyz", "-o", folder / "narrow.zarr", "--cutoff", "2"),
        ("merge", folder / "wide.zarr", folder / "narrow.zarr", "-o", "both.zarr"),
        ("convert", folder / "dumped.zarr", "-o", "converted.zarr", "--codec", "compact"),
        ("annotate", "subset.zarr", "--creator", "A. Lab", "--licence-labels", "ask us"),
        ("dump-teacher", folder / "frames.extxyz", *dump, *skip, "-o", "failed.zarr"),
        ("publish", folder / "dumped.zarr", folder / "part.zarr", "--fields", "node,energy"),
        ("publish", "failed.zarr", folder / "few.zarr", "--where", "n_atoms < 4"),
        ("publish", folder / "dumped.zarr", "held.zarr", "--without-structures"),
        ("pull", folder / "failed.zarr", "-o", folder / "sample.zarr", "--sample", "7"),
        ("pull", "dumped.zarr", "-o", "drawn.zarr", "--sample", "7", "--seed", "3"),
        ("pack", folder / "dumped.zarr", "-o", folder / "packed.zip"),
        ("pull", folder / "packed.zip", "-o", "unpacked.zarr"),
        ("augment", folder / "dumped.zarr", "--teacher", folder / "run", "-o", "rattled.zarr"),
        ("export", "dumped.zarr", "-o", labelled, "--to", "nvalchemi", "--teacher", "teacher"),
        ("import-nvalchemi", labelled, "-o", "labelled.zarr", "--name", "run"),
        ("keygen", folder / "lab.pem"),
        ("sign", "dumped.zarr", "--key", folder / "lab.pem"),
        ("withhold", folder / "dumped.zarr", "-o", "shared.zarr"),
        ("join", "shared.zarr", folder / "frames.extxyz", "-o", "joined.zarr"),
        ("join", "shared.zarr", folder / "frames.extxyz", "-o", "own.zarr", "--own-labels"),
    ]  # fmt: skip
    names = {"USER": USER, "LOGNAME": USER, "USERNAME": USER, "HOSTNAME": HOST, "HOST": HOST}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="\n".join("\t".join(str(word) for word in command) for command in commands),
        env=os.environ | names | {"HOME": str(folder), "PWD": str(folder), "PYTHONPATH": path()},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    stores = sorted(folder.glob("*.zarr"))
    assert len(stores) == 20
    for name in ("failed", "few", "sample"):
        assert (folder / f"{name}.zarr" / "teachers" / "failing" / FAILURES).is_file()
    # tmp_path itself is a path of this machine, and says who runs the tests.
    words = (FOLDER, USER, HOST, str(tmp_path))
    for store in stores:
        assert verify_store(store).problems == []
        sources = open_store(store).manifest.dataset.sources
        assert sources
        assert set(sources) <= {"frames.extxyz", "others.extxyz", "labelled.zarr", "dumped.zarr"}
        for name, content in contents(store):
            for word in told(words):
                assert word not in content, f"{word!r} in {store.name}: {name}"


def path() -> str:
    return os.pathsep.join([str(ROOT), str(ROOT / "cli")])
