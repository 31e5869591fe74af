"""A few thousand damaged files of every kind: each is read, or refused in one line, and no more.

The long run is benchmarks/fuzz.py. Inputs are the same in every run.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kdcache.config import load_config
from kdcache.errors import ConfigError, KdcacheError
from kdcache.store.parquet_pages import check_parquet
from tests.hostile import seeds, thrift
from tests.hostile.kinds import Kind
from tests.hostile.watch import feed_many

pytestmark = pytest.mark.hostile

SEED = 7
KINDS = (
    "manifest.json", "index.parquet", "failures.parquet", "zarr.json of an array",
    "zarr.json of the store", "shard, raw", "shard, Blosc", "shard, verified", "model.json",
    "model.safetensors", "state.json", "state, safetensors", "teacher.pt",
    "teacher.pt, --allow-pickle", "configuration, YAML", "extended XYZ", "npz", "HDF5", "Parquet",
    "LMDB without --allow-pickle", "Open Catalyst record",
)  # fmt: skip


def test_every_kind_is_among_the_tests(kinds: dict[str, Kind]) -> None:
    assert set(kinds) == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_read_or_refused_in_one_line(
    name: str, warm: Callable[[str], Kind], tmp_path: Path
) -> None:
    kind = warm(name)
    n = 48 * kind.weight
    found = feed_many(lambda number: kind.make(SEED, number), kind, range(n), tmp_path)
    assert found.defects == []
    assert found.tried == n
    # The damage must reach the reader, and not all of it at the first byte.
    assert kind.refused or name in ("zarr.json of the store", "shard, verified") or found.refused
    assert kind.refused or found.accepted


def refusal(action: Callable[[], object]) -> str:
    """What an action is refused with, "" where it is not."""
    try:
        action()
    except (ConfigError, ValueError) as error:
        return str(error)
    return ""


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)
SECTIONS = st.sampled_from(
    ["model", "loss", "terms", "schedule", "training", "data", "ema", "scale", "references"]
)


@settings(max_examples=120, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(SECTIONS | st.text(max_size=6), PLAIN, max_size=3))
@example({"terms": [{"name": "\n"}]})
@example({"model": {"name": "\x1b[2J"}, "training": {"max_steps": "\x1b[2J"}})
def test_any_plain_values_are_a_configuration_or_refused_in_one_line(
    values: dict[str, object],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        line = refusal(lambda: load_config(path))
        assert line.isprintable()
        assert len(line) < 2000


@settings(max_examples=120, derandomize=True)
@given(st.text(max_size=200))
def test_any_text_is_a_configuration_or_refused_in_one_line(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        assert refusal(lambda: load_config(path)).isprintable()


@settings(max_examples=120, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(seeds.parquet()), st.data())
def test_any_bytes_in_a_footer_are_walked_or_refused(whole: bytes, draw: st.DataObject) -> None:
    start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    at = draw.draw(st.integers(start, len(whole) - 1))
    piece = draw.draw(st.binary(min_size=1, max_size=12))
    changed = io.BytesIO(whole[:at] + piece + whole[at + len(piece) :])
    assert len(refusal(lambda: check_parquet(changed))) < 2000


@settings(max_examples=40, derandomize=True, suppress_health_check=list(HealthCheck))
@given(PLAIN)
def test_any_json_as_a_document_of_a_store_is_refused_in_one_line(
    kinds: dict[str, Kind], value: object
) -> None:
    kind = kinds["zarr.json of an array"]
    with tempfile.TemporaryDirectory() as folder:
        kind.put(Path(folder), json.dumps(value).encode())
        with pytest.raises(KdcacheError) as raised:
            kind.read(Path(folder))
        assert str(raised.value).isprintable()


def test_a_footer_is_written_as_it_was_read() -> None:
    """Else the mutator would damage what it means to leave alone."""
    for whole in seeds.parquet():
        start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        footer, end = thrift.read(whole, start)
        assert thrift.write(footer) == whole[start:end]
