"""Fill README.md and BENCHMARKS.md from the JSON files in bench/results.

Text between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced by what section NAME says of
its JSON; charts are drawn beside it. Nothing changes when it is run twice.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from taskmoe.bench.harness.console import out
from taskmoe.bench.report_sections import SECTIONS
from taskmoe.cli.command_line import write_text
from taskmoe.cli.errors import InputError

FILES = ("README.md", "BENCHMARKS.md")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--root", type=Path, default=Path(), help="the project's folder (default: here)")
    p.add_argument("--json", type=Path, help="write what was filled in where here")


def run(a: argparse.Namespace) -> int:
    """Fill in every section of both files."""
    done: dict[str, list[str]] = {}
    for name in FILES:
        path = a.root / name
        if not path.is_file():
            raise InputError(f"{path} is not there; --root names the project's folder")
        text, sections = fill(path.read_text(encoding="utf-8"), a.root)
        write_text(path, text)
        done[name] = sections
        out.print(f"{path}: {', '.join(sections) or 'no section'}")
    if a.json is not None:
        write_text(a.json, json.dumps(done, indent=1) + "\n")
    return 0


def fill(text: str, root: Path) -> tuple[str, list[str]]:
    """The text with its sections filled in, and their names.

    Raises InputError for a section that is unknown, not closed, or whose JSON is missing.
    """
    found: list[str] = []

    def one(match: re.Match[str]) -> str:
        name = match[1]
        if name not in SECTIONS:
            raise InputError(f"section {name!r} is unknown; there are {', '.join(SECTIONS)}")
        found.append(name)
        return f"<!-- begin {name} -->\n{SECTIONS[name](root)}\n<!-- end {name} -->"

    opened = re.findall(r"<!-- begin ([\w-]+) -->", text)
    text = re.sub(r"<!-- begin ([\w-]+) -->\n.*?<!-- end \1 -->", one, text, flags=re.DOTALL)
    if missing := set(opened) - set(found):
        raise InputError(f"section {missing.pop()!r} has no <!-- end ... -->")
    return text, found
