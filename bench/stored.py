"""Results that are kept in bench/results: reading them, and saying where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from taskmoe.wmt.errors import InputError

RESULTS = Path("bench/results")


def load(root: Path, name: str, command: str) -> dict[str, Any]:
    """A stored result; InputError that names the command which makes it."""
    path = root / RESULTS / name
    if not path.is_file():
        raise InputError(f"{path} is not there; make it with: {command}")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); make it again with: {command}") from None


def provenance(command: str, facts: dict[str, str], *, compiled: bool = False) -> str:
    """Which command made a result, on what, with which versions; compiled: by libtpu."""
    names = ("jax", "libtpu", "numpy") if compiled else ("jax", "numpy")
    libraries = ", ".join(f"{name} {facts[name]}" for name in names if name in facts)
    return (
        f"`{command}` on {facts['cpu']}, {facts['cores']} cores, {facts['os']}, "
        f"Python {facts['python']}, {libraries}, commit {facts['commit']}."
    )
