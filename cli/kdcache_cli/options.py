"""Options that several commands share."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from kdcache.errors import ConfigError
from kdcache.fields import CODECS

F = TypeVar("F", bound=Callable[..., Any])

AT_LEAST_ONE = click.IntRange(min=1)
NOT_NEGATIVE = click.IntRange(min=0)


class Positive(click.FloatRange):
    """A number above 0; NaN is none, though it is below nothing."""

    def __init__(self) -> None:
        super().__init__(min=0.0, min_open=True)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is no number.", param, ctx)
        return number


class Report(click.Path):
    """A file that is written in the end: what forbids it is said before the hours that make it."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, dir_okay=False, writable=True)

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.exists():
            check_writable(path)
        return path


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written where it is to be; folders above it may be missing.

    Raises:
        ConfigError: naming the folder.
    """
    folder = path.absolute().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    try:
        # Tried, since neither modes nor owners tell what a server or a mount forbids.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"{path} cannot be written: {folder}: {reason}. What is computed would be lost: name a "
            f"file elsewhere."
        ) from None


REPORT = Report()

READING: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--format", {"help": "Reader to use; without it, chosen by the file's suffix."}),
    ("--energy-key", {"help": "Key of the energy (default: REF_energy, then the calculator's)."}),
    ("--forces-key", {"help": "Key of the forces (default: REF_forces, then the calculator's)."}),
    ("--energy-unit", {"help": "Unit of energies (default: eV where the format says so)."}),
    ("--forces-unit", {"help": "Unit of forces (default: energy unit per length unit)."}),
    ("--length-unit", {"help": "Unit of positions and cells (default: Å)."}),
    ("--group-key", {"help": "Key of the group errors are reported by (default: config_type)."}),
    ("--split-key", {"help": "Key naming train, val or test (default: split)."}),
    ("--id-key", {"help": "Key of the structure's id (default: file name and place)."}),
    ("--tags-key", {"help": "Atoms' Open Catalyst tags: 0 bulk, 1 surface, 2 adsorbate."}),
)


def reading_options(command: F) -> F:
    """How a dataset is read: `--format`, keys, units, `--unlabelled`, `--allow-pickle`."""
    command = click.option(
        "--allow-pickle",
        is_flag=True,
        help="Read files that are Python pickles (Open Catalyst LMDB and old checkpoints). Only "
        "for files whose origin you trust: unpickling can run their code.",
    )(command)
    command = click.option(
        "--unlabelled", is_flag=True, help="Accept structures without energy or forces."
    )(command)
    for name, settings in reversed(READING):
        command = click.option(name, **settings)(command)
    return command


def read_options(values: dict[str, Any]) -> Any:
    """The `ReadOptions` of a command, taken out of its keyword arguments."""
    from kdcache.readers import ReadOptions

    keys = [name.removeprefix("--").replace("-", "_") for name, _ in READING]
    flags = ["unlabelled", "allow_pickle"]
    return ReadOptions(**{key: values.pop(key) for key in [*keys, *flags]})


def store_or_address(text: str) -> Path | str:
    """The type of an argument that names a store: a path, or https://, s3://, gs://, az://."""
    from kdcache.store.location import store_location

    return store_location(text)


def store_cache_options(command: F) -> F:
    """`--store-cache` and `--store-cache-size`, for every store the command opens.

    They go by the environment, which processes of a sweep inherit.
    """
    for name, variable, metavar, text in STORE_CACHE:
        command = click.option(
            name,
            metavar=metavar,
            help=f"{text} Also {variable}.",
            callback=partial(_set_variable, variable),
            expose_value=False,
        )(command)
    return command


STORE_CACHE = (
    (
        "--store-cache-size",
        "KDCACHE_STORE_CACHE_SIZE",
        "SIZE",
        "At most so much of it, e.g. 500MB (default: 20GB).",
    ),
    ("--store-cache", "KDCACHE_STORE_CACHE", "DIR", "Keep files of a remote store here."),
)


