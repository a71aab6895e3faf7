"""Sections of BENCHMARKS.md that tell what was compiled for TPU and modelled, not measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from taskmoe.bench.harness.results import RESULTS, load, provenance, save_figure
from taskmoe.bench.harness.tables import markdown, paragraph
from taskmoe.bench.story import paper
from taskmoe.bench.tpu import published as tpu_published
from taskmoe.bench.tpu.model import measure as tpu_model

#: Scenario of `tpu_model` with the blog's batches.
BLOG = "the blog's"


def kernels(root: Path) -> str:
    """Our kernels and megablox's as compiled."""
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
        provenance(command, result["machine"], compiled=True),
        "Schedules are the compiler's; bytes and times are modelled, nothing here is a clock.",
    )
    second = paragraph(
        "Bytes that an expert's network moves at decoding sizes (32 experts, d_model 512, d_ff",
        "2048, bf16), counted from the grid walk, against the floor: touched weights once, rows in",
        "and out.",
    )
    table = markdown(("chip", "rows", "way", "bytes moved", "times the floor"), moved)
    save_figure(roofline_chart(result), root / RESULTS / "kernels.png")
    picture = "![Kernels against the roofline](bench/results/kernels.png)"
    reached = [r["roofline_us"] / r["modelled_us"] for r in ours_modelled(result)]
    meaning = paragraph(
        f"By this model our kernels reach {min(reached):.0%} to {max(reached):.0%} of the",
        "roofline, the lower end where a kernel moves rows or routes and has little to multiply.",
        "A whole expert in one kernel moves hardly a byte beyond its floor, which at decoding's",
        "sizes is the weights themselves.",
    )
    return f"{intro}\n\n{picture}\n\n{markdown(headings, rows)}\n\n{second}\n\n{table}\n\n{meaning}"


def ours_modelled(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Our rows that were modelled."""
    rows: list[dict[str, Any]] = result["kernels"]
    return [r for r in rows if r["by"] == "taskmoe" and r.get("modelled_us")]


def roofline_chart(result: dict[str, Any]) -> Any:
    """Share of the roofline that each kernel reaches by the model, ours and megablox's, by chip."""
    chips = list(dict.fromkeys(r["chip"] for r in result["kernels"]))
    figure, axes = plt.subplots(
        1, len(chips), figsize=(11, 4.6), layout="constrained", sharey=True, squeeze=False
    )
    names = list(
        dict.fromkeys(f"{r['op']} {r['direction']}" for r in result["kernels"] if "op" in r)
    )[::-1]
    styles = {"taskmoe": ("#4c72b0", "o"), "megablox": ("#c44e52", "D")}
    for axis, chip in zip(axes[0], chips, strict=True):
        for by, (colour, marker) in styles.items():
            rows = [
                r for r in result["kernels"]
                if r["chip"] == chip and r["by"] == by and r.get("modelled_us")
            ]  # fmt: skip
            share = [100 * r["roofline_us"] / r["modelled_us"] for r in rows]
            place = [names.index(f"{r['op']} {r['direction']}") for r in rows]
            axis.plot(share, place, marker, color=colour, label=by, linestyle="none")
        axis.set_title(chip)
        axis.set_xlim(0, 105)
        axis.set_xlabel("% of the roofline (modelled)")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].legend(frameon=False, loc="lower left")
    return figure


def published(root: Path) -> str:
    """The model beside measurements that others published."""
    command = f"python -m taskmoe.bench tpu --published --json {RESULTS}/published.json"
    result = load(root, "published.json", command)
    intro = paragraph(
        f"Modelled by {provenance(command, result['machine'], compiled=True)}",
        f"Published: {result['source']}.",
    )
    table = markdown(tpu_published.HEADINGS, map(tpu_published.cells, result["rows"]))
    meaning = paragraph(
        tpu_published.verdict(result["rows"]),
        "Ratios of modelled times between kernels on one chip stand on firmer ground than the",
        "times, since most of what is left out is left out of both.",
    )
    return f"{intro}\n\n{table}\n\n{meaning}"


