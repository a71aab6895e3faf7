"""How every benchmark runs: options to a specification, to a result, to a view, to the terminal."""

from __future__ import annotations

import argparse
import importlib
import json

from taskmoe.bench.harness.console import out
from taskmoe.bench.harness.view import save_figure, show
from taskmoe.cli.command_line import write_text


def run(package: str, a: argparse.Namespace) -> int:
    """Measure what the options ask for, keep it as a.json and a.png name, and print it."""
    spec = importlib.import_module(f"{package}.spec").read(a)
    result = importlib.import_module(f"{package}.measure").measure(spec)
    if a.json is not None:
        write_text(a.json, json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n")
    view = importlib.import_module(f"{package}.view").view(result)
    if getattr(a, "png", None) is not None:
        save_figure(view.charts[0].draw(), a.png)
    show(view, out)
    return int(view.code)
