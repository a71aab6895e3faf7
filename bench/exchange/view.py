"""The exchange in tables and charts, and how its two ways to be told agree."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from taskmoe.bench.exchange.measure import Exchanged, Row, Size
from taskmoe.bench.exchange.step import SUB
from taskmoe.bench.harness.view import Chart, Columns, Table, View

COLUMNS: Columns[Row] = {
    "system": lambda r: r.system,
    "µs": lambda r: f"{r.us:,.0f}",
    "p10 to p90": lambda r: f"{r.us_p10:,.0f} to {r.us_p90:,.0f}",
    "moving": lambda r: f"{r.transfer_share:.1%}",
    "waiting": lambda r: f"{r.waiting_share:.1%}",
    "by copy": lambda r: "" if r.copy_share is None else f"{r.copy_share:.1%}",
    "alone µs": lambda r: "" if r.alone_us is None else f"{r.alone_us:,.0f}",
    "collectives": lambda r: ", ".join(f"{n} {kind}" for kind, n in r.collectives.items()) or "0",
    "bytes sent": lambda r: f"{r.bytes_sent:,.0f}",
    "error": lambda r: "by design" if r.error is None else f"{r.error:.1e}",
}
OF_LAYERS = ("alone µs", "bytes sent")


def view(*results: Exchanged) -> View:
    """Layers and steps of each result; the exit code is 1 where a system is not one device's."""
    tables: list[Table] = []
    charts: list[Chart] = []
    said: list[str] = []
    wrong = []
    for result in results:
        words = result.spec.words
        if len(result.shapes) > 1:
            name, draw = f"exchange-{result.spec.processes}", functools.partial(_chart, result)
            charts.append(Chart(name, "Share of time in collectives", draw))
        tables += [_table(size, words) for size in (*result.shapes, *result.steps)]
        lead = f"{words}: " if len(results) > 1 else ""
        said += [f"{lead}{line}" for line in findings(result)]
        wrong += [
            f"{row.system} differs from one device by {row.error:.2g}: not timed"
            for row in result.rows
            if not row.agrees
        ]
    common = set.intersection(*({s.batch or 0 for s in r.steps} for r in results))
    if len(results) > 1 and common:
        batch = max(common)
        title = "Share of the exchange, told in two ways"
        charts.insert(0, Chart("exchange-share", title, lambda: _share_chart(results, batch)))
    about = (
        f"{', '.join(r.spec.words for r in results)}, {results[0].spec.rounds} rounds in turns, "
        "float32. One layer with a token a sequence, and a whole decoding step: a decoder of two "
        "layers, one of them a mixture, and a softmax over 1,000 words. Moving and waiting are "
        "shares of the time that devices spend in collectives, by the profiler. By copy is the "
        "share of time that the same program saves when it keeps every part instead of sending it "
        "(kept). Alone is a layer's all-to-alls with nothing between them."
    )
    short = tables[-1] if tables else None
    if short is not None:
        short = short.only(("system", "µs", "moving", "waiting", "by copy"))
    return View(_answer(results), about, tables, charts, [*said, *wrong], short, int(bool(wrong)))


def _answer(results: Sequence[Exchanged]) -> str:
    """How a sub-network's time compares with the fastest that exchanges, on each set of devices."""
    said = []
    for result in results:
        rows = (result.steps or result.shapes)[-1].rows
        good = [r for r in rows if r.agrees and r.error is not None]
        alone = [r.us for r in good if r.system == SUB]
        sending = [r.us for r in good if r.collectives]
        if sending and alone:
            said.append(f"{alone[0] / min(sending):.2f} on {result.spec.words}")
    if not said:
        return "Nothing was timed."
    return (
        "A task's sub-network exchanges nothing. It takes this share of the time of the fastest "
        f"system that does: {', '.join(said)}."
    )


def _table(size: Size, devices: str) -> Table:
    """A row a system; of one that does not agree with one device, its error alone."""
    what, columns, note = f"{size.tokens} tokens", COLUMNS, ""
    if size.tokens is None:
        what = f"Decoding step of {size.batch} sequences"
        columns = {name: say for name, say in COLUMNS.items() if name not in OF_LAYERS}
    else:
        note = _verdict(size)
    rows = [
        tuple(
            say(r) if r.agrees or name in ("system", "error") else "-"
            for name, say in columns.items()
        )
        for r in size.rows
    ]
    title = f"{what}, {size.experts} experts, d_model {size.d_model}, {devices} (measured)"
    return Table(title, tuple(columns), rows, note)


#: Points by which two ways to tell a share may differ and still agree.
AGREE = 0.05