def model(root: Path) -> str:
    """The paper's models on TPU: parameters, largest batches, modelled steps."""
    command = f"python -m taskmoe.bench tpu --model wmt --json {RESULTS}/tpu-model.json"
    result = load(root, "tpu-model.json", command)
    save_figure(share_chart(result), root / RESULTS / "tpu-model.png")
    intro = paragraph(
        "Parameters, memory, batches and bytes as compiled, times modelled, by",
        provenance(command, result["machine"], compiled=True),
    )
    table = result["parameters_millions"]
    sizes = [
        (
            system,
            *(
                f"{row[part]:.1f} ({'-' if said is None else f'{said:g}'})"
                for part, said in zip(
                    tpu_model.PARTS, tpu_model.PAPER_MILLIONS[system], strict=True
                )
            ),
        )
        for system, row in table.items()
    ]
    ratio = table["token-MoE"]["decoder"] / table["sub-network"]["decoder"]
    batches = [
        (
            one["chip"],
            system,
            str(tpu_model.CORES[system]),
            f"{row['batch']:,}" if "batch" in row else row["error"][:80],
            f"{tpu_model.BLOG_BATCH[system]:,}" if one["chip"] == "v3" else "",
            f"{row['hbm_bytes'] / 2**30:.2f}" if "hbm_bytes" in row else "",
        )
        for one in result["chips"]
        for system, row in one["largest"].items()
    ]
    steps = [
        (
            one["chip"],
            row["batches"],
            tpu_model.TIMES[row["compute_by"]],
            f"{row['token']['exchange_bytes'] / 1e6:.2f}",
            f"{row['token']['communication_share']:.1%}",
            f"{row['sub']['communication_share']:.1%}",
            f"{row['throughput_ratio']:.2f}",
            *(
                f"{end['token']['communication_share']:.1%}, {end['throughput_ratio']:.2f}"
                for end in row["sensitivity"].values()
            ),
        )
        for one in result["chips"]
        for row in one["scenarios"]
    ]
    parts = [
        intro,
        "Millions of parameters, from shapes (the paper's in brackets):",
        markdown(("system", *tpu_model.PARTS), sizes),
        paragraph(
            f"Decoder stack of the token-MoE over that of the sub-network: {ratio:.2f} (the paper:",
            f"{paper.DECODER_RATIO:.1f}).",
            "Largest batch of a decoding step that compiles, to within 25%:",
        ),
        markdown(("chip", "system", "cores", "batch", "blog", "HBM GiB a core"), batches),
        paragraph(
            f"One step on {tpu_model.CORES['token-MoE']} cores, token-MoE expert-parallel against",
            "a sub-network a core (modelled; the command prints every assumption):",
        ),
        markdown(
            (
                *("chip", "batches", "compute by", "sent MB a core", "token-MoE in communication"),
                *("sub-network", "throughput ratio", "at half bandwidth", "at twice"),
            ),
            steps,
        ),
        "![Share in communication over bandwidth](bench/results/tpu-model.png)",
        paragraph(
            f"The paper measured {paper.COMMUNICATION_SHARE['token']:.1%} in communication and a",
            f"ratio of {paper.THROUGHPUT_RATIO} on 32 cores of TPU v3, its blog",
            f"{tpu_model.BLOG_COMMUNICATION_SHARE:.0%}.",
            *_gain(result),
        ),
    ]
    return "\n\n".join(parts)


def _gain(result: dict[str, Any]) -> list[str]:
    """Where the modelled gain comes from, on the blog's chip."""
    rows = {row["batches"]: row for one in result["chips"][:1] for row in one["scenarios"][:3]}
    if not rows:
        return []
    chip, ratio = result["chips"][0]["chip"], {n: r["throughput_ratio"] for n, r in rows.items()}
    return [
        f"At equal batches a core the model gives {ratio['equal a core']:.2f} on {chip}, at the",
        f"largest that fit {ratio['largest']:.2f}, and {ratio[BLOG]:.2f} where each side takes the",
        "blog's batches: the gain lies less in time on the wire than in how many sequences share",
        "one reading of the weights.",
    ]


def share_chart(result: dict[str, Any]) -> Any:
    """Token-MoE's share of a step in communication over the link's bandwidth, a line a scenario."""
    figure, axis = plt.subplots(figsize=(10, 4.4), layout="constrained")
    colours = {"v3": "#c44e52", "v5e": "#4c72b0", "v6e": "#55a868"}
    styles = {BLOG: "o-", "equal a core": "s:", "largest": "^--"}
    for one in result["chips"]:
        by = one["times"][0] if one["times"] else ""
        for row in one["scenarios"]:
            if row["compute_by"] != by or row["batches"] == "equal a core":  # as the blog's
                continue
            link = one["link_bytes_per_s"] / 1e9
            shares = [
                row["sensitivity"]["half"]["token"]["communication_share"],
                row["token"]["communication_share"],
                row["sensitivity"]["twice"]["token"]["communication_share"],
            ]
            axis.plot(
                [link / 2, link, 2 * link],
                [100 * share for share in shares],
                styles[row["batches"]],
                color=colours.get(one["chip"], "#8c8c8c"),
                label=f"{one['chip']}, batch {row['token']['batch']:,}, by {tpu_model.TIMES[by]}",
            )
    axis.axhline(100 * tpu_model.BLOG_COMMUNICATION_SHARE, color="#8c8c8c", linewidth=1)
    axis.annotate(
        "the blog: 25%, TPU v3",
        (0.01, 100 * tpu_model.BLOG_COMMUNICATION_SHARE - 0.5),
        xycoords=("axes fraction", "data"),
        va="top",
        fontsize=8,
        color="#5c5c5c",
    )
    axis.set_xscale("log", base=2)
    axis.set_xlabel("GB/s of a link, one way: half, as published, twice")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_ylabel("% of the token-MoE's step in communication (modelled)")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
