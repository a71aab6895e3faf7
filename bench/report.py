"""Fill README.md and BENCHMARKS.md from the JSON files in bench/results.

Text between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced by the answer, chart and
short table of benchmark NAME; charts, and every row in NAME.md, are written beside its JSON.
Nothing changes when it is run twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from taskmoe.bench.harness.console import out
from taskmoe.bench.harness.results import RESULTS, load
from taskmoe.bench.harness.view import View, brief, draw, markdown, paragraph, whole
from taskmoe.cli.command_line import write_text
from taskmoe.cli.errors import InputError

FILES = ("README.md", "BENCHMARKS.md")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's code lies, and name of a stored result -> what it was made with."""

    package: str
    results: dict[str, str]

    @property
    def question(self) -> str:
        """The first line of the package's docstring."""
        return str(importlib.import_module(f"taskmoe.bench.{self.package}").__doc__).splitlines()[0]


_STUDY = "study work/study-multi30k --data work/study-multi30k/data"
_LONG = (
    "study work/study-long --data work/study-long/data --systems dense,token,target,pruned,reaped"
)
_SHORTER = (
    "study work/study-15000 --data work/study-15000/data"
    " --systems narrow,dense,token,target,static,pruned,reaped"
)
_LARGE = (
    "study work/study-large --data work/study-large/data"
    " --systems narrow,dense,token,target,token-target,static --quick"
)
_SIZES = (
    "tpu --kernels --chips v5e,v6e,tpu7x --dtypes bf16"
    " --ops top_k_gating,dispatch,combine,gmm,tgmm,expert_ffn_gated,moe_layer --shapes "
)
BENCHMARKS = {
    "demo": Benchmark("story.demo", {"demo": "demo"}),
    "study": Benchmark("story.study", {"study-multi30k": _STUDY}),
    "study-long": Benchmark(
        "story.study", {"study-multi30k-long": _LONG, "study-multi30k-15000": _SHORTER}
    ),
    "study-large": Benchmark("story.study", {"study-multi30k-large": _LARGE}),
    "ablation": Benchmark(
        "story.ablation",
        {
            "ablation": "ablation",
            "ablation-multi30k": (
                "ablation --changes dense,token,dense-seed,token-seed,dense-warm-up,warm-up"
                " --steps 5000 --data work/study-multi30k/set"
            ),
        },
    ),
    "decode": Benchmark("serving.decode", {"decode": "decode"}),
    "beam": Benchmark("serving.beam", {"beam": "beam --batches 1,4,16,64 --rounds 5"}),
    "serve": Benchmark(
        "serving.serve",
        {
            "serve": "serve",
            "serve-words": "serve --words 2000",
            "serve-text": "serve --model work/sub-de --text demo-report/work/corpus/test.en-de.en",
        },
    ),
    "exchange": Benchmark(
        "exchange",
        {
            "exchange-own": "exchange --devices 2 --batches 512 --step-batches 512",
            "exchange-1": "exchange --processes 1",
            "exchange-2": "exchange --processes 2",
        },
    ),
    "task": Benchmark("serving.task", {"task": "task"}),
    "training": Benchmark("training", {"training": "training --sizes demo,tiny,small,base"}),
    "text": Benchmark("text", {"text": "text --pairs 2000000"}),
    "ops": Benchmark("ops", {"ops": "ops --quick"}),
    "ops-gpu": Benchmark(
        "ops", {"ops-gpu": "ops --quick --ops gmm,expert_ffn,moe_layer --shapes decode,qwen3,wmt"}
    ),
    "kernels": Benchmark(
        "tpu.kernels",
        {
            "kernels": "tpu --kernels --quick",
            "kernels-models": _SIZES + "mixtral,qwen3,deepseek-v3,gpt-oss,olmoe,nllb",
            "kernels-small": _SIZES + "decode,awkward",
        },
    ),
    "published": Benchmark("tpu.published", {"published": "tpu --published"}),
    "model": Benchmark("tpu.model", {"tpu-model": "tpu --model wmt"}),
}


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
    sections = Sections(root).all()

    def one(match: re.Match[str]) -> str:
        name = match[1]
        if name not in sections:
            raise InputError(f"section {name!r} is unknown; there are {', '.join(sections)}")
        found.append(name)
        return f"<!-- begin {name} -->\n{sections[name]()}\n<!-- end {name} -->"

    opened = re.findall(r"<!-- begin ([\w-]+) -->", text)
    text = re.sub(r"<!-- begin ([\w-]+) -->\n.*?<!-- end \1 -->", one, text, flags=re.DOTALL)
    if missing := set(opened) - set(found):
        raise InputError(f"section {missing.pop()!r} has no <!-- end ... -->")
    return text, found


