"""What commands say while they work: standard output, and a bar on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console

from taskmoe.cli.progress import bar

T = TypeVar("T")

#: As wide as the terminal, or 180 columns where there is none.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 180)


def each(title: str, unit: str, items: Sequence[T], *, enabled: bool = True) -> Iterator[T]:
    """The items in turn, with a bar of how many are done."""
    with bar(title, unit, enabled=enabled) as move:
        for done, item in enumerate(items):
            move(done, len(items))
            yield item
        move(len(items), len(items))
