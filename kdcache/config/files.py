"""Read configurations from YAML, lay them over each other, change single keys, write them back.

Owns the wording of configuration errors: the full dotted key, what was wrong, the nearest known
key. Never imports torch. Invariant: what `dump_config` writes, `load_config` reads back unchanged.
"""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from kdcache.config.settings import StudentConfig
from kdcache.errors import ConfigError, did_you_mean, printable, reason_of

Layer = Mapping[str, object]
ConfigType = TypeVar("ConfigType", bound=BaseModel)

# A configuration has some hundred values, a few levels deep. What is above is an attack or no
# configuration, and would fill the memory when it is copied, checked or shown.
MAX_CHARACTERS = 2**17
MAX_VALUES = 100_000
MAX_DEPTH = 50
# What YAML is called; JSON is YAML, too.
SUFFIXES = (".yaml", ".yml", ".json")

# Sections whose other keys belong to one name: another name makes them start afresh.
_NAMED_SECTIONS = ("model", "schedule")


def load_config(
    path: str | Path | None = None, *, base: Layer | None = None, overrides: Sequence[str] = ()
) -> StudentConfig:
    """The configuration of a run: `base` (a preset), then the file, then the overrides.

    Args:
        path: YAML file, or None.
        base: nested settings that the file is laid over.
        overrides: "a.b=c" texts, the value in YAML; terms by name or place ("terms.n2n.weight=5").

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is out of range.
    """
    layers = [base or {}] + ([read_yaml(path)] if path is not None else [])
    merged: dict[str, object] = {}
    for layer in layers:
        merged = merge(merged, layer)
    where = str(path) if path is not None else "configuration"
    return validate(override(merged, overrides), StudentConfig, where)


def change_config(config: StudentConfig, overrides: Sequence[str]) -> StudentConfig:
    """A copy of `config` with single keys changed; raises ConfigError like `load_config`."""
    return validate(override(config.model_dump(mode="json"), overrides), StudentConfig, "--set")


def dump_config(config: BaseModel) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_yaml(path: str | Path) -> dict[str, object]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, no YAML, not a mapping, or a key given twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {_reason(error)}.") from error
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{path} has more than {MAX_CHARACTERS:,} characters: no configuration.")
    # Of a .toml, that a line of it is wrong would be half of the truth.
    is_yaml = Path(path).suffix.lower() in SUFFIXES
    hint = "" if is_yaml else " Configurations are YAML: write it so, and call it .yaml."
    try:
        value = parse_yaml(text, str(path))
    except ConfigError as error:
        raise ConfigError(f"{error}{hint}") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(
            f"{path} must hold keys and values at its top, as in `training: {{…}}`.{hint}"
        )
    return value


