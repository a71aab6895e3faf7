"""Expert-parallel exchange against task-routed: time, share in communication, bytes.

One Mixture-of-Experts layer, decoding-sized (a token a sequence), and a whole decoding step, on N
host devices, in one process or in several over loopback: each strategy of `taskmoe.moe`, the same
with every part kept instead of sent, and a task's extracted sub-network on every device. Results
are checked against one device before anything is timed. Shares come from the profiler, and from
what the program takes less when it keeps what it would send.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.table import Table

from taskmoe.bench.harness.console import out
from taskmoe.bench.harness.results import keep
from taskmoe.bench.harness.worker import Died, Worker
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar

#: A process that hears nothing from another for so long ends with an error.
HEARTBEAT_S = 10


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--devices", type=int, default=8, help="host devices in all")
    p.add_argument("--processes", type=int, default=1, help="processes that share the devices")
    p.add_argument("--batches", default="64,512,4096", help="tokens in all, each a multiple of N")
    p.add_argument("--step-batches", default="64,512", help="sequences of a whole decoding step")
    p.add_argument("--experts", default="32", help="experts, each a multiple of N")
    p.add_argument("--d-model", default="256", help="widths; hidden width is four times as much")
    p.add_argument("--rounds", type=int, default=9, help="times that each is measured")
    p.add_argument("--quick", action="store_true", help="one small batch, three rounds")
    p.add_argument("--json", type=Path, help="write the results here")
    p.add_argument("--png", type=Path, help="draw shares in communication here")


def run(a: argparse.Namespace) -> int:
    """Measure and print; 0, or 1 where a strategy disagrees with one device."""
    spec = _spec(a)
    result = measure(spec)
    keep(result, chart, a)
    for shape in result["shapes"]:
        out.print(_table(result, shape))
        out.print(f"{_verdict(shape)}\n")
    for step in result["steps"]:
        out.print(_step_table(result, step))
    out.print(*findings(result), sep="\n", soft_wrap=True)
    wrong = [r for s in result["shapes"] + result["steps"] for r in s["rows"] if not r["agrees"]]
    for row in wrong:
        out.print(f"{row['system']} differs from one device by {row['error']:.2g}: not timed")
    return 1 if wrong else 0


def _spec(a: argparse.Namespace) -> dict[str, Any]:
    if a.devices < 1 or a.processes < 1 or a.devices % a.processes:
        raise InputError(
            f"--processes must divide --devices, got {a.processes} and {a.devices} "
            "(both at least 1)"
        )
    if a.devices > 64:
        raise InputError(f"--devices must be at most 64 on one host, got {a.devices}")
    if a.rounds < 1:
        raise InputError(f"--rounds must be at least 1, got {a.rounds}")
    sizes = {}
    for name in ("batches", "step_batches", "experts", "d_model"):
        text = getattr(a, name)
        try:
            sizes[name] = [int(n) for n in text.split(",")]
        except ValueError:
            raise InputError(f"--{name.replace('_', '-')} must be numbers like 64,512") from None
        by = 8 if name == "d_model" else a.devices  # four heads of an even width
        if bad := [n for n in sizes[name] if n < by or n % by]:
            raise InputError(f"--{name.replace('_', '-')} must be multiples of {by}, got {bad[0]}")
    if a.quick:
        sizes = {name: every[:1] for name, every in sizes.items()}
    return {
        "devices": a.devices,
        "processes": a.processes,
        "rounds": 3 if a.quick else a.rounds,
        **sizes,
    }


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the worker processes of a specification and return what the first one found.

    Raises InputError where a process dies; the others are given time to notice and then ended.
    """
    sizes = len(spec["experts"]) * len(spec["d_model"])
    shapes = sizes * (len(spec["batches"]) + len(spec["step_batches"]))
    asked = spec | {"port": _free_port(), "heartbeat": HEARTBEAT_S}
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(Worker("taskmoe.bench.exchange.worker"))
            for _ in range(spec["processes"])
        ]
        for number, worker in enumerate(workers):
            worker.say(asked | {"process": number})
        progress = stack.enter_context(bar("exchange", "shapes"))
        progress(0, shapes)
        with contextlib.suppress(Died):  # who died first is told below
            while "machine" not in found:
                found = workers[0].hear()
                progress(found.get("done", shapes), shapes)
        _all_ended(workers)
    return found | {"spec": spec}


