"""The `kdcache` command: parses, shows progress, maps errors to one line. No logic lives here.

Commands import what they run when they run, so that `kdcache --help` answers at once.
Invariant: whatever a user gives, the answer is a result or one line and exit code 2.
"""

from __future__ import annotations

import errno
import importlib
import logging
import sys
from typing import Any, NoReturn

import click

from kdcache.allocator import keep_freed_memory
from kdcache.errors import KdcacheError, did_you_mean, printable

# name: (module, function, line in the list of commands)
COMMANDS = {
    "import": ("kdcache_cli.importing", "import_command", "Read a dataset into a store."),
    "dump-teacher": (
        "kdcache_cli.dump", "dump_command", "Run a teacher once and keep its features.",
    ),
    "train-student": (
        "kdcache_cli.train", "train_command", "Train a student (or a teacher) from a store.",
    ),
    "fit-scales": (
        "kdcache_cli.fit_scales", "fit_scales_command", "Fit the scale factors of a GemNet-OC.",
    ),
    "sweep": ("kdcache_cli.sweep", "sweep_command", "Train a grid of students over one store."),
    "augment": (
        "kdcache_cli.augment", "augment_command", "Make structures that a teacher labels.",
    ),
    "evaluate": ("kdcache_cli.evaluate", "evaluate_command", "Errors of a trained model on data."),
    "compare": ("kdcache_cli.compare", "compare_command", "How alike two models' layers are."),
    "inspect": ("kdcache_cli.stores", "inspect_command", "Show what a store holds."),
    "verify": ("kdcache_cli.stores", "verify_command", "Check every byte of a store."),
    "audit": (
        "kdcache_cli.audit", "audit_command", "Hold a store's features against their teacher.",
    ),
    "stats": ("kdcache_cli.statistics", "stats_command", "Show what a store's values are like."),
    "subset": (
        "kdcache_cli.rewriting", "subset_command", "Write chosen structures to a new store.",
    ),
    "merge": ("kdcache_cli.rewriting", "merge_command", "Put several stores into one."),
    "convert": (
        "kdcache_cli.rewriting", "convert_command", "Write a store with other codecs or blocks.",
    ),
    "annotate": (
        "kdcache_cli.rights", "annotate_command", "State creator, citation, licences of a store.",
    ),
    "withhold": (
        "kdcache_cli.rights", "withhold_command", "Write a store without its structures.",
    ),
    "join": (
        "kdcache_cli.rights", "join_command", "Put your own structures into such a store.",
    ),
    "keygen": ("kdcache_cli.signing", "keygen_command", "Make a key pair to sign stores with."),
    "sign": ("kdcache_cli.signing", "sign_command", "Sign a store."),
    "publish": ("kdcache_cli.sharing", "publish_command", "Copy a store to where others read it."),
    "pull": ("kdcache_cli.sharing", "pull_command", "Fetch a store, or a part of one."),
    "pack": ("kdcache_cli.sharing", "pack_command", "Write a store into one zip file."),
    "export": (
        "kdcache_cli.interchange", "export_command", "Write a store as files of other programs.",
    ),
    "import-nvalchemi": (
        "kdcache_cli.interchange", "import_nvalchemi_command",
        "Read what nvalchemi-toolkit's teacher labelled.",
    ),
    "card": ("kdcache_cli.card", "card_command", "Write a page about a store."),
    "demo": ("kdcache_cli.demo", "demo_command", "The whole job on a built-in dataset."),
}  # fmt: skip
GOES_ON = (
    "import", "dump-teacher", "train-student", "sweep", "augment", "subset", "merge", "convert",
    "import-nvalchemi",
    "publish", "pull",
    "demo",
)  # fmt: skip
GOING_ON = "The same command goes on where this one ended."
WAYS_OUT = {
    errno.ENOSPC: "Nothing finished is harmed. Make room on the disk.",
    errno.EDQUOT: "Nothing finished is harmed. Make room within your quota.",
    errno.EFBIG: "Nothing finished is harmed. Raise the limit of a file's size (ulimit -f).",
    errno.EIO: "The disk, or the server behind it, failed. See that it works.",
    errno.EROFS: "Make it writable, or name a path on another file system.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
}

_log = logging.getLogger("kdcache_cli")


class LazyGroup(click.Group):
    """Commands whose modules are imported on use, listed without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, function, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), function)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS:
            raise click.UsageError(f"no command {args[0]}: {did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KdcacheError as error:
            _fail(str(error))
        except OSError as error:
            if error.errno == errno.EPIPE:  # `kdcache inspect | head`: click leaves in silence
                raise
            _log.info("where it happened:", exc_info=error)
            _fail(_reason(error, ctx.invoked_subcommand))
        except RuntimeError as error:
            # torch's, known by name: importing torch to name it would cost every command seconds.
            if type(error).__name__ != "OutOfMemoryError":
                raise
            _fail(
                "The GPU's memory is full. Make batches smaller (--max-atoms, or --set "
                "training.batch_size=…), or use --device cpu."
            )
        except KeyboardInterrupt:
            goes_on = ctx.invoked_subcommand in GOES_ON
            after = f" {GOING_ON}" if goes_on else ""
            click.echo(f"kdcache: stopped.{after}", err=True)
            sys.exit(130)


def _fail(message: str) -> NoReturn:
    click.secho(f"kdcache: {printable(message)}", err=True, fg="red")
    sys.exit(2)


def _reason(error: OSError, command: str | None) -> str:
    """An error of the system in one line: which file, what is the matter with it, what to do."""
    reason = " ".join((error.strerror or str(error)).split()).removesuffix(".")
    line = f"{reason}." if error.filename is None else f"{error.filename}: {reason}."
    way_out = WAYS_OUT.get(error.errno or 0)
    if way_out is None:
        return line
    return f"{line} {way_out} {GOING_ON if command in GOES_ON else 'Then repeat the command.'}"


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kdcache")
@click.option("-v", "--verbose", is_flag=True, help="Show log lines of the library.")
def main(verbose: bool) -> None:
    """Run a large teacher GNN over atomic structures once, keep its features in a store, and train
    small students from the store.

    \b
    kdcache dump-teacher DATA --teacher RUN -o store.zarr
    kdcache train-student store.zarr -o student --preset painn-small --strategy n2n
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s"
    )
    keep_freed_memory()
