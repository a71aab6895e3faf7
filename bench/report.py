"""Fill README.md and BENCHMARKS.md from the JSON files in bench/results.

Text between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced by what section NAME says of
its JSON; charts are drawn beside it. Nothing changes when it is run twice.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from taskmoe.bench import demo_report, exchange
from taskmoe.bench.console import out
from taskmoe.bench.tables import markdown, paragraph
from taskmoe.wmt.command_line import write_text
from taskmoe.wmt.errors import InputError

FILES = ("README.md", "BENCHMARKS.md")
RESULTS = Path("bench/results")


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


def load(root: Path, name: str, command: str) -> dict[str, Any]:
    """A stored result; InputError that names the command which makes it."""
    path = root / RESULTS / name
    if not path.is_file():
        raise InputError(f"{path} is not there; make it with: {command}")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); make it again with: {command}") from None


def provenance(command: str, facts: dict[str, str]) -> str:
    """Which command made a result, on what, with which versions."""
    return (
        f"`{command}` on {facts['cpu']}, {facts['cores']} cores, {facts['os']}, "
        f"Python {facts['python']}, jax {facts['jax']}, numpy {facts['numpy']}, "
        f"commit {facts['commit']}."
    )


def _demo(root: Path) -> str:
    command = "python -m taskmoe.bench demo --json bench/results/demo.json"
    result = load(root, "demo.json", command)
    demo_report.draw_charts(result, root / RESULTS)
    train = result["training"]
    intro = paragraph(
        f"Measured by {provenance(command, result['machine'])}",
        f"Three models of equal compute per token, {train['steps']} steps each on",
        f"{len(result['corpus']['train'])} directions of the embedded corpus;",
        f"{result['seconds']:.0f} s in all.",
    )
    return f"""{intro}

{markdown(demo_report.HEADINGS, demo_report.claims(result))}

![BLEU by model](bench/results/bleu.png)

