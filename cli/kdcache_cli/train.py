"""`kdcache train-student`: a student, a control or a teacher from a store."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kdcache.errors import ConfigError, IdentityError
from kdcache_cli.options import (
    AT_LEAST_ONE,
    read_options,
    reading_options,
    refuse_runs,
    store_cache_options,
)
from kdcache_cli.progress import bars


@click.command("train-student")
@click.argument("data", nargs=-1, required=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Run directory."
)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file.")
@click.option("--preset", help="Model and training of a published size: painn-small, painn-oc20, …")
@click.option(
    "--strategy", help="n2n, e2e, e2n, v2v, vanilla1, vanilla2, several (n2n,e2n), annealed, …"
)
@click.option("--weight", "weights", multiple=True, help="λ of a strategy: n2n=50.")
@click.option(
    "--published",
    metavar="T/S/D",
    help="Row of the published λ: gemnet-oc/painn/oc20 (default: the nearest).",
)
@click.option("--teacher", help="Teacher in the store, where there are several.")
@click.option("--control", is_flag=True, help="Same run without its terms.")
@click.option(
    "--with",
    "overlays",
    multiple=True,
    help="Overlay to mix in; shares and weights: --set data.overlays.0.share=0.3.",
)
@click.option("--labels", type=float, help="Share of the labels that may be seen.")
@click.option("--set", "overrides", multiple=True, help="Any setting: training.max_steps=5000.")
@click.option("--check-data", multiple=True, help="Refuse unless the store is of this dataset.")
@click.option("--graph-cache", type=click.Path(path_type=Path), help="Shared neighbour lists.")
@click.option("--stop-after", type=AT_LEAST_ONE, help="Leave after this step, with a checkpoint.")
@store_cache_options
@reading_options
def train_command(data: tuple[str, ...], output: Path, **values: Any) -> None:
    """Train a model on DATA, a store with a teacher's features. Without a strategy or terms it
    trains on labels alone, which is how a teacher is made; then DATA may be files as well.

    The same command goes on where a killed run ended.

    \b
    kdcache train-student data.zarr -o teacher --preset painn
    kdcache train-student features.zarr -o student --preset painn-small --strategy n2n
    kdcache train-student features.zarr -o student --strategy n2n --with rattled.zarr

    Several processes, a GPU each, share every batch and end where one would:

    \b
    torchrun --nproc-per-node 4 --no-python kdcache train-student features.zarr -o student …
    """
    from kdcache.checkpoint import check_run_directory, refuse_foreign_run
    from kdcache.config import StudentConfig, load_config
    from kdcache.distill.strategies import apply_strategy
    from kdcache.distributed import launched
    from kdcache.ingest import check_dataset
    from kdcache.selection import n_trained_on
    from kdcache.store import open_store
    from kdcache.train import train_student

    read = read_options(values)
    weights = strategy_weights(values["weights"])
    for option in ("weights", "published", "teacher"):
        if values[option] and not values["strategy"]:
            raise ConfigError(
                f"--{option.removesuffix('s')} belongs to a --strategy. Name one, or set terms in "
                f"the YAML."
            )
    refuse_runs(data)
    check_run_directory(output)
    named = (values["config_file"], values["graph_cache"], os.environ.get("KDCACHE_STORE_CACHE"))
    refuse_foreign_run(output, beside=[Path(path) for path in named if path])
    # First, so that --set can say more of them.
    overlays = [{"store": path} for path in values["overlays"]]
    overrides = [f"data.overlays={json.dumps(overlays)}"] if overlays else []
    overrides += values["overrides"]
    if values["labels"] is not None:
        overrides.append(f"data.labels={values['labels']}")
    name = values["preset"]
    if name is None and values["config_file"] is None:
        name = "painn-small"

    def configured(store: Path | str | None) -> StudentConfig:
        """What is trained from a store; None for one without a teacher, not made yet."""
        n_structures = 1 if store is None else n_trained_on(open_store(store))
        base = preset_layer(name, n_structures)
        config: StudentConfig = load_config(values["config_file"], base=base, overrides=overrides)
        if values["strategy"]:
            config = apply_strategy(
                config,
                values["strategy"],
                weights=weights,
                teacher_name=values["teacher"],
                **of_teacher(
                    store, name or config.model.name, values["teacher"], values["published"]
                ),
            )
        return apply_strategy(config, "control") if values["control"] else config

    # Before files are read: a misspelt setting should not wait for them.
    load_config(values["config_file"], base=preset_layer(name, 1), overrides=overrides)
    store = as_store(
        list(data), output / "data.zarr", read, lambda: refuse_terms(configured(None), data[0])
    )
    config = configured(store)
    if values["check_data"]:
        check_dataset(open_store(store), list(values["check_data"]), read, progress=bars)
    result = train_student(
        store,
        output,
        config,
        graph_cache=values["graph_cache"],
        stop_after=values["stop_after"],
        progress=bars,
    )
    if not launched().is_first:
        return
    if result is None:
        click.echo(f"{output}: stopped. The same command without --stop-after goes on.")
        return
    line = (
        f"{result.run}: {result.steps} steps in {result.seconds:.0f} s, "
        f"{result.structures_per_second:.0f} structures/s"
    )
    if result.validation is not None:
        line += (
            f"; validation: energy {result.validation.energy_mae_mev:.1f} meV, "
            f"forces {result.validation.force_mae_mev_per_a:.1f} meV/Å"
        )
    click.echo(line)


def as_store(
    data: list[str], imported: Path, read: Any, before_import: Callable[[], None]
) -> Path | str:
    """The store that DATA is, or one imported from its files beside the run."""
    from kdcache.distributed import launched
    from kdcache.ingest import ImportOptions, check_dataset, import_dataset
    from kdcache.readers import read_structures
    from kdcache.store import is_store, open_store

    if len(data) == 1 and (is_store(data[0]) or Path(data[0]).is_dir()):
        return open_store(data[0]).path
    if launched().size > 1:
        raise ConfigError(
            f"{data[0]} is no store, and each of {launched().size} processes would import it. Run "
            f"kdcache import first, and train from the store."
        )
    read_structures(data, read)  # says what is missing before anything is made
    if (imported / "manifest.json").is_file() and not (imported / ".work").exists():
        try:
            check_dataset(open_store(imported), data, read, progress=bars)
        except IdentityError as error:
            raise IdentityError(
                f"{imported.parent} was begun with other data. {error} Or name another directory."
            ) from error
        return imported
    before_import()
    return import_dataset(data, imported, ImportOptions(read=read), progress=bars).path


def refuse_terms(config: Any, data: str) -> None:
    """Of files, nothing can be trained that needs a teacher.

    Raises:
        ConfigError: naming the first term.
    """
    for term in config.terms:
        if not term.weight.is_zero:
            raise ConfigError(
                f"Term {term.name} needs a teacher, and what is imported from {data} has none. "
                f"Dump one first (kdcache dump-teacher {data} --teacher RUN -o STORE), and train "
                f"from STORE."
            )


def preset_layer(name: str | None, n_structures: int) -> dict[str, object] | None:
    """A preset with the number of steps that its published epochs make of so many structures."""
    from kdcache.models.presets import find_preset

    return find_preset(name).config(n_structures) if name else None


def of_teacher(
    store: Path | str | None, student: str, teacher: str | None, published: str | None
) -> dict[str, Any]:
    """What a strategy takes from a teacher in a store: the row of published weights, its fields."""
    from kdcache.distill.published import DEFAULT_PAIR, nearest_pair, parse_pair
    from kdcache.store import open_store

    pair = None if published is None else parse_pair(published)
    teachers = {} if store is None else open_store(store).teachers
    name = teacher or next(iter(teachers), "")
    if name not in teachers:  # the terms say so when they are bound
        return {"pair": pair or DEFAULT_PAIR}
    pair = pair or nearest_pair(teachers[name].model, student)
    return {"pair": pair, "teacher_fields": list(teachers[name].fields)}


def strategy_weights(texts: tuple[str, ...]) -> dict[str, float]:
    """`n2n=50` texts as λ by strategy."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name.strip() in found:
            raise ConfigError(f"--weight {name.strip()} is given twice. Give it once.")
        try:
            weight = float(value)
        except ValueError:
            weight = -1.0
        if not 0.0 <= weight < float("inf"):
            raise ConfigError(
                f"--weight {text} is not STRATEGY=NUMBER, the number 0 or more: n2n=50."
            )
        found[name.strip()] = weight
    return found
