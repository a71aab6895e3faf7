"""A base-size sub-network's beam search beside the time it takes to read what a step must read.

The floor of a step is weights and cache read once at this machine's measured memory bandwidth: the
best of a copy and of few rows times a large matrix. A step's time is the difference of a long and a
short search over their difference in positions, so that encoder and set-up do not count. Beside it
stand the steps without the search around them (no ranking, no reordering of the cache), and the
time of the arithmetic alone at the rate of this machine's largest product.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.console import out
from taskmoe.bench.harness.results import keep
from taskmoe.bench.harness.timing import alternate
from taskmoe.bench.serving import systems as serving
from taskmoe.cli.devices import use_present_devices
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar
from taskmoe.wmt.config import PRESETS, ModelConfig
from taskmoe.wmt.model import transformer
from taskmoe.wmt.model.decoding import search
from taskmoe.wmt.model.transformer import Params, Tasks, param_count, start_cache, with_softmax
from taskmoe.wmt.text.tokenizer import BOS, EOS, PAD

BATCHES, QUICK_BATCHES = (1, 4, 16), (1,)
SHORT, LONG = 8, 40  # target positions of the two searches
SOURCE = 32  # source positions
HEADINGS = (
    *("sentences", "ms a step", "p10 to p90", "floor ms", "over the floor"),
    *("steps alone, ms", "alone over the floor", "arithmetic ms", "tokens/s"),
)


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--config", choices=list(PRESETS), default="base", help="size of the model")
    p.add_argument("--beam", type=int, default=4, help="hypotheses (default 4)")
    p.add_argument("--batches", help=f"sentences at once: {','.join(map(str, BATCHES))}")
    p.add_argument("--rounds", type=int, default=7, help="times that each is measured")
    p.add_argument("--quick", action="store_true", help="one sentence, three rounds")
    p.add_argument("--json", type=Path, help="write the results here")
    p.add_argument("--png", type=Path, help="draw the times here")


def run(a: argparse.Namespace) -> int:
    """Measure and print."""
    if a.beam < 2 or a.rounds < 1:
        raise InputError(
            f"--beam must be at least 2 and --rounds at least 1, got {a.beam} and {a.rounds}"
        )
    try:
        words = a.batches.split(",") if a.batches else QUICK_BATCHES if a.quick else BATCHES
        batches = sorted({int(n) for n in words})
    except ValueError:
        raise InputError(f"--batches must be numbers like 1,16, got {a.batches}") from None
    if batches[0] < 1:
        raise InputError(f"--batches must be at least 1, got {batches[0]}")
    use_present_devices()
    config = sub_network_config(a.config)
    params = jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), config)
    rounds = 3 if a.quick else a.rounds
    rows = []
    with bar("beam search", "batch sizes") as progress:
        progress(0, len(batches))
        for number, batch in enumerate(batches):
            rows.append(measure(params, config, batch, a.beam, rounds))
            progress(number + 1, len(batches))
    result = {
        "command": "beam",
        "machine": machine.describe(),
        "config": a.config,
        "parameters": param_count(params),
        "beam": a.beam,
        "rounds": rounds,
        "rows": rows,
    }
    keep(result, chart, a)
    table = Table(*HEADINGS, title=f"{a.config}, {param_count(params):,} parameters, float32")
    for cells in table_cells(result):
        table.add_row(*cells)
    out.print(table)
    return 0


def sub_network_config(preset: str) -> ModelConfig:
    """What a task's sub-network of a preset's target/target model is."""
    sizes = PRESETS[preset][0] | {"encoder_wide_d_ff": None, "decoder_wide_d_ff": None}
    return ModelConfig(pairs=("en-de",), encoder="dense", decoder="dense", **sizes)


def bytes_a_step(params: Params, config: ModelConfig, batch: int, beam: int) -> int:
    """Bytes that a step must read at least: the decoder's weights, softmax, and cache, once each.

    Keys and values of the source were projected before the first step, so their weights are not
    read. The cache is as long as the long search.
    """
    layers = [
        layer | {"cross": {k: v for k, v in layer["cross"].items() if k != "kv"}}
        for layer in params["decoder"]
    ]
    memory = jax.ShapeDtypeStruct((batch, SOURCE, config.d_model), jnp.float32)
    valid = jax.ShapeDtypeStruct((batch, SOURCE), jnp.bool_)
    make = functools.partial(start_cache, length=LONG, beam=beam)
    cache = jax.eval_shape(lambda p, m, v: make(p, config, m, v), params, memory, valid)
    softmax = with_softmax(params)["softmax"]
    leaves = jax.tree.leaves((layers, softmax, cache))
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def measure(
    params: Params, config: ModelConfig, batch: int, beam: int, rounds: int
) -> dict[str, Any]:
    """Time search, steps alone and the machine's ceilings in turns; a JSON-ready row."""
    rng = np.random.default_rng(0)
    source = jnp.asarray(rng.integers(4, config.vocab_size, (batch, SOURCE)), jnp.int32)
    memory = jnp.asarray(rng.standard_normal((batch * beam, SOURCE, config.d_model)), jnp.float32)
    token = jnp.full((batch * beam,), BOS, jnp.int32)
    params = with_softmax(params)
    # A search that ends early would look fast: `</s>` is made as likely as the average word.
    params = params | {"softmax": params["softmax"].at[:, EOS].set(0)}
    large = jnp.ones((8192, 8192))
    few, square = jnp.ones((4, 8192)), jnp.ones((2048, 2048))

    def searching(length: int) -> Any:
        f = jax.jit(
            lambda p, s: search(p, config, s, Tasks(None, None), max_length=length, beam=beam)
        )
        return lambda: f(params, source)

    def stepping(length: int) -> Any:
        f = jax.jit(lambda p, m, t: serving.decode(p, config, m, t, length)[0])
        return lambda: f(params, memory, token)

    found = np.asarray(searching(LONG)()[0])
    if ((found == EOS) | (found == PAD)).any():
        raise RuntimeError("the search ended before its last position: its steps cannot be counted")
    product, copy = jax.jit(jnp.matmul), jax.jit(jnp.copy)
    times = alternate(
        {
            "search, short": searching(SHORT),
            "search, long": searching(LONG),
            "steps, short": stepping(SHORT),
            "steps, long": stepping(LONG),
            "copy": lambda: copy(large),
            "few rows": lambda: product(few, large),
            "product": lambda: product(square, square),
        },
        rounds=rounds,
    )
    seconds = {name: np.asarray(timing.seconds) for name, timing in times.items()}
    step = (seconds["search, long"] - seconds["search, short"]) / (LONG - SHORT)
    alone = (seconds["steps, long"] - seconds["steps, short"]) / (LONG - SHORT)
    bandwidth = np.maximum(2 * large.nbytes / seconds["copy"], large.nbytes / seconds["few rows"])
    moved = bytes_a_step(params, config, batch, beam)
    floor = moved / bandwidth  # of each round: the machine's speed changes between rounds
    weights = sum(x.size for x in jax.tree.leaves((params["decoder"], params["softmax"])))
    arithmetic = 2 * weights * batch * beam * seconds["product"] / (2 * 2048**3)

    def told(x: np.ndarray) -> dict[str, float]:
        low, middle, high = np.quantile(x, (0.1, 0.5, 0.9))
        return {"median": float(middle), "p10": float(low), "p90": float(high)}

    return {
        "batch": batch,
        "bytes": moved,
        "bytes_per_s": told(bandwidth),
        "step_s": told(step),
        "alone_s": told(alone),
        "floor_s": told(floor),
        "arithmetic_s": told(arithmetic),
        "over_floor": told(step / floor),
        "alone_over_floor": told(alone / floor),
    }


