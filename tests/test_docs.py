"""What the documentation shows is what runs.  `make docs` checks its links."""

import re
from pathlib import Path
from typing import Any

import pytest

from taskmoe import kernels

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: str(p.relative_to(DOCS))
)
def test_examples_of_a_page_run_one_after_the_other(page: Path) -> None:
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def test_every_command_is_known() -> None:
    from taskmoe.bench.__main__ import COMMANDS as bench
    from taskmoe.wmt.__main__ import COMMANDS as wmt

    found = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for package, command in re.findall(r"python -m taskmoe\.(\w+) (\w+)", text):
            assert command in {"wmt": wmt, "bench": bench}[package], f"{page}: {command}"
            found += 1
    assert found > 10


def test_every_target_of_make_is_known() -> None:
    makefile = (DOCS.parent / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for line in "".join(blocks(page, "sh")).splitlines():
            if found := re.match(r"make (\S+)", line):
                assert f"\n{found[1]}:" in makefile, f"{page}: make {found[1]}"


def test_every_op_has_a_page() -> None:
    ops = {name for name in kernels.__all__ if name.islower()} - {"for_chip", "dequantize"}
    assert {page.stem for page in (DOCS / "ops").glob("*.md")} == {*ops, "index", "routers"}
