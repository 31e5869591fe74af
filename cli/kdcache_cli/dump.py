"""`kdcache dump-teacher`: run a teacher once and keep its features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcache.errors import ConfigError
from kdcache_cli.dumped import names, report_dump
from kdcache_cli.options import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    open_teacher,
    read_options,
    reading_options,
    refuse_runs,
    teacher_options,
)
from kdcache_cli.progress import bars

LAYOUT = (
    "seed", "no_graph", "block_atoms", "shard_blocks", "licence_structures", "licence_labels",
)  # fmt: skip


@click.command("dump-teacher")
@click.argument("data", nargs=-1)
@teacher_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="New store.")
@click.option("--into", type=click.Path(path_type=Path), help="Existing store to add to.")
@click.option("--name", default="teacher", show_default=True, help="Name of the teacher there.")
@click.option(
    "--fields",
    help="Fields to keep, by comma (default: all; of edges, only their sums at the atoms).",
)
@click.option(
    "--on-overflow",
    type=click.Choice(["stop", "clip"]),
    default="stop",
    show_default=True,
    help="A feature beyond float16.",
)
@click.option(
    "--on-nonfinite",
    type=click.Choice(["stop", "zero"]),
    default="stop",
    show_default=True,
    help="A feature that is NaN or infinite.",
)
@click.option("--no-graph", is_flag=True, help="Do not keep the teacher's neighbour lists.")
@click.option("--licence-structures", default="", help="Licence of the structures.")
@click.option("--licence-labels", default="", help="Licence of energies and forces.")
@click.option(
    "--seed", type=NOT_NEGATIVE, default=0, show_default=True, help="Of the order of a new store."
)
@click.option("--block-atoms", type=AT_LEAST_ONE, help="Atoms in a block of a new store.")
@click.option("--shard-blocks", type=AT_LEAST_ONE, help="Blocks in a file of a new store.")
@click.option(
    "--threads", type=AT_LEAST_ONE, default=2, show_default=True, help="For neighbour lists."
)
@reading_options
def dump_command(data: tuple[str, ...], **values: Any) -> None:
    """Compute the features of a teacher for every structure of DATA and write them to a store.

    A killed dump goes on with the same command.

    \b
    kdcache dump-teacher train.extxyz --teacher teacher -o features.zarr
    kdcache dump-teacher --into features.zarr --teacher other --name other
    kdcache dump-teacher s2ef/ --allow-pickle --teacher oc20.pt --teacher-format ocp -o oc.zarr
    """
    import tempfile

    from kdcache.devices import find_device
    from kdcache.dump import DumpOptions, choose_fields, dump_teacher, open_or_import
    from kdcache.ingest import ImportOptions
    from kdcache.store.manifest import check_name

    read = read_options(values)
    output, into = values["output"], values["into"]
    if (output is None) == (into is None):
        raise ConfigError("Say either -o STORE for a new store, or --into STORE to add to one.")
    if output is not None and not data:
        raise ConfigError("A new store needs DATA: files, globs or another store to read.")
    if into is not None:
        _refuse_layout(click.get_current_context())
    refuse_runs(data)
    check_name(values["name"], "teacher")
    device = str(find_device(values["device"], "--device"))
    teacher = open_teacher(values, device, allow_pickle=read.allow_pickle)
    fields = names(values["fields"])
    # Before the dataset is read: a misspelt field should not wait for it.
    choose_fields(teacher.field_specs(), fields, values["codec"])
    options = ImportOptions(
        read=read,
        seed=values["seed"],
        graph=None if values["no_graph"] else teacher.graph_rule,
        atom_capacity=values["block_atoms"],
        blocks_per_shard=values["shard_blocks"],
        licence_structures=values["licence_structures"],
        licence_labels=values["licence_labels"],
    )
    path = open_or_import(
        list(data), output or into, options, name=values["name"], new=into is None, progress=bars
    )
    with tempfile.TemporaryDirectory(prefix="kdcache-graph-") as scratch:
        report = dump_teacher(
            path,
            teacher,
            DumpOptions(
                name=values["name"],
                fields=fields,
                codec=values["codec"],
                max_atoms=values["max_atoms"],
                on_overflow=values["on_overflow"],
                on_nonfinite=values["on_nonfinite"],
                licence=values["licence_teacher"],
                device=device,
                threads=values["threads"],
            ),
            graph_cache=Path(scratch),
            progress=bars,
        )
    click.echo(report_dump(report))


def _refuse_layout(context: click.Context) -> None:
    """An existing store has its order, layout and licences already: these would be ignored."""
    for option in LAYOUT:
        if context.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE:
            flag = "--" + option.replace("_", "-")
            raise ConfigError(f"{flag} is decided with a new store (-o). Leave it out with --into.")
