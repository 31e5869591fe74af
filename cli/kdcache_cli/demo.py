"""`kdcache demo`: the whole job on a built-in dataset, by the ordinary commands."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from kdcache_cli.progress import bars
from kdcache_cli.tables import table


@click.command("demo")
@click.option("--quick", is_flag=True, help="A small one, to see that everything works.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("kdcache-demo"),
    show_default=True,
    help="Directory for everything it makes.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows here.")
@click.option("--seed", default=0, show_default=True, help="Of the structures.")
def demo_command(quick: bool, output: Path, json_file: Path | None, seed: int) -> None:
    """Make catalyst-like structures, train a teacher on all of them, and students on a tenth of the
    labels with and without the teacher's cached features.

    Prints every command it runs, so that you can go on with data of your own. A stopped demo goes
    on where it was.
    """
    from kdcache.demo.recipe import FULL, QUICK, steps, write_inputs
    from kdcache.demo.report import draw, rows
    from kdcache.demo.structures import catalyst_structures
    from kdcache_cli.main import main
    from kdcache_cli.options import refuse_foreign

    started = time.perf_counter()
    recipe = QUICK if quick else FULL
    refuse_foreign(output, {"quick": quick, "seed": seed})
    if not (output / "student.yaml").is_file():
        made = catalyst_structures(recipe.n_structures, seed, progress=bars)
        write_inputs(output, recipe, made)
    planned = steps(output, recipe)
    done = output / "done.txt"  # each command goes on by itself where it was killed
    for step in planned:
        if done.is_file() and step.command in done.read_text().splitlines():
            continue
        click.secho(f"\n# {step.title}", fg="green")
        click.secho(f"$ {step.command}", bold=True)
        main.main(list(step.arguments), prog_name="kdcache", standalone_mode=False)
        with done.open("a") as file:
            file.write(step.command + "\n")
    reports = [step.report for step in planned if step.report is not None]
    found = rows({path.stem: json.loads(path.read_text()) for path in reports})
    picture = output / "demo.png"
    draw(picture, found, {row.name: output / row.name / "metrics.csv" for row in found})
    report = json.dumps({"rows": [row.as_dict() for row in found]}, indent=1) + "\n"
    for path in [output / "demo.json", *([json_file] if json_file else [])]:
        path.write_text(report)
    header = ["held-out structures", "E MAE", "F MAE", "F cos", "EFwT", "gap E", "gap F", "train",
              "structures/s"]  # fmt: skip
    units = ["", "meV", "meV/Å", "", "%", "%", "%", "s", ""]
    cells = [
        [
            row.name,
            f"{row.energy_mae_mev:.1f}",
            f"{row.force_mae_mev_per_a:.1f}",
            f"{row.force_cos:.3f}",
            f"{100 * row.efwt:.1f}",
            f"{100 * row.gap_closed_energy:.0f}",
            f"{100 * row.gap_closed_force:.0f}",
            f"{row.training_seconds:.0f}",
            f"{row.structures_per_second:.0f}",
        ]
        for row in found
    ]
    share = 100 * recipe.labels
    click.echo(f"\nStudents see {share:.0f} % of the labels, the teacher all of them.")
    click.echo("gap: share of the distance from control to teacher that a student closes.\n")
    click.echo(table(header, [units, *cells]))
    click.echo(f"\n{picture}: learning curves and bars. {time.perf_counter() - started:.0f} s.")
    click.echo("Next, with your own data: the commands above, from `kdcache import` on.")
