"""Results as JSON and PNG: keeping them, reading bench/results, saying where each comes from."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from taskmoe.cli.command_line import write_bytes, write_text
from taskmoe.cli.errors import InputError

matplotlib.use("Agg")  # charts go to files; a machine without a screen has no other way

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


def keep(
    result: dict[str, Any], chart: Callable[[dict[str, Any]], Figure], a: argparse.Namespace
) -> None:
    """Write a result to a.json and its chart to a.png, where these name files."""
    if a.json is not None:
        write_text(a.json, json.dumps(result, indent=1) + "\n")
    if a.png is not None:
        save_figure(chart(result), a.png)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG beside its place, rename it there, and let go of it."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    plt.close(figure)
    write_bytes(path, png.getvalue())


def provenance(command: str, facts: dict[str, str], *, compiled: bool = False) -> str:
    """Which command made a result, on what, with which versions; compiled: by libtpu."""
    names = ("jax", "libtpu", "numpy") if compiled else ("jax", "numpy")
    libraries = ", ".join(f"{name} {facts[name]}" for name in names if name in facts)
    return (
        f"`{command}` on {facts['cpu']}, {facts['cores']} cores, {facts['os']}, "
        f"Python {facts['python']}, {libraries}, commit {facts['commit']}."
    )
