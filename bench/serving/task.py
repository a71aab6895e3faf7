"""What task routing costs: a batch of one task against a dense FFN of the same width.

The layer with a scalar task and the dense layer of width top_k * d_ff run in turns in one process,
forward, and forward plus backward (gradients for the input and every parameter; the mixture's has a
matrix for each expert to fill). An extracted sub-network runs beside them. Results are checked
against each other first.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from taskmoe import moe
from taskmoe.bench.harness import machine
from taskmoe.bench.harness.collectives import count_collectives
from taskmoe.bench.harness.console import out
from taskmoe.bench.harness.timing import alternate, ratio
from taskmoe.cli.command_line import write_text
from taskmoe.cli.devices import use_present_devices
from taskmoe.cli.errors import InputError

DENSE = "dense FFN of the same width"


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--experts", type=int, default=32)
    p.add_argument("--d-model", type=int, default=512)
    p.add_argument("--d-ff", type=int, default=2048, help="hidden width of an expert")
    p.add_argument("--rounds", type=int, default=15, help="times that each is measured")
    p.add_argument("--quick", action="store_true", help="five rounds at a quarter of the tokens")
    p.add_argument("--json", type=Path, help="write the results here")


def run(a: argparse.Namespace) -> int:
    """Measure and print; 1 where the layer and the dense FFN disagree."""
    use_present_devices()
    for name in ("tokens", "experts", "d_model", "d_ff", "rounds"):
        if getattr(a, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    if a.quick:
        a.tokens, a.rounds = max(1, a.tokens // 4), 5
    try:
        config = moe.MoEConfig(a.d_model, a.d_ff, a.experts, routing="task", num_tasks=16)
    except ValueError as error:
        raise InputError(str(error)) from None
    result = measure(config, a.tokens, a.rounds)
    if a.json is not None:
        write_text(a.json, json.dumps(result, indent=1) + "\n")
    table = Table(
        *("direction", "system", "ms", "p10 to p90", "ratio to dense", "collectives"),
        title=f"{a.tokens} tokens, {a.experts} experts, d_model {a.d_model}, d_ff {a.d_ff}, "
        "float32 (measured)",
    )
    for row in result["rows"]:
        table.add_row(
            row["direction"],
            row["system"],
            f"{row['ms']:.2f}",
            f"{row['ms_p10']:.2f} to {row['ms_p90']:.2f}",
            f"{row['ratio']:.3f} ({row['ratio_p10']:.3f} to {row['ratio_p90']:.3f})",
            str(row["collectives"]),
        )
    out.print(table)
    if result["error"] > 1e-5:
        out.print(f"the layer differs from the dense FFN by {result['error']:.2g}")
        return 1
    return 0


def measure(config: moe.MoEConfig, tokens: int, rounds: int) -> dict[str, Any]:
    """JSON-ready: error (largest difference over the largest output), and a row each."""
    params = moe.init(jax.random.key(0), config)
    x = jax.random.normal(jax.random.key(1), (1, tokens, config.d_model))
    small = jax.jit(lambda p: moe.extract(p, config, 3))(params)
    plain = small.w_in, small.w_out

    def layer(params: Any, x: jax.Array) -> jax.Array:
        return moe.apply(params, config, x, task=3)[0]

    def dense(params: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ params[0]) @ params[1]

    systems: dict[str, tuple[Callable[..., Any], Any]] = {
        DENSE: (dense, plain),
        "task-routed layer": (layer, params),
        "extracted sub-network": (moe.ffn, small),
    }
    rows: list[dict[str, Any]] = []
    want = np.asarray(jax.jit(dense)(plain, x))
    error = max(
        float(np.abs(np.asarray(jax.jit(f)(p, x)) - want).max() / np.abs(want).max())
        for f, p in systems.values()
    )
    for direction in ("forward", "forward+backward"):
        runs, collectives = {}, {}
        for name, (f, p) in systems.items():
            compiled = jax.jit(_direction(f, direction)).lower(p, x).compile()
            runs[name] = functools.partial(compiled, p, x)
            collectives[name] = sum(count_collectives(compiled.as_text() or "").values())
        timings = alternate(runs, rounds=rounds)
        for name, timing in timings.items():
            middle, low, high = ratio(timing, timings[DENSE])
            rows.append(
                {
                    "direction": direction,
                    "system": name,
                    "ms": timing.median * 1e3,
                    "ms_p10": timing.spread[0] * 1e3,
                    "ms_p90": timing.spread[1] * 1e3,
                    "ratio": middle,
                    "ratio_p10": low,
                    "ratio_p90": high,
                    "collectives": collectives[name],
                }
            )
    return {"machine": machine.describe(), "error": error, "rows": rows}


def _direction(f: Callable[..., Any], direction: str) -> Callable[..., Any]:
    if direction == "forward":
        return f

    def both(params: Any, x: jax.Array) -> Any:
        y, pull = jax.vjp(f, params, x)
        return y, pull(jnp.ones_like(y))

    return both
