"""`kdcache export` and `kdcache import-nvalchemi`: to and from files of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcache.errors import ConfigError, printable
from kdcache.fields import CODECS
from kdcache_cli.dumped import names
from kdcache_cli.importing import layout_of, layout_options, report_store
from kdcache_cli.options import store_cache_options, store_or_address
from kdcache_cli.progress import bars

FORMAT_OF_SUFFIX = {".extxyz": "extxyz", ".xyz": "extxyz", ".parquet": "parquet"}


@click.command("export")
@click.argument("store", type=store_or_address)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="New file.")
@click.option(
    "--to",
    "kind",
    type=click.Choice(["extxyz", "parquet", "nvalchemi"]),
    help="Format (default: by the suffix .extxyz, .xyz or .parquet).",
)
@click.option("--split", help="Only structures of this split.")
@click.option("--teacher", help="Also what this teacher of STORE says.")
@click.option(
    "--fields",
    help="Of the teacher, by comma (default: energy, forces, atomic_energy; nvalchemi: also node).",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "float64"]),
    default="float64",
    show_default=True,
    help="Of positions, energies and forces in an nvalchemi file.",
)
@store_cache_options
def export_command(store: Path | str, output: Path, kind: str | None, **values: Any) -> None:
    """Write the structures of STORE, their labels and a teacher's, in the order of the dataset.

    \b
    kdcache export features.zarr -o labelled.extxyz --teacher teacher
    kdcache export features.zarr -o train.parquet --split train --teacher teacher --fields node
    kdcache export features.zarr -o labelled.zarr --to nvalchemi --teacher teacher
    """
    from kdcache.interchange import select, write_extxyz, write_nvalchemi, write_parquet
    from kdcache.store import open_store

    chosen = kind or FORMAT_OF_SUFFIX.get(output.suffix)
    if chosen is None:
        raise ConfigError(
            f"{output.name} could be of any format. Name it: --to extxyz, parquet or nvalchemi."
        )
    opened = open_store(store)
    teacher, fields = values["teacher"], names(values["fields"])
    if chosen == "nvalchemi" and teacher in opened.teachers and fields is None:
        known = opened.fields(f"teachers/{teacher}")
        fields = [n for n in ("energy", "forces", "atomic_energy", "node") if n in known]
    selection = select(opened, split=values["split"], teacher=teacher, fields=fields)
    if chosen == "extxyz":
        write_extxyz(selection, output, progress=bars)
    elif chosen == "parquet":
        write_parquet(selection, output, progress=bars)
    else:
        write_nvalchemi(selection, output, precision=values["precision"], progress=bars)
    taken = ", ".join(f"{teacher}/{spec.name}" for spec in selection.specs)
    click.echo(f"{output}: {len(selection)} structures" + (f" with {taken}" if taken else ""))


@click.command("import-nvalchemi")
@click.argument("labelled", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Store.")
@click.option("--name", default="teacher", show_default=True, help="Name of the teacher there.")
@click.option(
    "--embedding",
    default="teacher_node_embeddings",
    show_default=True,
    help="Array of LABELLED that becomes the field node.",
)
@click.option(
    "--codec", type=click.Choice(CODECS), default="half", show_default=True, help="Of node."
)
@click.option("--unlabelled", is_flag=True, help="Accept structures without energy or forces.")
@layout_options
@click.option("--licence-teacher", default="", help="Licence of the teacher's weights.")
def import_nvalchemi_command(labelled: Path, output: Path, **values: Any) -> None:
    """Read LABELLED, a Zarr store of nvalchemi-toolkit that its label_dataset wrote, into a store
    with the teacher's energies, forces, atomic energies and one embedding, for students of ours.

    \b
    kdcache import-nvalchemi labelled.zarr -o features.zarr --name mace --split val=0.05
    kdcache train-student features.zarr -o student --strategy n2n --weight n2n=10
    """
    from kdcache.interchange import LabelledOptions, import_labelled
    from kdcache.interchange.labelled_file import LabelledFile

    options = LabelledOptions(
        name=values["name"],
        layout=layout_of(values),
        embedding=values["embedding"],
        codec=values["codec"],
        unlabelled=values["unlabelled"],
        licence=values["licence_teacher"],
    )
    store = import_labelled(labelled, output, options, progress=bars)
    report_store(store)
    fields = ", ".join(store.fields(f"teachers/{options.name}"))
    click.echo(f"teacher {options.name}: {fields}; which model it was, the file does not say")
    left_out = LabelledFile(labelled).left_out
    if left_out:
        click.echo(printable(f"left out: {', '.join(left_out)}"))