def _all_ended(workers: Sequence[Worker]) -> None:
    """Wait until all processes have ended; InputError that names the one to blame where one died.

    A killed process has a negative code; those that notice it end by themselves.
    """
    for worker in workers:  # before any is waited for: they end together
        worker.finish()
    codes = []
    for number, worker in enumerate(workers):
        try:
            codes.append(worker.end(4 * HEARTBEAT_S))
        except subprocess.TimeoutExpired:
            seconds = 4 * HEARTBEAT_S
            raise InputError(f"process {number} did not end within {seconds} s") from None
    if any(codes):
        first = min(range(len(codes)), key=lambda i: (codes[i] >= 0, codes[i] == 0))
        raise InputError(f"process {first} of {len(codes)} {workers[first].death()}")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


HEADINGS = (
    *("system", "µs", "p10 to p90", "moving", "waiting", "by copy", "alone µs", "collectives"),
    *("bytes sent", "error"),
)
STEP_HEADINGS = (*HEADINGS[:6], "collectives", "error")


def cells(r: dict[str, Any], headings: tuple[str, ...] = HEADINGS) -> tuple[str, ...]:
    """A row of results as words under `HEADINGS` or `STEP_HEADINGS`."""
    if not r["agrees"]:
        return (r["system"], *["-"] * (len(headings) - 2), f"{r['error']:.1e}")
    words = {
        "system": r["system"],
        "µs": f"{r['us']:,.0f}",
        "p10 to p90": f"{r['us_p10']:,.0f} to {r['us_p90']:,.0f}",
        "moving": f"{r['transfer_share']:.1%}",
        "waiting": f"{r['waiting_share']:.1%}",
        "by copy": f"{r['copy_share']:.1%}" if "copy_share" in r else "",
        "alone µs": f"{r['alone_us']:,.0f}" if "alone_us" in r else "",
        "collectives": ", ".join(f"{n} {kind}" for kind, n in r["collectives"].items()) or "0",
        "bytes sent": f"{r.get('bytes_sent', 0):,.0f}",
        "error": "by design" if r["error"] is None else f"{r['error']:.1e}",
    }
    return tuple(words[heading] for heading in headings)


def devices_words(spec: dict[str, Any]) -> str:
    """How many devices in how many processes."""
    processes = spec["processes"]
    return f"{spec['devices']} devices in {processes} process{'es' if processes > 1 else ''}"


def _step_table(result: dict[str, Any], step: dict[str, Any]) -> Table:
    spec = result["spec"]
    table = Table(
        *STEP_HEADINGS,
        title=f"Decoding step of {step['batch']} sequences, {step['experts']} experts, d_model "
        f"{step['d_model']}, {devices_words(spec)} (measured)",
    )
    for r in step["rows"]:
        table.add_row(*cells(r, STEP_HEADINGS))
    return table


#: Points by which two ways to tell a share may differ and still agree.
AGREE = 0.05


def findings(result: dict[str, Any]) -> list[str]:
    """How the profiler's shares and those by copy agree, and where not, why; sub-networks' zero."""
    measured = [*result["shapes"], *result["steps"]]
    rows = [r for m in measured for r in m["rows"] if r["agrees"]]
    both = [r for r in rows if "copy_share" in r]
    lines = []
    if both:
        apart = [r["transfer_share"] + r["waiting_share"] - r["copy_share"] for r in both]
        near = sum(abs(d) <= AGREE for d in apart)
        lines.append(
            f"Shares of the exchange by the profiler and by copy lie within {AGREE * 100:.0f} "
            f"points in {near} of {len(both)} cases; the profiler's is "
            f"{100 * min(apart):+.0f} to {100 * max(apart):+.0f} points from the other."
        )
        if max(apart) > AGREE:
            lines.append(_why_more(result, both))
        if min(apart) < -AGREE:
            lines.append(WHY_LESS)
    subs = [r for r in rows if not r["collectives"] and r["error"] is not None]
    if subs:
        most = max(r["transfer_share"] + r["waiting_share"] for r in subs)
        lines.append(f"Sub-networks: 0 collectives, {most:.1%} of their time in communication.")
    return lines


#: Why leaving the exchange out may save more than its collectives take.
WHY_LESS = (
    "Where the share by copy is the larger: leaving the exchange out also leaves out cutting rows "
    "into a part for each device and laying parts together again, which XLA's CPU code does around "
    "a collective and the profiler books as ordinary instructions (alone has them too)."
)


