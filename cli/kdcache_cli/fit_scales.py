"""`kdcache fit-scales`: scale factors of a GemNet-OC, before it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcache_cli.options import AT_LEAST_ONE, REPORT, read_options, reading_options, refuse_runs
from kdcache_cli.progress import bars


@click.command("fit-scales")
@click.argument("data", nargs=-1, required=True)
@click.option("-o", "--output", type=REPORT, required=True, help="JSON file of the factors.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file.")
@click.option("--preset", help="Model of a published size: gemnet-oc, gemnet-oc-small-oc20, …")
@click.option("--set", "overrides", multiple=True, help="Any setting: model.num_blocks=3.")
@click.option(
    "--structures", type=AT_LEAST_ONE, default=512, show_default=True, help="Chosen at random."
)
@click.option(
    "--batch-size", type=AT_LEAST_ONE, default=32, show_default=True, help="Structures in a batch."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@reading_options
def fit_scales_command(data: tuple[str, ...], output: Path, **values: Any) -> None:
    """Fit the scale factors of a GemNet-OC on DATA (files, globs or a store).

    Give the same preset, configuration and settings as to the training that is to use them.

    \b
    kdcache fit-scales data.zarr -o scales.json --preset gemnet-oc-small
    kdcache train-student data.zarr -o run --preset gemnet-oc-small \\
        --set model.scale_factors=scales.json
    """
    from kdcache.config import load_config
    from kdcache.devices import find_device
    from kdcache.fit_scales import fit_scale_factors, sample_batches, write_scale_factors
    from kdcache.models import build_model
    from kdcache.models.presets import find_preset
    from kdcache.readers import read_structures

    read = read_options(values)
    refuse_runs(data)
    name = values["preset"]
    if name is None and values["config_file"] is None:
        name = "gemnet-oc"
    base = find_preset(name).config() if name else None
    config = load_config(values["config_file"], base=base, overrides=values["overrides"])
    settings = {k: v for k, v in config.model.hyperparameters.items() if k != "scale_factors"}
    model = build_model({"name": config.model.name, **settings}, seed=config.training.seed)
    model.to(find_device(values["device"], "--device"))
    batches = sample_batches(
        model,
        read_structures(list(data), read),
        n_structures=values["structures"],
        batch_size=values["batch_size"],
        seed=config.training.seed,
    )
    factors = fit_scale_factors(model, batches, progress=bars)
    n_structures = sum(batch.n_structures for batch in batches)
    write_scale_factors(output, factors, f"{config.model.name}, {n_structures} structures")
    click.echo(
        f"{output}: {len(factors)} factors from {min(factors.values()):.3f} to "
        f"{max(factors.values()):.3f}, fitted on {n_structures} structures. "
        f"Train with --set model.scale_factors={output}"
    )
