"""`kdcache dump-teacher`: run a teacher once and keep its features."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import click

from kdcache.errors import ConfigError
from kdcache.progress import silent
from kdcache_cli.dumped import names, report_dump
from kdcache_cli.options import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    cluster_of,
    cluster_options,
    read_options,
    reading_options,
    refuse_runs,
    teacher_options,
    teacher_source,
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
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="A structure the teacher fails on, or gives NaN for; skip records it with the reason.",
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
@click.option(
    "--compute-threads",
    type=AT_LEAST_ONE,
    help="Of one process on a CPU (default: OMP_NUM_THREADS, else 1, so that a store has the same "
    "bytes whatever the machine; --workers uses more cores).",
)
@click.option(
    "--part",
    metavar="K/N",
    help="One of N processes that share the dump into a store, counted from 0; of a Slurm array.",
)
@click.option("--remove-signature", is_flag=True, help="Of a signed store, whose content changes.")
@click.option("--env-report", is_flag=True, help="Record the version of every installed package.")
@cluster_options
@reading_options
def dump_command(data: tuple[str, ...], **values: Any) -> None:
    """Compute the features of a teacher for every structure of DATA and write them to a store.

    A killed dump goes on with the same command.

    \b
    kdcache dump-teacher train.extxyz --teacher teacher -o features.zarr
    kdcache dump-teacher --into features.zarr --teacher other --name other
    kdcache dump-teacher s2ef/ --allow-pickle --teacher oc20.pt --teacher-format ocp -o oc.zarr

    Several processes share a dump as workers of a cluster, as ranks of torchrun, or as parts that
    need not know of each other. Whoever computes, the store is the same.

    \b
    kdcache dump-teacher train.extxyz --teacher teacher -o features.zarr --workers 4
    torchrun --nproc-per-node 8 --no-python kdcache dump-teacher train.extxyz ...
    kdcache dump-teacher --into features.zarr --teacher teacher --part $SLURM_ARRAY_TASK_ID/16
    """
    from kdcache.devices import find_device
    from kdcache.dump import DumpOptions, Part, choose_fields, dump_teacher, open_or_import
    from kdcache.ingest import ImportOptions
    from kdcache.store.entries import check_name

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
    cluster = cluster_of(values)
    part = None if values["part"] is None else Part.parse(values["part"])
    world = _torchrun()
    if part is not None and (into is None or not cluster.is_here or world is not None):
        raise ConfigError(
            "Parts share one existing store, without a cluster or torchrun. Make the store first "
            "(kdcache import DATA -o STORE), then give every part --into STORE."
        )
    if world is not None and not cluster.is_here:
        raise ConfigError("torchrun and a cluster both share out the work. Use one of them.")
    named = values["device"] if world is None else world.device_name(values["device"])
    # What the parent of workers asks its teacher, any device can answer.
    device = find_device(named if cluster.is_here else "cpu", "--device")
    source = teacher_source(values, allow_pickle=read.allow_pickle)
    teacher = source.load(str(device))
    fields = names(values["fields"])
    # Before the dataset is read: a misspelt field should not wait for it.
    choose_fields(teacher.field_specs(), fields, values["codec"])
    layout = ImportOptions(
        read=read,
        seed=values["seed"],
        graph=None if values["no_graph"] else teacher.graph_rule,
        atom_capacity=values["block_atoms"],
        blocks_per_shard=values["shard_blocks"],
        licence_structures=values["licence_structures"],
        licence_labels=values["licence_labels"],
    )
    options = DumpOptions(
        name=values["name"],
        fields=fields,
        codec=values["codec"],
        max_atoms=values["max_atoms"],
        on_overflow=values["on_overflow"],
        on_nonfinite=values["on_nonfinite"],
        on_error=values["on_error"],
        licence=values["licence_teacher"],
        device=str(device) if cluster.is_here else values["device"],
        threads=values["threads"],
        compute_threads=values["compute_threads"] or int(os.environ.get("OMP_NUM_THREADS", 1)),
        all_software=values["env_report"],
    )
    target: Path = output or into

    def make_store() -> None:
        open_or_import(
            list(data),
            target,
            layout,
            name=options.name,
            new=into is None,
            check_elements=getattr(teacher, "check_elements", lambda _: None),
            progress=bars,
        )

    dump = partial(
        dump_teacher,
        target,
        teacher,
        options,
        source=source,
        cluster=cluster,
        remove_signature=values["remove_signature"],
    )
    if world is None:
        make_store()
        click.echo(report_dump(dump(part=part, progress=bars)))
        return
    from kdcache.distributed import connected

    with connected(world, device) as ranks:
        with ranks.first_then_others():
            if ranks.is_first:
                make_store()
        shown = bars if ranks.is_first else silent
        part = Part(ranks.rank, ranks.size)
        report = dump(part=part, wait_for_others=ranks.wait, progress=shown)
        if ranks.is_first:
            click.echo(report_dump(report))


def _torchrun() -> Any:
    """The ranks this process is one of; None where torchrun did not start it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    from kdcache.distributed import launched

    world = launched()
    return None if world.size == 1 else world


def _refuse_layout(context: click.Context) -> None:
    """An existing store has its order, layout and licences already: these would be ignored."""
    for option in LAYOUT:
        if context.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE:
            flag = "--" + option.replace("_", "-")
            raise ConfigError(f"{flag} is decided with a new store (-o). Leave it out with --into.")
