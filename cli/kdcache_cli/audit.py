"""`kdcache audit`: is what a store keeps what the teacher says?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from kdcache.errors import printable
from kdcache_cli.options import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    REPORT,
    Positive,
    store_cache_options,
    store_or_address,
    teacher_options,
    teacher_source,
    write_report,
)
from kdcache_cli.progress import bars
from kdcache_cli.tables import table

POSITIVE = Positive()
# Of `teacher_options`, what only writing needs.
WRITING = ("codec", "licence_teacher")


@click.command("audit")
@click.argument("store", type=store_or_address)
@teacher_options
@click.option("--name", default="teacher", show_default=True, help="Name of the teacher in STORE.")
@click.option(
    "--sample", type=AT_LEAST_ONE, default=200, show_default=True, help="Structures to compute."
)
@click.option("--seed", type=NOT_NEGATIVE, default=0, show_default=True, help="Of the sample.")
@click.option(
    "--tolerance",
    type=POSITIVE,
    help="Relative, of computing the same twice (default: 1e-4 in float32, 1e-9 in float64).",
)
@click.option(
    "--symmetry-limit",
    type=POSITIVE,
    default=1e-2,
    show_default=True,
    help="How far a field may be from turning as it is described; more for teachers that learned "
    "to turn.",
)
@click.option(
    "--threads", type=AT_LEAST_ONE, default=2, show_default=True, help="For neighbour lists."
)
@click.option("--json", "report_path", type=REPORT, help="Write all numbers to this file.")
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Read a checkpoint that is a Python pickle: unpickling can run its author's code.",
)
@store_cache_options
def audit_command(store: Path | str, report_path: Path | None, **values: Any) -> None:
    """Compute random structures of STORE once more and compare; exit 2 when a field is not what
    the teacher says.

    \b
    kdcache audit features.zarr --teacher teacher --sample 200 --json audit.json
    """
    from kdcache.audit import AuditOptions, audit_store
    from kdcache.devices import find_device
    from kdcache.store import open_store

    opened = open_store(store)
    device = str(find_device(values["device"], "--device"))
    teacher = teacher_source(values, allow_pickle=values["allow_pickle"]).load(device)
    options = AuditOptions(
        name=values["name"],
        sample=values["sample"],
        seed=values["seed"],
        max_atoms=values["max_atoms"],
        tolerance=values["tolerance"],
        symmetry_limit=values["symmetry_limit"],
        device=device,
        threads=values["threads"],
    )
    report = audit_store(opened, teacher, options, progress=bars)
    if report_path is not None:
        write_report(report_path, report.to_json())
    click.echo(_fields(report))
    for line in _lines(report):
        click.echo(line)
    for problem in report.problems:
        click.secho(f"wrong: {printable(problem)}", err=True, fg="red")
    if report.problems:
        click.echo(
            f"kdcache: {store}: {len(report.problems)} of {len(report.fields)} fields of "
            f"{report.teacher} are not what this teacher says",
            err=True,
        )
        sys.exit(2)


# An option that nothing reads would be ignored in silence.
audit_command.params = [option for option in audit_command.params if option.name not in WRITING]


def _fields(report: Any) -> str:
    header = ["field", "codec", "rows", "outside", "cosine", "relative error", "bound"]
    header += ["worst structure", "its error", "turned"]
    rows = [
        [
            one.spec.name,
            one.spec.codec,
            str(one.n_rows),
            str(one.n_outside),
            f"{one.cosine:.7f}",
            f"{one.relative:.1e}",
            f"{one.bound:.1e}",
            one.worst_structure or "–",
            f"{one.worst_relative:.1e}",
            "–" if one.turning is None else f"{one.turning:.1e} ({one.spec.symmetry})",
        ]
        for one in report.fields
    ]
    return table(header, rows)


def _lines(report: Any) -> list[str]:
    lines = [
        f"{report.n_structures} of {report.n_in_store} structures computed once more, which may "
        f"change values by {report.tolerance:.0e} of their size"
    ]
    if report.n_left_out:
        lines[0] += f"; {report.n_left_out} the teacher failed on are left out"
    if report.is_same_teacher:
        lines.append(f"the teacher has the digest the store records, {report.stored_digest[:12]}…")
    else:
        lines.append(
            f"the teacher's digest is {report.given_digest[:12]}…, the store records "
            f"{report.stored_digest[:12]}…: other weights, settings, taps or precision"
        )
    if report.force_mismatch is not None:
        lines.append(
            f"forces differ from −dE/dx by {report.force_mismatch:.1e} of their size "
            f"({report.n_turned} structures); a teacher with direct forces may"
        )
    return lines