def _set_variable(variable: str, ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    before = os.environ.get(variable)
    os.environ[variable] = value

    def restore() -> None:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before

    ctx.call_on_close(restore)


CLUSTER = (
    click.option(
        "--cluster",
        "cluster_address",
        metavar="ADDRESS",
        help="Have the workers of a dask scheduler do it, e.g. tcp://node01:8786.",
    ),
    click.option(
        "--workers",
        type=AT_LEAST_ONE,
        help="Have so many processes of this machine do it (needs kdcache[cluster]).",
    ),
)


def cluster_options(command: F) -> F:
    """`--cluster` and `--workers`: who works on the shards of a store."""
    for option in reversed(CLUSTER):
        command = option(command)
    return command


def cluster_of(values: Mapping[str, Any], *, threads: int = 1) -> Any:
    """The `ClusterOptions` of a command with `cluster_options`.

    Args:
        values: its keyword arguments.
        threads: of this process, where it does the work itself.
    """
    from kdcache.cluster import ClusterOptions

    return ClusterOptions(values["cluster_address"], values["workers"] or 0, threads)


max_atoms_option = click.option(
    "--max-atoms",
    type=AT_LEAST_ONE,
    help="Atoms in a batch.  [default: 4096 on a GPU, 256 a thread on a CPU]",
)

TEACHER = (
    click.option(
        "--teacher",
        "checkpoint",
        required=True,
        help="Run directory of a trained model, or the checkpoint of another --teacher-format.",
    ),
    click.option(
        "--teacher-format",
        default="native",
        show_default=True,
        help="Kind of checkpoint: native, ocp (Open Catalyst), or package.module:factory.",
    ),
    click.option("--scale-file", help="Scale factors of an Open Catalyst GemNet-OC, .pt or .json."),
    click.option("--teacher-config", help="YAML or JSON of a teacher whose checkpoint has none."),
    click.option("--tap", "taps", multiple=True, help="Inner module: node/msg2=message_layers.2."),
    click.option("--codec", type=click.Choice(CODECS), default="half", show_default=True),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1."),
    click.option(
        "--precision",
        type=click.Choice(["float32", "float64"]),
        default="float32",
        show_default=True,
    ),
    max_atoms_option,
    click.option("--licence-teacher", default="", help="Licence of the teacher's weights."),
)


def teacher_options(command: F) -> F:
    """Which teacher computes, where, and how its features are kept."""
    for option in reversed(TEACHER):
        command = option(command)
    return command


def teacher_source(values: Mapping[str, Any], *, allow_pickle: bool) -> Any:
    """The `TeacherSource` that `teacher_options` name."""
    from kdcache.dump import TeacherSource
    from kdcache.models.taps import Tap

    return TeacherSource(
        values["teacher_format"],
        values["checkpoint"],
        precision=values["precision"],
        taps=tuple(Tap.parse(text) for text in values["taps"]),
        scale_file=values["scale_file"],
        config_file=values["teacher_config"],
        allow_pickle=allow_pickle,
    )


def refuse_runs(data: Sequence[str]) -> None:
    """Refuse runs where a dataset or a store is wanted.

    Raises:
        ConfigError: naming the first.
    """
    for name in data:
        path = Path(name)
        if (path / "model.json").is_file() or (path / "state").is_dir():
            raise ConfigError(
                f"{name} is a run, the directory of a model. DATA is what it was trained on: files "
                f"or a store."
            )


def write_report(path: Path, report: object) -> None:
    """JSON into a file, its directory made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def fractions(text: str | None) -> dict[str, float]:
    """`val=0.05,test=0.1` as a dictionary.

    Raises:
        ConfigError: not of that form, or not fractions.
    """
    found: dict[str, float] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, _, value = part.partition("=")
        if name.strip() in found:
            raise ConfigError(f"--split {text} names {name.strip()} twice. Name it once.")
        try:
            found[name.strip()] = float(value)
        except ValueError as error:
            raise ConfigError(
                f"--split {text}: {part!r} is not NAME=FRACTION, e.g. --split val=0.05,test=0.1."
            ) from error
    return found


def refuse_foreign(directory: Path, settings: Mapping[str, object]) -> None:
    """Refuse a directory that something else filled; mark an empty one with these settings.

    Raises:
        ConfigError: `directory` holds files of another run, or of nothing known.
    """
    mark = directory / "settings.json"
    if not directory.exists():
        directory.mkdir(parents=True)
        mark.write_text(json.dumps(settings) + "\n")
        return
    if not mark.is_file():
        raise ConfigError(f"{directory} exists and is no demo of ours. Name another with -o.")
    found = json.loads(mark.read_text())
    if found != settings:
        raise ConfigError(
            f"{directory} holds a demo made with {found}, now {dict(settings)} are asked for. "
            f"Name another directory with -o, or remove it."
        )
