"""`kdcache augment` and `train-student --with`: an overlay made, and mixed in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from kdcache.store import open_store
from tests.cli.commands import kdcache, refused, settings, usage


def test_an_overlay_follows_the_store_it_is_made_from(
    features: Path, teacher: Path, tmp_path: Path
) -> None:
    store, overlay = tmp_path / "own.zarr", tmp_path / "rattled.zarr"
    kdcache("dump-teacher", features, "--teacher", teacher, "-o", store, "--name", "big",
            "--fields", "node,energy,forces", "--licence-structures", "CC-BY-4.0")  # fmt: skip
    said = kdcache("augment", store, "--teacher", teacher, "-o", overlay, "--norm", 0.05)
    assert said.splitlines()[-1] == f"{overlay}: 24 structures of origin rattled"
    found = open_store(overlay)
    assert list(found.teachers["big"].fields) == ["energy", "forces", "node"]
    assert found.manifest.dataset.licences.structures == "CC-BY-4.0"
    assert set(found.index.origin) == {"rattled"}
    parents = {s.structure_id: s.positions for s in open_store(store).structures()}
    for child in found.structures():
        moved = child.positions - parents[child.structure_id.rpartition("~")[0]]
        assert np.linalg.norm(moved, axis=1) == pytest.approx(np.full(len(moved), 0.05))
    run = tmp_path / "run"
    kdcache("train-student", store, "-o", run, "--strategy", "n2n", "--with", overlay,
            *settings("data.overlays.0.share=0.25", "data.overlays.0.ratio=2"))  # fmt: skip
    kept = yaml.safe_load((run / "config.yaml").read_text())["data"]["overlays"]
    assert kept == [{"store": str(overlay), "share": 0.25, "ratio": 2.0, "labels": "teacher",
                     "teacher_name": None}]  # fmt: skip


def test_every_method_makes_a_store(data: Path, teacher: Path, tmp_path: Path) -> None:
    methods = {
        "random": ("--copies", 2),
        "ascent": ("--student", teacher, "--norm-of", "structure"),
        "md": ("--keep", 0.5, "--max-steps", 4, "--share", 0.5),
    }
    for method, more in methods.items():
        overlay = tmp_path / f"{method}.zarr"
        command = ("augment", data, "--teacher", teacher, "-o", overlay, "--method", method, *more)
        if method == "ascent":
            # A student that is its own teacher leaves nothing to climb.
            assert "Nothing was made" in refused(*command)
            continue
        kdcache(*command)
        assert "the store is whole" in kdcache("verify", overlay)


REFUSED: list[tuple[tuple[object, ...], str]] = [
    (("--method", "random", "--keep", "0.5"), "--keep belongs to --method relax or md"),
    (("--method", "relax", "--norm", "0.5"), "--norm belongs to --method random or ascent"),
    (("--method", "ascent"), "--student and --method ascent belong together"),
    (("--student", "none"), "--student and --method ascent belong together"),
    (("--fields", "nodes"), "did you mean node?"),
    (("--name", "a/b"), "a/b"),
    (("--device", "gpu"), "--device gpu is no device"),
    (("--share", "1e-9"), "Nothing was made"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_a_refused_overlay_leaves_nothing(
    options: tuple[object, ...], said: str, data: Path, teacher: Path, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.zarr"
    assert said in refused("augment", data, "--teacher", teacher, "-o", overlay, *options)
    assert not overlay.exists()


def test_numbers_out_of_range_are_refused(data: Path, teacher: Path, tmp_path: Path) -> None:
    command = ("augment", data, "--teacher", teacher, "-o", tmp_path / "overlay.zarr")
    assert "--norm" in usage(*command, "--norm", 0)
    assert "--share" in usage(*command, "--share", 2)
    assert "is a run" in refused("augment", teacher, "--teacher", teacher, "-o", tmp_path / "o")


def test_an_existing_store_is_not_overwritten(
    features: Path, data: Path, teacher: Path, tmp_path: Path
) -> None:
    before = (features / "manifest.json").read_bytes()
    line = refused("augment", data, "--teacher", teacher, "-o", features)
    assert "Nothing is overwritten" in line
    assert (features / "manifest.json").read_bytes() == before


def test_an_overlay_that_is_none_is_refused(features: Path, tmp_path: Path) -> None:
    command = ("train-student", features, "-o", tmp_path / "run", *settings(), "--with")
    assert "does not exist" in refused(*command, tmp_path / "none.zarr")
    assert not (tmp_path / "run").exists()