@dataclasses.dataclass(frozen=True)
class Sections:
    """What the sections say, from the results under a root."""

    root: Path

    def all(self) -> dict[str, Callable[[], str]]:
        """Name of a section -> what makes its text."""
        own = {name: functools.partial(self.benchmark, name) for name in BENCHMARKS}
        return {"overview": self.overview, "provenance": self.provenance, **own}

    def benchmark(self, name: str) -> str:
        """Answer, chart and short table; every row goes to a file, charts beside it."""
        results, view = self._results(name), self._view(name)
        folder, benchmark = self.root / RESULTS, BENCHMARKS[name]
        draw(view, folder)
        made = [f"- `{_command(stem)}`: {_where(r.machine)}" for stem, r in results.items()]
        parts = f"# {benchmark.question}", whole(view, "."), "Made by", "\n".join(made)
        write_text(folder / f"{name}.md", "\n\n".join(parts) + "\n")
        rows = f"[Every row]({RESULTS}/{name}.md), by `{_command(next(iter(results)))}`."
        return f"{brief(view, str(RESULTS))}\n\n{paragraph(rows)}"

    def overview(self) -> str:
        """Question, answer and command of every benchmark."""
        rows = [
            (
                f"[{benchmark.question}](#{name})",
                self._view(name).answer,
                f"`{next(iter(benchmark.results.values())).split()[0]}`",
            )
            for name, benchmark in BENCHMARKS.items()
        ]
        return markdown(("question", "answer", "`python -m taskmoe.bench` ..."), rows)

    def provenance(self) -> str:
        """Machine, versions and commit of every stored result."""
        places: dict[str, list[str]] = {}
        for name in BENCHMARKS:
            for stem, result in self._results(name).items():
                made = f"{stem} at {result.machine['commit']}"
                places.setdefault(_where(result.machine), []).append(made)
        rows = [(place, ", ".join(made)) for place, made in places.items()]
        return markdown(("made on", "result at commit"), rows)

    def _view(self, name: str) -> View:
        module = importlib.import_module(f"taskmoe.bench.{BENCHMARKS[name].package}.view")
        found: View = module.view(*self._results(name).values())
        return found

    def _results(self, name: str) -> dict[str, Any]:
        """Stem of the JSON file -> result, of the type that the benchmark's measure returns."""
        benchmark = BENCHMARKS[name]
        measure = importlib.import_module(f"taskmoe.bench.{benchmark.package}.measure").measure
        kind = typing.get_type_hints(measure)["return"]
        return {
            stem: load(kind, self.root / RESULTS / f"{stem}.json", _command(stem))
            for stem in benchmark.results
        }


def _command(stem: str) -> str:
    words = next(b.results[stem] for b in BENCHMARKS.values() if stem in b.results)
    return f"python -m taskmoe.bench {words} --json {RESULTS}/{stem}.json"


def _where(facts: dict[str, str]) -> str:
    """The machine and the versions, in words."""
    names = ("jax", "libtpu", "numpy", "nvidia-cudnn-cu13", "torch", "tokamax", "ctranslate2")
    libraries = ", ".join(f"{name} {facts[name]}" for name in names if name in facts)
    gpu = f"{facts['gpu']} (driver {facts['driver']}), " if "gpu" in facts else ""
    return f"{gpu}{facts['cpu']}, {facts['cores']} cores, Python {facts['python']}, {libraries}"
