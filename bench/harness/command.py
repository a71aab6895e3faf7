"""How every benchmark runs: options to a specification, to a result, to a view, to the terminal."""

from __future__ import annotations

import argparse
import importlib
import json

from taskmoe.bench.harness.console import out
from taskmoe.bench.harness.view import View, draw, page, save_figure, show, whole
from taskmoe.cli.command_line import write_text


def run(package: str, a: argparse.Namespace) -> int:
    """Measure what the options ask for, keep it as a.json and a.png name, and print it."""
    spec = importlib.import_module(f"{package}.spec").read(a)
    package = getattr(spec, "package", package)  # of several questions, the one that is asked
    result = importlib.import_module(f"{package}.measure").measure(spec)
    told = json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n"
    if a.json is not None:
        write_text(a.json, told)
    view = importlib.import_module(f"{package}.view").view(result)
    if getattr(a, "png", None) is not None:
        save_figure(view.charts[0].draw(), a.png)
    folder = getattr(a, "out", None)
    if folder is None:
        show(view, out)
    else:  # everything is in the report there, and the terminal has the short of it
        question = str(importlib.import_module(package).__doc__).splitlines()[0]
        write_text(folder / f"{a.command}.json", told)
        write_text(folder / "report.md", f"# {question}\n\n{whole(view, '.')}\n")
        write_text(folder / "report.html", page(view, question))
        draw(view, folder)
        show(View(view.answer, "", [view.short or view.tables[0]]), out)
        out.print(f"The report is {folder / 'report.html'}, and report.md beside it.")
    return int(view.code)
