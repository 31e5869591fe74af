"""The order of the parts: who may import whom, read off the source.

`LAYERS` is the one list. A module imports from layers above its own line only, so nothing walks
back and no two parts know each other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (
    ("errors", "fields", "progress", "allocator", "processors"),
    ("structures", "devices", "pickles", "origins", "taps", "cluster"),
    ("graphs", "matching", "config", "registry", "store", "references", "splits", "logbook"),
    ("readers", "models", "distill", "spool", "selection", "distributed", "sharing"),
    ("checkpoint", "stream", "ingest", "optim"),
    ("teachers", "evaluate", "student", "mixing", "interchange", "card"),
    ("validation",),
    ("dump", "train", "ase_calculator", "compare", "fit_scales", "audit"),
    ("demo", "testing", "augment", "sweep"),
    ("kdcache_cli",),
)
LAYER_OF = {part: k for k, parts in enumerate(LAYERS) for part in parts}

WITHOUT_TORCH = (
    "kdcache",
    "kdcache.store",
    "kdcache.fields",
    "kdcache.structures",
    "kdcache.graphs",
    "kdcache.matching",
    "kdcache.config",
    "kdcache.readers",
    "kdcache.readers.lmdb",
    "kdcache.sharing",
    "kdcache.references",
    "kdcache.ingest",
    "kdcache.interchange",
    "kdcache.card",
    "kdcache_cli.main",
)


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for base, package in ((ROOT, "kdcache"), (ROOT / "cli", "kdcache_cli")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def part_of(module: str) -> str:
    """The entry of `LAYERS` a module belongs to; "kdcache" for the root itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "kdcache" and len(parts) > 1 else parts[0]


def imported(tree: ast.AST, *, at_import: bool = False) -> Iterator[str]:
    """Names a module imports, `from a import b` as a.b; `at_import` leaves out later ones."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (at_import and runs_later(node)):
            yield from imported(node, at_import=at_import)


def runs_later(node: ast.AST) -> bool:
    """What importing a module does not run: its functions, and imports for types only."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def ours(name: str) -> str | None:
    """The module of ours that an imported name comes from."""
    while name:
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


def upward(module: str, tree: ast.AST) -> list[str]:
    """Imports of a module that do not come from a lower layer."""
    me = part_of(module)
    wrong = []
    for name in imported(tree):
        source = ours(name)
        if source is None or part_of(source) == me or source == "kdcache":
            continue
        if LAYER_OF[part_of(source)] >= LAYER_OF[me]:
            wrong.append(f"{module} imports {name}")
    return wrong


def printing(module: str, tree: ast.AST) -> list[str]:
    """What only a command line may do."""
    wrong = [
        f"{module} imports {name}"
        for name in imported(tree)
        if name.split(".")[0] in ("click", "tqdm", "kdcache_cli")
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.exit", "exit"):
            wrong.append(f"{module}:{node.lineno} calls {ast.unparse(node.func)}")
    return wrong


def test_every_part_has_its_layer() -> None:
    assert {part_of(module) for module in MODULES} - {"kdcache"} == set(LAYER_OF)


@pytest.mark.parametrize("part", LAYER_OF)
def test_imports_come_from_lower_layers(part: str) -> None:
    mine = [module for module in MODULES if part_of(module) == part]
    assert not [w for m in mine for w in upward(m, ast.parse(MODULES[m].read_text()))]


def test_the_check_sees_an_import_that_runs_up() -> None:
    inside = ast.parse("def f():\n    from kdcache.train import train_student")
    assert upward("kdcache.store.layout", inside)
    assert upward("kdcache.store.layout", ast.parse("import kdcache.readers.npz"))
    assert not upward("kdcache.readers.npz", ast.parse("import kdcache.store"))


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {}
    for module, path in MODULES.items():
        names = imported(ast.parse(path.read_text()), at_import=True)
        graph[module] = {source for name in names if (source := ours(name))} - {module}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_library_never_prints_nor_exits() -> None:
    library = [module for module in MODULES if module.startswith("kdcache.")]
    assert not [w for m in library for w in printing(m, ast.parse(MODULES[m].read_text()))]


@pytest.mark.parametrize("source", ["print(1)", "import sys\nsys.exit(2)", "from tqdm import tqdm"])
def test_the_check_sees_what_only_a_command_line_may_do(source: str) -> None:
    assert printing("kdcache.dump", ast.parse(source))


def test_reading_and_verifying_need_no_torch() -> None:
    lines = [f"import {name}" for name in WITHOUT_TORCH]
    program = "\n".join([*lines, "import sys", "sys.exit('torch' in sys.modules)"])
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