![Where the step's time goes](bench/results/step_time.png)

![Tokens per second over batch size](bench/results/throughput.png)

{demo_report.caveat(result)}"""


def _task(root: Path) -> str:
    command = "python -m taskmoe.bench task --json bench/results/task.json"
    result = load(root, "task.json", command)
    rows = [
        (
            r["direction"],
            r["system"],
            f"{r['ms']:.1f}",
            f"{r['ms_p10']:.1f} to {r['ms_p90']:.1f}",
            f"{r['ratio']:.3f} ({r['ratio_p10']:.3f} to {r['ratio_p90']:.3f})",
            str(r["collectives"]),
        )
        for r in result["rows"]
    ]
    headings = ("direction", "system", "ms", "p10 to p90", "ratio to dense", "collectives")
    meaning = paragraph(
        "A batch of one task runs as one dense layer, so routing by task costs what no routing",
        "costs. Backward, the whole layer also fills a gradient for every expert; an extracted",
        "sub-network has no such experts.",
    )
    intro = paragraph(f"Measured by {provenance(command, result['machine'])}")
    return f"{intro}\n\n{markdown(headings, rows)}\n\n{meaning}"


def _exchange(root: Path) -> str:
    parts = []
    for processes in (1, 2):
        name = f"exchange-{processes}.json"
        command = (
            f"python -m taskmoe.bench exchange --processes {processes} --json {RESULTS}/{name}"
        )
        result = load(root, name, command)
        figure = exchange.chart(result)
        figure.savefig(root / RESULTS / f"exchange-{processes}.png", dpi=110)
        plt.close(figure)
        rows = [
            (f"{shape['tokens']:,}", *exchange.cells(r))
            for shape in result["shapes"]
            for r in shape["rows"]
        ]
        headings = ("tokens", *exchange.HEADINGS)
        intro = paragraph(f"Measured by {provenance(command, result['machine'])}")
        picture = f"![Share of time in collectives](bench/results/exchange-{processes}.png)"
        parts.append(f"{intro}\n\n{picture}\n\n{markdown(headings, rows)}")
    meaning = paragraph(
        "One layer, a token a sequence. Moving and waiting are shares of its time in collectives,",
        "by the profiler; devices share this machine's cores, so a device waits while others",
        "compute. Kept is the capacity layer with every part kept instead of sent. A sub-network",
        "exchanges nothing, however many processes there are.",
    )
    return "\n\n".join([*parts, meaning])


def _ops(root: Path) -> str:
    command = "python -m taskmoe.bench ops --quick --json bench/results/ops.json"
    result = load(root, "ops.json", command)
    ceilings = result["ceilings"]
    rows = []
    for r in result["lines"]:
        faster = r.get("ours_times_as_fast")
        rows.append(
            (
                r["op"],
                r["direction"],
                f"{r['tokens']:,}",
                str(r["experts"]),
                r["way"],
                f"{r['median_us']:,.0f}",
                f"{r['p10_us']:,.0f} to {r['p90_us']:,.0f}",
                f"{r['share_of_matmul']:.0%}",
                f"{r['share_of_copy']:.0%}",
                f"{faster['median']:.2f} ({faster['p10']:.2f} to {faster['p90']:.2f})"
                if faster
                else "",
            )
        )
    headings = (
        *("op", "direction", "rows", "experts", "way", "µs", "p10 to p90"),
        *("of matmul", "of copy", "ours is so many times as fast"),
    )
    intro = paragraph(
        f"Measured by {provenance(command, result['machine'])} {result['dtype']}, d_model 512,",
        "d_ff 2048; ways of one op run in turns, after their results were compared. Ceilings",
        f"measured in the same run: {ceilings['flops_per_s'] / 1e9:.0f} GFLOP/s in a large matmul,",
        f"{ceilings['bytes_per_s'] / 1e9:.1f} GB/s in a copy.",
    )
    return f"{intro}\n\n{markdown(headings, rows)}"


def _kernels(root: Path) -> str:
    command = "python -m taskmoe.bench tpu --kernels --quick --json bench/results/kernels.json"
    result = load(root, "kernels.json", command)
    rows = []
    for r in result["kernels"]:
        parts = r.get("kernels") or []
        main = max(parts, key=lambda k: k["bundles"]) if parts else None
        rows.append(
            (
                r["op"],
                r["by"],
                r["direction"],
                r["chip"],
                r["dtype"],
                f"{r['compile_s']:.1f}" if "compile_s" in r else r.get("error", ""),
                f"{main['main_bundles']:,}" if main else "",
                f"{main['filled'].get('MXU', 0):.0%}" if main else "",
                str(main["spills"]) if main else "",
                f"{main['vmem_bytes'] / 2**20:.1f}" if main and main["vmem_bytes"] else "",
                f"{r['modelled_us']:.0f}" if r.get("modelled_us") else "",
                f"{r['roofline_us']:.0f}" if r.get("roofline_us") else "",
            )
        )
    headings = (
        *("op", "by", "direction", "chip", "dtype", "compiled in s", "bundles of main loop"),
        *("MXU slots filled", "spills", "VMEM MiB", "modelled µs", "roofline µs"),
    )
    moved = [
        (r["chip"], str(r["rows"]), r["way"], f"{r['moved_bytes']:,}", f"{r['ratio']:.3f}")
        for r in result["expert_bytes"]
    ]
    intro = paragraph(
        "Modelled: compiled for TPUs that were not there, by",
        provenance(command, result["machine"]),
        "Schedules are the compiler's; bytes and times are modelled, nothing here is a clock.",
    )
    second = paragraph(
        "Bytes that an expert's network moves at decoding sizes (32 experts, d_model 512, d_ff",
        "2048, bf16), counted from the grid walk, against the floor: touched weights once, rows in",
        "and out.",
    )
    table = markdown(("chip", "rows", "way", "bytes moved", "times the floor"), moved)
    return f"{intro}\n\n{markdown(headings, rows)}\n\n{second}\n\n{table}"


SECTIONS: dict[str, Callable[[Path], str]] = {
    "demo": _demo,
    "task": _task,
    "exchange": _exchange,
    "ops": _ops,
    "kernels": _kernels,
}