def findings(result: Exchanged) -> list[str]:
    """How the profiler's shares and those by copy agree, and where not, why; sub-networks' zero."""
    rows = [r for r in result.rows if r.agrees]
    both = [(r, r.copy_share) for r in rows if r.copy_share is not None]
    lines = []
    if both:
        apart = [r.share - copied for r, copied in both]
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
    subs = [r for r in rows if not r.collectives and r.error is not None]
    if subs:
        most = max(r.share for r in subs)
        lines.append(f"Sub-networks: 0 collectives, {most:.1%} of their time in communication.")
    return lines


#: Why leaving the exchange out may save more than its collectives take.
WHY_LESS = (
    "Where the share by copy is the larger: leaving the exchange out also leaves out cutting rows "
    "into a part for each device and laying parts together again, which XLA's CPU code does around "
    "a collective and the profiler books as ordinary instructions (alone has them too)."
)


def _why_more(result: Exchanged, both: list[tuple[Row, float]]) -> str:
    """Why a device's time in collectives may be more than leaving them out saves."""
    devices, cores = result.spec.devices, int(result.machine["cores"])
    if devices <= cores:
        return (
            "Where the profiler's share is the larger: each device has a core of its own, but not "
            "to itself; what else the machine runs holds up one device, and others wait for it."
        )
    moving = [r.transfer_share - copied for r, copied in both]
    return (
        f"Where the profiler's share is the larger: {devices} devices share {cores} cores; while "
        "one computes, others wait in a collective. The profiler counts the wait as communication, "
        "but leaving the exchange out does not save it. What the profiler calls "
        f"moving, after the last device has arrived, is {100 * min(moving):+.0f} to "
        f"{100 * max(moving):+.0f} points from the share by copy."
    )


def _verdict(shape: Size) -> str:
    """What "auto" would take, what was fastest, and where the sub-network stands."""
    good = [r for r in shape.rows if r.agrees and r.error is not None]
    travelling = [r for r in good if r.bytes_sent]
    if not travelling:
        return "nothing was timed"
    fastest = min(travelling, key=lambda r: r.us)
    dropless = [r for r in travelling if "dropless" in r.system]
    fewest = min(dropless, key=lambda r: r.bytes_sent).system
    said = f"fewest bytes, dropless (auto): {fewest}; fastest here: {fastest.system}"
    alone = [r.us / fastest.us for r in good if not r.bytes_sent]
    return said + (f"; the sub-network takes {alone[0]:.2f} of its time" if alone else "")


def _chart(result: Exchanged) -> Figure:
    """Share of a layer's time in collectives over tokens, a line a system."""
    shapes = result.shapes
    first = shapes[0].experts, shapes[0].d_model
    shapes = [s for s in shapes if (s.experts, s.d_model) == first]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for system in [r.system for r in shapes[0].rows if r.agrees]:
        rows = [r for s in shapes for r in s.rows if r.system == system]
        tokens = [s.tokens for s in shapes]
        left.plot(tokens, [100 * r.share for r in rows], "o-", label=system)
        right.plot(tokens, [r.us for r in rows], "o-", label=system)
    left.set_ylabel("% of the layer's time in collectives")
    right.set_ylabel("µs a layer (median)")
    right.set_yscale("log")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens, all devices")
        axis.spines[["top", "right"]].set_visible(False)
    left.set_ylim(bottom=-2)
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{first[0]} experts, d_model {first[1]}, {result.spec.words}")
    return figure


def _share_chart(results: Sequence[Exchanged], batch: int) -> Figure:
    """Shares of the exchange by devices, the ways to tell them side by side, at one batch."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axis, name in zip(axes, ("all_to_all, dropless", "all_to_all, capacity 1.25"), strict=True):
        for place, result in enumerate(results):
            step = next(m for m in result.steps if m.batch == batch)
            row = next(r for r in step.rows if r.system == name)
            first = place == 0 and axis is axes[0]
            moving, waiting = 100 * row.transfer_share, 100 * row.waiting_share
            saved = 100 * (row.copy_share or 0)
            for at, height, bottom, colour, label in (
                (place - 0.2, moving, 0, "#4c72b0", "moving, by the profiler"),
                (place - 0.2, waiting, moving, "#a6bddb", "waiting, by the profiler"),
                (place + 0.2, saved, 0, "#dd8452", "saved when parts are kept"),
            ):
                axis.bar(at, height, 0.36, bottom, color=colour, label=label if first else None)
        axis.set_xticks(range(len(results)), [r.spec.words for r in results])
        axis.set_title("capacity 1.25" if "capacity" in name else name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"% of a decoding step of {batch} sequences")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)  # fmt: skip
    return figure
