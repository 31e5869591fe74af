"""`kdcache augment`: structures made from others, labelled by a teacher into their own store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcache.errors import ConfigError
from kdcache_cli.dumped import names, report_dump
from kdcache_cli.options import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    Positive,
    read_options,
    reading_options,
    refuse_runs,
    teacher_options,
    teacher_source,
)
from kdcache_cli.progress import bars

POSITIVE = Positive()
SHARE = click.FloatRange(min=0, max=1, min_open=True)


@click.command("augment")
@click.argument("data", nargs=-1, required=True)
@teacher_options
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="New store.")
@click.option(
    "--method",
    type=click.Choice(["random", "ascent", "relax", "md"]),
    default="random",
    show_default=True,
    help="How structures are made.",
)
@click.option("--student", help="Run directory of the student that ascent leads away from.")
@click.option("--seed", type=NOT_NEGATIVE, default=0, show_default=True)
@click.option("--share", type=SHARE, default=1.0, show_default=True, help="Of DATA that is used.")
@click.option(
    "--copies", type=AT_LEAST_ONE, default=1, show_default=True, help="random: of each structure."
)
@click.option(
    "--norm", type=POSITIVE, default=0.1, show_default=True, help="random, ascent: length, Å."
)
@click.option(
    "--norm-of",
    type=click.Choice(["atom", "structure"]),
    default="atom",
    show_default=True,
    help="random, ascent: whose displacement has that length.",
)
@click.option(
    "--keep", type=SHARE, default=0.1, show_default=True, help="relax, md: share of the frames."
)
@click.option(
    "--max-steps", type=AT_LEAST_ONE, default=200, show_default=True, help="relax, md: steps."
)
@click.option(
    "--max-force",
    type=POSITIVE,
    default=50.0,
    show_default=True,
    help="relax, md: a trajectory ends before a larger force, eV/Å.",
)
@click.option(
    "--force-goal",
    type=POSITIVE,
    default=0.03,
    show_default=True,
    help="relax: ends below this force, eV/Å.",
)
@click.option("--temperature", type=POSITIVE, default=300.0, show_default=True, help="md: K.")
@click.option("--timestep", type=POSITIVE, default=1.0, show_default=True, help="md: fs.")
@click.option(
    "--friction", type=POSITIVE, default=0.01, show_default=True, help="md: of Langevin, 1/fs."
)
@click.option(
    "--name", help="Name of the teacher in the overlay (default: its name in DATA, or teacher)."
)
@click.option("--fields", help="Fields to keep, by comma (default: those in DATA, or all).")
@click.option("--licence-structures", help="Licence of the structures (default: that of DATA).")
@click.option("--threads", type=AT_LEAST_ONE, default=2, show_default=True)
@reading_options
def augment_command(data: tuple[str, ...], output: Path, **values: Any) -> None:
    """Make new structures from those of DATA (files or a store), label them with a teacher, and
    write them to OUTPUT, a store that `train-student --with` mixes with DATA.

    Structures of splits val and test are passed over, and so is at training what was made from
    structures that the run holds out.

    \b
    kdcache augment features.zarr --teacher teacher -o rattled.zarr --norm 0.1
    kdcache augment features.zarr --teacher teacher -o synthetic.zarr --method relax --share 0.05
    kdcache train-student features.zarr -o student --strategy n2n --with rattled.zarr
    """
    from kdcache.augment import augment
    from kdcache.augment.options import OF_METHOD, AugmentOptions
    from kdcache.checkpoint import load_potential
    from kdcache.devices import find_device
    from kdcache.dump import DumpOptions, choose_fields
    from kdcache.ingest import ImportOptions
    from kdcache.store.entries import check_name

    read = read_options(values)
    refuse_runs(data)
    _refuse_of_other_methods(click.get_current_context(), values["method"], OF_METHOD)
    keys = ("method", "seed", "share", *dict.fromkeys(k for of in OF_METHOD.values() for k in of))
    options = AugmentOptions(**{key: values[key] for key in keys})
    if (values["student"] is None) == (options.method == "ascent"):
        raise ConfigError("--student and --method ascent belong together. Give both, or neither.")
    device = str(find_device(values["device"], "--device"))
    teacher = teacher_source(values, allow_pickle=read.allow_pickle).load(device)
    student = load_potential(values["student"], device=device) if values["student"] else None
    name, fields, licence = _as_in(data, teacher)
    name, fields = values["name"] or name, names(values["fields"]) or fields
    check_name(name, "teacher")
    # Before anything is made: a misspelt field should not wait for it.
    choose_fields(teacher.field_specs(), fields, values["codec"])
    given = values["licence_structures"]
    report = augment(
        list(data),
        output,
        teacher,
        options,
        layout=ImportOptions(
            read=read,
            seed=options.seed,
            graph=teacher.graph_rule,
            licence_structures=licence if given is None else given,
            threads=values["threads"],
        ),
        dump=DumpOptions(
            name=name,
            fields=fields,
            codec=values["codec"],
            max_atoms=values["max_atoms"],
            licence=values["licence_teacher"],
            device=device,
            threads=values["threads"],
        ),
        student=student,
        progress=bars,
    )
    click.echo(report_dump(report))
    click.echo(f"{output}: {report.n_structures} structures of origin {options.origin}")


def _refuse_of_other_methods(
    context: click.Context, method: str, of_method: dict[str, tuple[str, ...]]
) -> None:
    """A number that the method does not read would be ignored in silence."""
    for option in dict.fromkeys(key for keys in of_method.values() for key in keys):
        given = context.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE
        if given and option not in of_method[method]:
            flag = "--" + option.replace("_", "-")
            wanted = " or ".join(name for name, keys in of_method.items() if option in keys)
            raise ConfigError(f"{flag} belongs to --method {wanted}, not {method}. Leave it out.")


def _as_in(data: tuple[str, ...], teacher: Any) -> tuple[str, list[str] | None, str]:
    """What the store the structures come from calls this teacher, keeps of it, and its licence."""
    from kdcache.augment import same_teacher
    from kdcache.readers.dataset import format_of
    from kdcache.store import open_store

    if len(data) != 1 or format_of(Path(data[0])) != "store":
        return "teacher", None, ""
    store = open_store(data[0])
    licence = store.manifest.dataset.licences.structures
    name = same_teacher(store, teacher)
    if name is None:
        return "teacher", None, licence
    kept = store.teachers[name].fields
    return name, [spec.name for spec in teacher.field_specs() if spec.name in kept], licence