def table_cells(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of a line a batch size, for `HEADINGS`."""
    return [
        (
            str(r["batch"]),
            f"{1e3 * r['step_s']['median']:.1f}",
            f"{1e3 * r['step_s']['p10']:.1f} to {1e3 * r['step_s']['p90']:.1f}",
            f"{1e3 * r['floor_s']['median']:.1f}",
            f"{r['over_floor']['median']:.2f} ({r['over_floor']['p10']:.2f} to "
            f"{r['over_floor']['p90']:.2f})",
            f"{1e3 * r['alone_s']['median']:.1f}",
            f"{r['alone_over_floor']['median']:.2f}",
            f"{1e3 * r['arithmetic_s']['median']:.1f}",
            f"{r['batch'] / r['step_s']['median']:.1f}",
        )
        for r in result["rows"]
    ]


def chart(result: dict[str, Any]) -> Figure:
    """Milliseconds of a step, of the step alone, of its floor and of its arithmetic, over batch."""
    rows = result["rows"]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    at = np.arange(len(rows))
    bars = (
        ("step_s", "a step of beam search"),
        ("alone_s", "the step without the search"),
        ("floor_s", "floor: bytes over bandwidth"),
        ("arithmetic_s", "arithmetic at the peak rate"),
    )
    for i, (key, label) in enumerate(bars):
        axes.bar(at + 0.2 * (i - 1.5), [1e3 * r[key]["median"] for r in rows], 0.2, label=label)
    axes.set_xticks(at, [str(r["batch"]) for r in rows])
    axes.set_xlabel(f"sentences at once, beam {result['beam']}")
    axes.set_ylabel("ms")
    axes.legend(fontsize=8)
    return figure