def merge(base: Layer, over: Layer) -> dict[str, object]:
    """`over` laid on `base`: mappings merge key by key, everything else replaces.

    A `model` or `schedule` of another name replaces the whole section, since the old one's keys
    mean nothing to it.

    Example:
        >>> merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}})
        {'a': {'x': 1, 'y': 3}}
    """
    merged = {key: copy.deepcopy(value) for key, value in base.items()}
    for key, value in over.items():
        old = merged.get(key)
        if key in _NAMED_SECTIONS:
            old, value = _as_section(old), _as_section(value)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            renamed = key in _NAMED_SECTIONS and value.get("name", old.get("name")) != old.get(
                "name"
            )
            merged[key] = dict(value) if renamed else merge(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def override(settings: Layer, overrides: Iterable[str]) -> dict[str, object]:
    """`settings` with "a.b=c" texts applied in order.

    Raises:
        ConfigError: no "=", an empty key, or a list has no such item.
    """
    changed = dict(settings)
    for text in overrides:
        key, equals, value = text.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise ConfigError(f"--set {text}: expected key=value, as in training.max_steps=1000.")
        parsed = parse_yaml(value, f"--set {text}")
        if path in [[section, "name"] for section in _NAMED_SECTIONS]:
            path, parsed = path[:1], {"name": parsed}
        changed = _with_key(changed, path, parsed, key.strip())
    return changed


def validate(settings: object, schema: type[ConfigType], where: str) -> ConfigType:
    """`settings` checked against a pydantic model.

    Args:
        settings: nested mappings, as parsed.
        schema: the model; also those of architectures, for their hyperparameters.
        where: what the error line starts with, a file's name.

    Raises:
        ConfigError: one line about the first key that is unknown or does not fit.
    """
    try:
        return schema.model_validate(settings)
    except ValidationError as error:
        problem = _first_problem(error, schema)
        # Keys and texts of the file stand in it.
        line = printable(problem)
        raise ConfigError(f"{where}: {_cut(line, 1000)}.") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: a value is nested too deeply.") from error


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[object] = set()
        if not isinstance(node, yaml.MappingNode):  # "!!map [a]"
            raise yaml.constructor.ConstructorError(
                None, None, "expected a mapping here", node.start_mark
            )
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node)
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def fetch_flow_collection_start(self, token_class: type[yaml.Token]) -> None:
        # The scanner looks at every open bracket at every token: 5,000 of them take ten seconds.
        self._check_depth(self.flow_level)
        super().fetch_flow_collection_start(token_class)

    def add_indent(self, column: int) -> bool:
        self._check_depth(len(self.indents))
        return bool(super().add_indent(column))

    def _check_depth(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise yaml.scanner.ScannerError(
                None, None, f"more than {MAX_DEPTH} levels", self.get_mark()
            )

    def construct_number(self, node: yaml.ScalarNode) -> float:
        return float(str(self.construct_scalar(node)))


# YAML 1.1 takes 1e-3 for text because it has no dot; every user means the number.
_EXPONENT = re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("!exponent", _EXPONENT, list("-+0123456789"))
_Loader.add_constructor("!exponent", _Loader.construct_number)


def parse_yaml(text: str, where: str) -> object:
    """Plain values out of a YAML text, in bounded memory.

    Args:
        text: a document.
        where: what an error begins with.

    Raises:
        ConfigError: no YAML, a key given twice, or more than any configuration holds.
    """
    try:
        # _Loader is a SafeLoader: plain data only.
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            _count_nodes(node, {}, 0)
            value: object = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    # PyYAML's constructors raise what int() and date() do on "0x" and 2001-99-99.
    except (
        yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, OverflowError,
        IndexError, RecursionError,
    ) as error:  # fmt: skip
        raise ConfigError(f"{where} is not valid YAML: {reason_of(error)}.") from error
    return value


def _count_nodes(node: yaml.Node | None, known: dict[int, int], depth: int) -> int:
    """Values below a node, an alias counted as often as it stands: nine lines may say a billion."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if depth > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels, or an alias of what it is in")
    if id(node) not in known:
        parts = [part for item in node.value for part in (item if type(item) is tuple else [item])]
        known[id(node)] = 1 + sum(_count_nodes(part, known, depth + 1) for part in parts)
    if known[id(node)] > MAX_VALUES:
        raise ValueError(f"its aliases stand for more than {MAX_VALUES:,} values")
    return known[id(node)]


def _cut(text: str, longest: int = 120) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"


def _as_section(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _with_key(settings: Layer, path: Sequence[str], value: object, key: str) -> dict[str, object]:
    """`settings` with `value` laid on what is at `path`."""
    head, rest = path[0], path[1:]
    if not rest:
        return merge(settings, {head: value})
    inside = settings.get(head, [] if head == "terms" else {})
    if head in _NAMED_SECTIONS:
        inside = _as_section(inside)
    changed: object
    if isinstance(inside, list | tuple):
        items = list(inside)
        place = _place(items, rest[0], key)
        item = items[place]
        if len(rest) > 1 and not isinstance(item, Mapping):
            raise ConfigError(f"--set {key}: {head}.{rest[0]} is {item!r} and has no keys.")
        items[place] = _with_key(item, rest[1:], value, key) if rest[1:] else value
        changed = items
    else:
        changed = _with_key(inside if isinstance(inside, Mapping) else {}, rest, value, key)
    return {**settings, head: changed}


def _place(items: Sequence[object], part: str, key: str) -> int:
    names = [str(i.get("name")) if isinstance(i, Mapping) else "" for i in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = [name for name in names if name] or [str(i) for i in range(len(items))]
    raise ConfigError(f"--set {key}: no item {part} there; {did_you_mean(part, known)}.")


def _first_problem(error: ValidationError, schema: type[BaseModel]) -> str:
    """The line about an unknown key if there is one, else about the first bad value."""
    details = error.errors(include_url=False)
    first = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    path, _ = _locate(schema, first["loc"])
    key = ".".join(path) or "settings"
    if first["type"] == "extra_forbidden":
        _, section = _locate(schema, first["loc"][:-1])
        known = {name for model in _models(section) for name in model.model_fields}
        return f"unknown key {key}; {did_you_mean(path[-1], known)}"
    if first["type"] == "union_tag_invalid":
        tag, tags = first["ctx"]["tag"], first["ctx"]["expected_tags"]
        return f"unknown {key} {tag}; {did_you_mean(tag, tags.replace(_QUOTE, '').split(', '))}"
    same_key = [d["msg"] for d in details if _locate(schema, d["loc"])[0] == path]
    message = " or ".join(dict.fromkeys(map(_plain, same_key)))
    value = first["input"]
    told = first["type"] in ("missing", "value_error") or isinstance(value, dict | list | tuple)
    return f"{key}: {message}" if told else f"{key}: {message}, got {_cut(repr(value))}"


_QUOTE = "'"


def _plain(message: str) -> str:
    """Pydantic's wording in the words of YAML."""
    message = message.removeprefix("Value error, ").replace("valid tuple", "list")
    message = re.sub(r"valid dictionary( or instance of \w+)?", "mapping", message)
    return message[:1].lower() + message[1:]


def _locate(schema: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], object]:
    """The dotted key of a pydantic location without its union tags, and what is annotated there."""
    path: list[str] = []
    current: object = schema
    for part in loc:
        models = _models(current)
        tagged = [model for model in models if _tag(model) == part]
        if len(models) > 1 and tagged:
            current = tagged[0]
        elif models or get_origin(current) not in (Union, types.UnionType):
            path.append(str(part))
            current = _below(current, part)
    return path, current


def _models(annotation: object) -> list[type[BaseModel]]:
    """The pydantic models an annotation allows, through Optional, Union and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return _models(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [model for choice in get_args(annotation) for model in _models(choice)]
    return []


def _below(annotation: object, part: int | str) -> object:
    for model in _models(annotation):
        if part in model.model_fields:
            return model.model_fields[str(part)].annotation
    if isinstance(part, int):
        arguments = [a for a in get_args(annotation) if a is not Ellipsis]
        return arguments[min(part, len(arguments) - 1)] if arguments else None
    return None


def _tag(model: type[BaseModel]) -> str | None:
    """The name that picks this model out of a union."""
    field = model.model_fields.get("name")
    if field is None or get_origin(field.annotation) is not Literal:
        return None
    return str(get_args(field.annotation)[0])
