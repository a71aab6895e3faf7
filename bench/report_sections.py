"""Sections of BENCHMARKS.md and README.md that tell of measurements, each from its stored JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from taskmoe.bench import report_tpu
from taskmoe.bench.exchange import measure as exchange
from taskmoe.bench.harness.results import RESULTS, load, provenance, save_figure
from taskmoe.bench.harness.tables import markdown, paragraph
from taskmoe.bench.serving import beam, decode
from taskmoe.bench.serving import systems as serving
from taskmoe.bench.story import demo_report, paper, study


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
    results: list[dict[str, Any]] = []
    for name, options in (
        ("exchange-1", "--processes 1"),
        ("exchange-2", "--processes 2"),
        ("exchange-own", "--devices 2 --batches 512 --step-batches 512"),
    ):
        command = f"python -m taskmoe.bench exchange {options} --json {RESULTS}/{name}.json"
        result = load(root, f"{name}.json", command)
        results.append(result)
        picture = ""
        if len(result["shapes"]) > 1:
            save_figure(exchange.chart(result), root / RESULTS / f"{name}.png")
            picture = f"![Share of time in collectives](bench/results/{name}.png)"
        spec = result["spec"]
        where = exchange.devices_words(spec)
        rows = [
            (f"{shape['tokens']:,}", *exchange.cells(r))
            for shape in result["shapes"]
            for r in shape["rows"]
        ]
        steps = [
            (f"{step['batch']:,}", *exchange.cells(r, exchange.STEP_HEADINGS))
            for step in result["steps"]
            for r in step["rows"]
        ]
        first = result["shapes"][0]
        intro = paragraph(
            f"Measured by {provenance(command, result['machine'])} {where}, {first['experts']}",
            f"experts, d_model {first['d_model']}, float32, {spec['rounds']} rounds in turns. One",
            "layer, a token a sequence:",
        )
        second = paragraph(
            "A whole decoding step (decoder of two layers, one of them a mixture, softmax over",
            "1,000 words):",
        )
        tables = (
            markdown(("tokens", *exchange.HEADINGS), rows),
            markdown(("sequences", *exchange.STEP_HEADINGS), steps),
        )
        said = paragraph(*exchange.findings(result))
        shown = (intro, picture, tables[0], second, tables[1], said)
        parts.append("\n\n".join(part for part in shown if part))
    meaning = paragraph(
        "Moving and waiting are shares of the time that devices spend in collectives, by the",
        "profiler; by copy is the share of time that the same program saves when it keeps every",
        "part instead of sending it (kept), and alone is a layer's all-to-alls with nothing",
        "between them. A sub-network exchanges nothing, however many devices and processes there",
        "are.",
    )
    save_figure(
        exchange.share_chart([results[-1], *results[:-1]]), root / RESULTS / "exchange-share.png"
    )
    picture = "![Share of the exchange, told in two ways](bench/results/exchange-share.png)"
    return "\n\n".join([*parts, picture, meaning])


#: Corpus of the study -> what it is, the arguments that the study's command takes for it, and what
#: to mind when its order is held against the paper's.
_STUDIES = {
    "multi30k": (
        "Multi30k, image captions: the second half of its validation files is the test text.",
        "work/study-multi30k --data work/study-multi30k/data",
        "Mind: short runs tell of how fast each learns; a static table needs no "
        "learning of routes, which may be why it leads here and not in the paper. The student "
        "learns from its teacher's greedy translations of a third of the text that the others see. "
        "Pruning keeps 2 of 8 experts without training, as few as a sub-network has.",
    ),
    "news": (
        "WMT news and everyday sentences (Tatoeba), English to and from 8 languages: 150 everyday "
        "sentences a direction are the test text, and for cs, de, es and fr 100 lines of news.",
        "work/study-news --data work/study-news/data/news --data work/study-news/data/tatoeba",
        "Mind: scores this low are those of small models that have only begun to learn two kinds "
        "of text in nine languages. With one seed a difference of a few tenths may be chance.",
    ),
}


def _study(root: Path) -> str:
    parts = []
    for name, (corpus, arguments, remark) in _STUDIES.items():
        command = f"python -m taskmoe.bench study {arguments} --json {RESULTS}/study-{name}.json"
        result = load(root, f"study-{name}.json", command)
        save_figure(study.chart(result), root / RESULTS / f"study-{name}.png")
        model, training = result["model"], result["training"]
        seeds = max(len(r["seeds"]) for r in result["rows"])
        intro = paragraph(
            f"{corpus} Trained and scored by `runs/study-{name}.sh`:",
            f"{len(model['pairs'])} directions, {training['steps']:,} steps of at most",
            f"{training['batch_tokens']:,} tokens for every system, {model['encoder_layers']} +",
            f"{model['decoder_layers']} layers, d_model {model['d_model']},",
            f"{model['num_experts']} experts of width {model['d_ff']}, {model['vocab_size']:,}",
            f"words; {result['sentences']:,} test sentences, beam 4;",
            "one seed, so that no spread over seeds is known."
            if seeds == 1
            else f"± is the standard deviation over up to {seeds} seeds.",
            f"The student learns from {result['taught']:,} translated sentences a direction.",
            f"Gathered and timed by {provenance(command, result['machine'])}",
            f"Tokens/s: the decoder, {study.ROWS} sentences of one direction,",
            f"{serving.POSITIONS} positions, systems in turns, median of {result['rounds']} rounds",
            "(p10 to p90), one device, so nothing is exchanged. Extracted alike: greedy",
            "translations of the validation text that sub-networks and the whole model share.",
        )
        said = paragraph(*study.findings(result), remark)
        found = markdown(study.HEADINGS, study.table_cells(result))
        picture = f"![Scores and sizes](bench/results/study-{name}.png)"
        parts.append(f"{intro}\n\n{found}\n\n{picture}\n\n{said}")
    return "\n\n".join(parts)


def _decode(root: Path) -> str:
    command = f"python -m taskmoe.bench decode --json {RESULTS}/decode.json"
    result = load(root, "decode.json", command)
    save_figure(decode.chart(result), root / RESULTS / "decode.png")
    model = result["model"]
    intro = paragraph(
        f"Measured by {provenance(command, result['machine'])} {result['devices']} devices,",
        f"decoder of {model['decoder_layers']} layers (every other one a mixture), d_model",
        f"{model['d_model']}, {model['num_experts']} experts of width {model['d_ff']}, softmax",
        f"over {model['vocab_size']:,} words, {result['source_length']} source positions,",
        f"{result['positions']} tokens a sequence, {result['rounds']} rounds in turns;",
        "random parameters and tokens." if not result["trained"] else "trained parameters.",
    )
    rows = [decode.cells(r) for r in result["points"]]
    best = decode.peaks(result)
    peaks = [
        (
            name,
            f"{r['tokens_per_s']:,.0f}",
            f"{r['batch']:,}",
            f"{best[decode.TASK]['tokens_per_s'] / r['tokens_per_s']:.2f}",
        )
        for name, r in best.items()
    ]
    ratio = best[decode.TASK]["tokens_per_s"] / best[decode.DROPLESS]["tokens_per_s"]
    meaning = paragraph(
        f"At its best a sub-network a device decodes {ratio:.2f} times as fast as the dropless",
        f"token-routed model on the same devices (the paper: {paper.THROUGHPUT_RATIO}, on TPU v3);",
        "dense replicas do the same work as sub-networks and stand beside them. Devices here are",
        f"threads that share {result['machine']['cores']} cores, so an exchange costs waking and",
        "waiting but no network.",
    )
    found = markdown(decode.HEADINGS, rows)
    second = markdown(("system", "peak tokens/s", "at batch", "sub-networks over it"), peaks)
    lines = paragraph(*(f"{line.rstrip('.')}." for line in decode.verdict(result)[1:]))
    return (
        f"{intro}\n\n![Throughput over batch](bench/results/decode.png)\n\n{found}\n\n{second}"
        f"\n\n{lines}\n\n{meaning}"
    )


def _beam(root: Path) -> str:
    command = f"python -m taskmoe.bench beam --json {RESULTS}/beam.json"
    result = load(root, "beam.json", command)
    save_figure(beam.chart(result), root / RESULTS / "beam.png")
    first = result["rows"][0]
    intro = paragraph(
        f"Measured by {provenance(command, result['machine'])} A sub-network of the",
        f"{result['config']} model's sizes, {result['parameters']:,} random parameters, float32,",
        f"beam {result['beam']}, {beam.SOURCE} source positions, a cache of {beam.LONG} target",
        f"positions; {result['rounds']} rounds in turns. The floor reads",
        f"{first['bytes'] / 1e6:.0f} MB a step for {first['batch']} sentence at",
        f"{first['bytes_per_s']['median'] / 1e9:.1f} GB/s, as measured in the same rounds.",
    )
    within = [r for r in result["rows"] if r["over_floor"]["median"] <= 1.5]
    search = [1e3 * (r["step_s"]["median"] - r["alone_s"]["median"]) for r in result["rows"]]
    meaning = paragraph(
        "Within 1.5 times of the floor at a batch of:",
        f"{', '.join(str(r['batch']) for r in within) or 'none'}.",
        "The rest of a step is arithmetic, whose share grows with the rows, and",
        "the search itself (ranking words, putting the cache in order), which takes",
        f"{', '.join(f'{s:.1f}' for s in search)} ms by the difference of the two.",
    )
    table = markdown(beam.HEADINGS, beam.table_cells(result))
    picture = "![Where a step's time goes](bench/results/beam.png)"
    return f"{intro}\n\n{table}\n\n{picture}\n\n{meaning}"


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
    dense, hot = _times_as_fast(result, "ragged_dot"), _times_as_fast(result, "one-hot einsum")
    meaning = paragraph(
        "On a CPU lax.ragged_dot computes every group densely, so the grouped products here are",
        f"{min(dense):.1f} to {max(dense):.1f} times as fast, more with more experts. Rows that",
        f"move by index instead of through one-hot products are {min(hot):.0f} to {max(hot):.0f}",
        "times as fast, which is most of what the whole layer gains over GShard's.",
    )
    return f"{intro}\n\n{markdown(headings, rows)}\n\n{meaning}"


def _times_as_fast(result: dict[str, Any], way: str) -> list[float]:
    """How many times as fast as this baseline ours is, a figure a line of it."""
    return [r["ours_times_as_fast"]["median"] for r in result["lines"] if r["way"].endswith(way)]


SECTIONS: dict[str, Callable[[Path], str]] = {
    "demo": _demo,
    "task": _task,
    "study": _study,
    "exchange": _exchange,
    "decode": _decode,
    "beam": _beam,
    "ops": _ops,
    "kernels": report_tpu.kernels,
    "published": report_tpu.published,
    "model": report_tpu.model,
}