def _why_more(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Why a device's time in collectives may be more than leaving them out saves."""
    devices, cores = result["spec"]["devices"], int(result["machine"]["cores"])
    if devices <= cores:
        return (
            "Where the profiler's share is the larger: each device has a core of its own, but not "
            "to itself; what else the machine runs holds up one device, and others wait for it."
        )
    moving = [r["transfer_share"] - r["copy_share"] for r in rows]
    return (
        f"Where the profiler's share is the larger: {devices} devices share {cores} cores; while "
        "one computes, others stand in a collective, which is their time in communication but "
        "nobody's work, and leaving the exchange out does not save it. What the profiler calls "
        f"moving, after the last device has arrived, is {100 * min(moving):+.0f} to "
        f"{100 * max(moving):+.0f} points from the share by copy."
    )


def _table(result: dict[str, Any], shape: dict[str, Any]) -> Table:
    spec = result["spec"]
    table = Table(
        *HEADINGS,
        title=f"{shape['tokens']} tokens, {shape['experts']} experts, d_model {shape['d_model']}, "
        f"{devices_words(spec)} (measured)",
    )
    for r in shape["rows"]:
        table.add_row(*cells(r))
    return table


def _verdict(shape: dict[str, Any]) -> str:
    """What "auto" would take, what was fastest, and where the sub-network stands."""
    good = [r for r in shape["rows"] if r["agrees"] and r["error"] is not None]
    travelling = [r for r in good if r["bytes_sent"]]
    if not travelling:
        return "nothing was timed"
    fastest = min(travelling, key=lambda r: r["us"])
    dropless = [r for r in travelling if "dropless" in r["system"]]
    fewest = min(dropless, key=lambda r: r["bytes_sent"])["system"]
    said = f"fewest bytes, dropless (auto): {fewest}; fastest here: {fastest['system']}"
    alone = [r["us"] / fastest["us"] for r in good if not r["bytes_sent"]]
    return said + (f"; the sub-network takes {alone[0]:.2f} of its time" if alone else "")


def chart(result: dict[str, Any]) -> Any:
    """Share of a layer's time in collectives over tokens, a line a system."""
    shapes = result["shapes"]
    first = shapes[0]["experts"], shapes[0]["d_model"]
    shapes = [s for s in shapes if (s["experts"], s["d_model"]) == first]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for system in [r["system"] for r in shapes[0]["rows"] if r["agrees"]]:
        rows = [r for s in shapes for r in s["rows"] if r["system"] == system]
        tokens = [s["tokens"] for s in shapes]
        share = [100 * (r["transfer_share"] + r["waiting_share"]) for r in rows]
        left.plot(tokens, share, "o-", label=system)
        right.plot(tokens, [r["us"] for r in rows], "o-", label=system)
    left.set_ylabel("% of the layer's time in collectives")
    right.set_ylabel("µs a layer (median)")
    right.set_yscale("log")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens, all devices")
        axis.spines[["top", "right"]].set_visible(False)
    left.set_ylim(bottom=-2)
    right.legend(frameon=False, fontsize=8)
    spec = result["spec"]
    figure.suptitle(f"{first[0]} experts, d_model {first[1]}, {devices_words(spec)}")
    return figure


def share_chart(results: list[dict[str, Any]]) -> Any:
    """Shares of the exchange by devices, the ways to tell them side by side, at one batch."""
    batches = [{m["batch"] for m in result["steps"]} for result in results]
    batch = max(set.intersection(*batches))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axis, (name, title) in zip(
        axes,
        (
            ("all_to_all, dropless", "all_to_all, dropless"),
            ("all_to_all, capacity 1.25", "capacity 1.25"),
        ),
        strict=True,
    ):
        for place, result in enumerate(results):
            step = next(m for m in result["steps"] if m["batch"] == batch)
            row = next(r for r in step["rows"] if r["system"] == name)
            first = place == 0 and axis is axes[0]
            moving, waiting = 100 * row["transfer_share"], 100 * row["waiting_share"]
            for at, height, bottom, colour, label in (
                (place - 0.2, moving, 0, "#4c72b0", "moving, by the profiler"),
                (place - 0.2, waiting, moving, "#a6bddb", "waiting, by the profiler"),
                (place + 0.2, 100 * row["copy_share"], 0, "#dd8452", "saved when parts are kept"),
            ):
                axis.bar(at, height, 0.36, bottom, color=colour, label=label if first else None)
        axis.set_xticks(range(len(results)), [devices_words(r["spec"]) for r in results])
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"% of a decoding step of {batch} sequences")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)  # fmt: skip
    return figure
