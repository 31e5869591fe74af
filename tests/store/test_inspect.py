"""inspect tells what is there, licences apart, without reading features."""

from __future__ import annotations

import json
from pathlib import Path

from kdcache.store import add_teacher, describe_store, format_description, open_store, read_manifest
from kdcache.store.signature import SIGNATURE
from kdcache.store.withholding import write_without_structures
from tests.store.sample import STRUCTURES, TEACHER, Sample, files_of, teacher_entry, write_all


def test_counts_sizes_and_fields_are_those_of_the_store(finished: Path, sample: Sample) -> None:
    description = json.loads(json.dumps(describe_store(finished)))
    assert description["n_structures"] == len(sample.dataset)
    assert description["n_labelled"] == 16
    assert description["n_atoms"] == sum(s.n_atoms for s in sample.dataset)
    assert (description["smallest"], description["largest"]) == (1, 12)
    assert description["splits"] == {"train": 15, "val": 5}
    assert set(description["structures"]) == {spec.name for spec in STRUCTURES}
    fields = description["teachers"]["painn"]["fields"]
    assert set(fields) == {spec.name for spec in TEACHER}
    assert fields["node"]["relative"] > 0
    shards = {k: len(v) for k, v in files_of(finished).items() if "/c/" in k}
    assert description["n_bytes"] == sum(shards.values())
    vector = sum(n for k, n in shards.items() if k.startswith("teachers/painn/vector"))
    assert fields["vector"]["n_bytes"] == vector


def test_errors_of_a_field_that_is_not_there_are_passed_over(copied: Path) -> None:
    """Whoever seals a manifest may write any name."""
    manifest = read_manifest(copied)
    entry = manifest.teachers["painn"]
    odd = entry.model_copy(update={"errors": {**entry.errors, "other": entry.errors["node"]}})
    sealed = manifest.model_copy(update={"teachers": {"painn": odd}}).sealed()
    (copied / "manifest.json").write_bytes(sealed.to_bytes())
    fields = describe_store(copied)["teachers"]["painn"]["fields"]  # type: ignore[index, call-overload]
    assert set(fields) == {spec.name for spec in TEACHER}  # type: ignore[arg-type]


def test_people_see_licences_of_all_three_apart(finished: Path) -> None:
    text = format_description(describe_store(finished))
    assert "structures: unknown; labels: unknown" in text
    assert "licence: CC-BY-4.0" in text
    assert "cutoff 4.5 Å, at most 20 neighbours" in text


def test_what_is_left_out_and_who_signed_is_shown(copied: Path, tmp_path: Path) -> None:
    whole = open_store(copied)
    signed = {
        "algorithm": "Ed25519",
        "key_fingerprint": "ab" * 32,
        "root_digest": whole.manifest.root_digest,
        "signature": "A" * 86 + "==",
    }
    (copied / SIGNATURE).write_text(json.dumps(signed))
    write_without_structures(whole, tmp_path / "part.zarr")
    description = describe_store(tmp_path / "part.zarr")
    assert description["withheld"] == [
        "atomic_numbers", "cell", "energy", "forces", "pbc", "positions",
    ]  # fmt: skip
    assert description["whole_root_digest"] == whole.manifest.root_digest
    text = format_description(description)
    assert "structures (left out: atomic_numbers, cell, energy, forces, pbc, positions)" in text
    assert "signature   by key abababababababab… of the whole store, not checked here" in text
    assert "by key abababababababab…, not" in format_description(describe_store(copied))
    (copied / SIGNATURE).write_text("{")
    assert "is no signature" in format_description(describe_store(copied))


def test_a_teacher_being_added_is_shown(copied: Path, sample: Sample) -> None:
    write_all(add_teacher(copied, "second", teacher_entry(), TEACHER), sample, [0, 1])
    assert describe_store(copied)["unfinished"] == {"teachers/second": 2}
    assert "unfinished: teachers/second, 2 of" in format_description(describe_store(copied))
