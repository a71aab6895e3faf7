"""Imports run down the floors bench, wmt, cli, moe, kernels; none reach JAX's private parts."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("kernels", "moe", "cli", "wmt", "bench")  # from the ground up
FILES = [
    path.relative_to(ROOT)
    for folder in (*FLOORS, "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def imported(source: str) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names)


def forbidden(folder: str, source: str) -> list[str]:
    """Imports that a file of a folder must not have."""
    found = []
    for name in imported(source):
        parts = name.split(".")
        upward = FLOORS[FLOORS.index(folder) + 1 :] if folder in FLOORS else ()
        wrong_floor = parts[0] == "taskmoe" and parts[1:] and parts[1] in (*upward, "tests")
        if folder == "tests":
            wrong_floor = False
        private = parts[0] in ("jax", "jaxlib") and "_src" in parts
        if wrong_floor or private or parts[0] in ("", *FLOORS):
            found.append(name)
    return found


def module(path: Path) -> str:
    """Full name of the module that a file is."""
    parts = path.with_suffix("").parts
    return ".".join(("taskmoe", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def circle(sources: dict[str, str]) -> list[str] | None:
    """Modules that import one another in a circle, wherever the imports stand; None if none do."""
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        found = set()
        for target in imported(source):
            while target and target not in sources:  # what is imported may be no module
                target = target.rpartition(".")[0]
            found.add(target)
        graph[name] = found - {"", name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return None


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert circle({module(path): (ROOT / path).read_text("utf-8") for path in FILES}) is None


def test_a_circle_is_noticed_inside_functions_too() -> None:
    one = "def f():\n    from taskmoe.wmt import two"
    sources = {"taskmoe.wmt.one": one, "taskmoe.wmt.two": "from taskmoe.wmt.one import f"}
    assert circle(sources) == ["taskmoe.wmt.one", "taskmoe.wmt.two", "taskmoe.wmt.one"]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_what_lies_below(path: Path) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    assert forbidden(path.parts[0], source) == []


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("kernels", "import taskmoe.moe"),
        ("kernels", "from taskmoe import wmt"),
        ("moe", "from taskmoe.wmt.config import ModelConfig"),
        ("wmt", "def f():\n    from taskmoe.bench import demo"),
        ("wmt", "from taskmoe.tests.wmt import support"),
        ("bench", "from . import demo"),
        ("bench", "import wmt"),
        ("moe", "from jax._src import core"),
        ("tests", "import jax._src.core"),
        ("tests", "from jax import _src"),
    ],
)
def test_a_forbidden_import_is_noticed(folder: str, line: str) -> None:
    assert forbidden(folder, line)


def test_ordinary_imports_are_not() -> None:
    lines = "import jax\nfrom taskmoe.kernels import gmm\nfrom taskmoe import moe\nimport numpy"
    assert forbidden("wmt", lines) == []


def test_all_floors_were_looked_at() -> None:
    assert {path.parts[0] for path in FILES} == {*FLOORS, "tests"}
