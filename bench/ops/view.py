"""Speeds of ops beside their baselines: the table, and the speedup of each op in a sentence."""

from __future__ import annotations

import math

from taskmoe.bench.harness.view import Columns, Table, View
from taskmoe.bench.ops.cases import OURS
from taskmoe.bench.ops.measure import Line, Ops

#: Parts of the names of baselines that do less or other work than the op.
OTHER_WORK = ("dense", "GShard")


def _time(r: Line) -> str:
    if r.median_us is None:
        return f"fails: {(r.failed or '')[:60]}"
    return f"{r.median_us:,.0f}{' (wrong)' if r.failed else ''}"


COLUMNS: Columns[Line] = {
    "op": lambda r: r.op if r.shape is None else f"{r.shape} {r.op}",
    "direction": lambda r: r.direction,
    "rows": lambda r: f"{r.tokens:,}",
    "experts": lambda r: str(r.experts),
    "groups": lambda r: r.groups,
    "way": lambda r: r.way,
    "µs": _time,
    "p10 to p90": lambda r: f"{r.p10_us:,.0f} to {r.p90_us:,.0f}" if r.median_us else "",
    "GFLOP/s": lambda r: f"{r.gflop_per_s:,.1f}" if r.gflop_per_s else "",
    "over matmul's": lambda r: f"{r.share_of_matmul:.2f}" if r.gflop_per_s else "",
    "GB/s": lambda r: f"{r.gb_per_s:,.1f}" if r.median_us else "",
    "over copy's": lambda r: f"{r.share_of_copy:.2f}" if r.median_us else "",
    "speedup of ours": lambda r: r.ours_times_as_fast.words(".2f") if r.ours_times_as_fast else "",
}


def view(result: Ops) -> View:
    """Every line, ours above the baselines of its case; the exit code is 1 where ours is wrong."""
    wrong = [f"not timed: {reason}" for reason in result.wrong]
    if not result.lines:
        return View("No op was timed.", "", [], findings=wrong, code=int(bool(wrong)))
    ceilings = result.ceilings
    measured = (
        f"{ceilings.flops_per_s / 1e9:,.0f} GFLOP/s in a large matmul, "
        f"{ceilings.bytes_per_s / 1e9:,.1f} GB/s in a copy"
    )
    about = (
        f"{result.dtype}; the ways of one op run in turns, after their results were compared, "
        f"{result.rounds} rounds. Measured in the same run: {measured}."
    )
    table = Table.of(
        f"Ops, {result.dtype} (measured)",
        result.lines,
        COLUMNS,
        "Median and 10th to 90th percentile over rounds in turns. GFLOP/s and GB/s count what the "
        "op must do, the same for all ways, and stand over the rate of a large matmul and of a "
        f"copy ({measured}). Arrays that fit the caches can be read faster than a copy writes.",
    )
    speedups = _speedups(result.lines)
    short = Table(
        "Ours against the fastest that does the same work",
        ("op", "cases", "speedup, mean", "least", "least against"),
        [
            (op, str(len(cases)), f"{_mean(cases):.2f}", f"{least:.2f}", way)
            for op, cases in speedups.items()
            for least, way in [min(cases.values())]
        ],
    )
    means = ", ".join(f"{op} {_mean(cases):.2f}" for op, cases in speedups.items())
    where = f"On an {result.machine['gpu']}: s" if "gpu" in result.machine else "S"
    answer = f"{where}peedups over the fastest that does the same work, geometric means: {means}."
    return View(
        answer, about, [table, short], (), _findings(result) + wrong, short, int(bool(wrong))
    )


def _speedups(lines: list[Line]) -> dict[str, dict[str, tuple[float, str]]]:
    """Op -> case -> speedup over the fastest baseline that does the same work, and that one."""
    best: dict[str, dict[str, tuple[float, str]]] = {}
    for r in lines:
        if r.way == OURS or r.failed or r.ours_times_as_fast is None:
            continue
        if not any(word in r.way for word in OTHER_WORK):
            found = r.ours_times_as_fast.median, r.way
            cases = best.setdefault(r.op, {})
            cases[r.name] = min(cases.get(r.name, found), found)
    return best


def _mean(cases: dict[str, tuple[float, str]]) -> float:
    return math.exp(sum(math.log(speedup) for speedup, _ in cases.values()) / len(cases))


def _findings(result: Ops) -> list[str]:
    """Why the grouped products and the moved rows come out so, where such baselines ran on CPU."""

    def over(way: str) -> list[float]:
        found = (r.ours_times_as_fast for r in result.lines if r.way.endswith(way))
        return [spread.median for spread in found if spread is not None]

    dense, hot = over("ragged_dot"), over("one-hot einsum")
    said = []
    if dense and result.machine.get("backend", "cpu") == "cpu":
        said.append(
            "On a CPU lax.ragged_dot computes every group densely: the grouped products here are "
            f"{min(dense):.1f} to {max(dense):.1f} times as fast, more with more experts."
        )
    if hot:
        said.append(
            f"Rows that move by index are {min(hot):.0f} to {max(hot):.0f} times as fast as rows "
            "that move through one-hot products, which is most of what the layer gains over "
            "GShard's."
        )
    return said
