"""Configurations: nothing misspelt passes, nothing is lost on the way to a file and back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from kdcache.config import (
    StudentConfig,
    WeightSchedule,
    change_config,
    dump_config,
    load_config,
    merge,
    override,
)
from kdcache.config import schedules as schedule_sections
from kdcache.config import settings as setting_sections
from kdcache.errors import ConfigError

TERM = {"name": "n2n", "student": "node", "teacher": "node"}


def write(folder: Path, text: str) -> Path:
    path = folder / "student.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_papers_where_it_gives_them() -> None:
    """Ekström Kelvinius et al. 2023, Table 6, COLL."""
    config = StudentConfig()
    weights = (config.loss.energy_weight.points[0][1], config.loss.forces_weight.points[0][1])
    assert weights == (1, 100)
    assert (config.optimizer.name, config.optimizer.amsgrad, config.optimizer.lr) == (
        "adamw",
        True,
        1e-3,
    )
    assert (config.ema, config.clip_norm, config.training.batch_size) == (0.999, 10, 32)
    assert config.schedule.name == "linear_warmup_exponential_decay"
    assert config.schedule.factor == 0.01


def test_resolved_configuration_reads_back_unchanged(tmp_path: Path) -> None:
    texts = [
        "terms=[{name: n2n, student: node, teacher: node, student_projection: linear}]",
        "terms.n2n.weight={kind: steps, points: [[0, 2], [0.5, 1e-3]]}",
        "schedule={name: multi_step, unit: step, milestones: [10, 20]}",
        "model=schnet",
        "model.hidden_channels=64",
        "references={mode: given, values: {H: -13.6}}",
        "ema=null",
    ]
    config = load_config(overrides=texts)
    path = write(tmp_path, dump_config(config))
    assert load_config(path) == config
    assert dump_config(load_config(path)) == dump_config(config)


def test_layers_lie_in_order_preset_file_overrides(tmp_path: Path) -> None:
    base = {"optimizer": {"lr": 1.0, "amsgrad": False}, "training": {"max_steps": 5}}
    path = write(tmp_path, "optimizer: {lr: 2}\nmodel: schnet\n")
    config = load_config(path, base=base, overrides=["training.max_steps=7"])
    assert (config.optimizer.lr, config.optimizer.amsgrad) == (2.0, False)
    assert (config.training.max_steps, config.model.name) == (7, "schnet")
    assert base["training"] == {"max_steps": 5}


def test_another_schedule_or_model_starts_afresh() -> None:
    base = {
        "schedule": {"name": "multi_step", "milestones": [0.5], "warmup": 0.1},
        "model": {"name": "painn", "num_rbf": 20},
        "optimizer": {"name": "adam", "lr": 3e-4},
    }
    config = load_config(
        base=base, overrides=["schedule.name=cosine", "model=schnet", "optimizer.name=adamw"]
    )
    assert config.schedule.model_dump() == {
        "name": "cosine",
        "unit": "fraction",
        "warmup": 0.0,
        "min_factor": 0.0,
    }
    assert config.model.hyperparameters == {}
    assert config.optimizer.lr == 3e-4
    kept = load_config(base=base, overrides=["schedule.name=multi_step", "model.num_rbf=30"])
    assert kept.schedule.warmup == 0.1
    assert kept.model.hyperparameters == {"num_rbf": 30}


def test_terms_are_changed_by_name_or_place() -> None:
    base = {"terms": [TERM, {**TERM, "name": "v2v"}]}
    config = load_config(base=base, overrides=["terms.v2v.weight=5", "terms.0.weight=2"])
    assert [term.weight.points for term in config.terms] == [((0.0, 2.0),), ((0.0, 5.0),)]
    assert change_config(config, ["terms.n2n.loss=mae"]).terms[0].loss == "mae"


def test_numbers_with_exponents_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer: {lr: 1e-3}\nmodel: {name: x, scale: 2E5, label: 1e}\n")
    config = load_config(path)
    assert config.optimizer.lr == 1e-3
    assert config.model.hyperparameters == {"scale": 2e5, "label": "1e"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training.max_stepps=3", r"unknown key training.max_stepps; did you mean max_steps\?"),
        ("trainin.max_steps=3", r"unknown key trainin; did you mean training\?"),
        (
            "terms=[{name: a, student: n, teacher: n, los: mse}]",
            "key terms.0.los; did you mean los",
        ),
        ("terms=[{name: a, student: n, teacher: n, weight: {knd: linear}}]", "terms.0.weight.knd;"),
        ("schedule.factr=1", "unknown key schedule.factr; did you mean factor"),
        ("schedule=cosin", "unknown schedule cosin; did you mean cosine"),
        ("schedule={name: cosine, milestones: [1]}", "unknown key schedule.milestones"),
        ("optimizer.lr=-1", "optimizer.lr: input should be greater than 0, got -1"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas.1: input should be less than 1, got 1"),
        ("optimizer.lr=.inf", "optimizer.lr: input should be a finite number"),
        ("loss.energy=mea", "loss.energy: input should be 'mae', .* got 'mea'"),
        ("training.max_steps=true", "training: max_steps must not be true"),
        ("training.compile=maybe", "training.compile: input should be a valid boolean"),
        ("scale=-2", "scale: input should be 'auto' or input should be greater than 0, got -2"),
        ("data.labels=0", "data.labels: input should be greater than 0"),
        ("data=3", "data: input should be a mapping"),
        ("terms=3", "terms: input should be a list"),
        ("terms=[{name: a}]", "terms.0.student: field required"),
        ("references.mode=given", "mode given without values or file"),
        ("references.values.H=-13.6", "mode least_squares with values or file"),
        ("terms=[{name: energy, student: n, teacher: n}]", "energy is taken"),
        ("terms.x.weight=1", "no item x there; known: none"),
        ("loss.energy_weight={kind: linear, points: []}", "at least one"),
        ("loss.energy_weight={kind: linear, points: [[0, 1], [2, 1]]}", "fractions .* got 2"),
        ("loss.energy_weight={kind: linear, points: [[0.5, 1], [0.5, 2]]}", "must rise"),
        ("loss.energy_weight={points: [[0, 1], [1, 2]]}", "constant weight has one point"),
        ("loss.energy_weight=-1", "greater than or equal to 0"),
        ("schedule.warmup=500", "fractions of max_steps, got 500; say unit: step"),
        ("schedule={name: multi_step, milestones: [0.5, 0.2]}", "milestones must rise"),
        ("training.max_steps", "expected key=value"),
        ("a..b=1", "expected key=value"),
        ("a=[1", "is not valid YAML"),
        ("loss={energy: mae, energy: mse}", "key energy is given twice"),
    ],
)
def test_a_mistake_is_one_line_with_its_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(overrides=[text])
    assert "\n" not in str(caught.value)


def test_two_terms_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="n2n is taken"):
        load_config(base={"terms": [TERM, TERM]})
    with pytest.raises(ConfigError, match="no item v2v there; known: n2n"):
        load_config(base={"terms": [TERM]}, overrides=["terms.v2v.weight=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "keys and values at its top"),
        ("a: [1\n", "not valid YAML"),
        ("loss: {energy: mse}\nloss: {energy: mae}\n", "key loss is given twice"),
        ("model: !!python/object/apply:os.system [true]\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize("text", ["[model]\nname = 1\n", "lr = 1\n", "a = 1\n[b]\n"])
def test_of_another_format_it_is_said_that_configurations_are_yaml(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.toml.* Configurations are YAML: write it so"):
        load_config(tmp_path / "c.toml")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert "Configurations are" not in str(caught.value)


def test_missing_and_binary_files_are_refused_and_empty_ones_are_the_defaults(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "model.pt").write_bytes(b"\x80\x04\xff")
    with pytest.raises(ConfigError, match="cannot be read: it is not UTF-8"):
        load_config(tmp_path / "model.pt")
    assert load_config(write(tmp_path, "")) == StudentConfig()


NESTED = st.recursive(
    st.integers() | st.none(),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
LAYER = st.dictionaries(st.sampled_from("abc"), NESTED, max_size=3)


@given(first=LAYER, second=LAYER)
def test_merging_keeps_all_of_the_upper_layer(
    first: dict[str, object], second: dict[str, object]
) -> None:
    def flat(layer: object, path: str = "") -> dict[str, object]:
        if not isinstance(layer, dict) or not layer:
            return {path: layer}
        return {k: v for key in layer for k, v in flat(layer[key], f"{path}.{key}").items()}

    assert merge(first, {}) == first
    assert merge(first, first) == first
    merged = merge(first, second)
    for key, value in flat(second).items():
        if key and value != {}:
            assert flat(merged)[key] == value
    for key, value in flat(first).items():
        if key and not any(part.startswith(key) or key.startswith(part) for part in flat(second)):
            assert flat(merged)[key] == value


@given(path=st.lists(st.sampled_from("abc"), min_size=1, max_size=4), value=st.integers())
def test_an_override_sets_what_it_names(path: list[str], value: int) -> None:
    changed: object = override({"a": {"b": 1}, "b": 7}, [f"{'.'.join(path)}={value}"])
    for part in path:
        assert isinstance(changed, dict)
        changed = changed[part]
    assert changed == value


def test_weight_schedule_reads_numbers_and_texts_of_numbers() -> None:
    for value in (3, 3.0, "3"):
        assert WeightSchedule.model_validate(value).points == ((0.0, 3.0),)
    with pytest.raises(ValueError, match="valid"):
        WeightSchedule.model_validate(True)


def test_every_setting_has_a_default_or_a_description() -> None:
    sections = [
        section
        for module in (setting_sections, schedule_sections)
        for section in vars(module).values()
        if isinstance(section, type) and issubclass(section, BaseModel)
    ]
    assert len(sections) > 15
    for section in sections:
        for name, field in section.model_fields.items():
            assert not field.is_required() or field.description, f"{section.__name__}.{name}"


def test_configuration_never_imports_torch() -> None:
    code = "import sys, kdcache.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
