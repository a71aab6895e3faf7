"""The layer of one task, its sub-network and a dense FFN, timed in turns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskmoe import moe
from taskmoe.bench.harness import machine
from taskmoe.bench.harness.collectives import count_collectives
from taskmoe.bench.harness.results import Result, Spread
from taskmoe.bench.harness.timing import alternate
from taskmoe.bench.serving.task.spec import Spec
from taskmoe.cli.devices import use_present_devices

DENSE, LAYER = "dense FFN of the same width", "task-routed layer"
SUB = "extracted sub-network"
SYSTEMS = (DENSE, LAYER, SUB)


@dataclasses.dataclass(frozen=True)
class Row:
    """A system's milliseconds and their ratio to the dense FFN's, with percentiles."""

    direction: str
    system: str
    ms: float
    ms_p10: float
    ms_p90: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    collectives: int


@dataclasses.dataclass(frozen=True)
class Tasks(Result):
    """A row a direction and system; error: the largest difference over the largest output."""

    machine: dict[str, str]
    error: float
    rows: list[Row]
    tokens: int = 4096
    experts: int = 32
    d_model: int = 512
    d_ff: int = 2048


def systems(spec: Spec) -> tuple[jax.Array, dict[str, tuple[Callable[..., Any], Any]]]:
    """The input, and system -> function of (parameters, input), and its parameters."""
    config = spec.config
    params = moe.init(jax.random.key(0), config)
    x = jax.random.normal(jax.random.key(1), (1, spec.tokens, config.d_model))
    small = jax.jit(lambda p: moe.extract(p, config, 3))(params)

    def layer(params: Any, x: jax.Array) -> jax.Array:
        return moe.apply(params, config, x, task=3)[0]

    def dense(params: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ params[0]) @ params[1]

    found: dict[str, tuple[Callable[..., Any], Any]] = {
        DENSE: (dense, (small.w_in, small.w_out)),
        LAYER: (layer, params),
        SUB: (moe.ffn, small),
    }
    return x, found


def measure(spec: Spec) -> Tasks:
    """Compare the results, then time forward, and forward and backward."""
    use_present_devices()
    config = spec.config
    x, every = systems(spec)
    rows: list[Row] = []
    plain, weights = every[DENSE]
    want = np.asarray(jax.jit(plain)(weights, x))
    error = max(
        float(np.abs(np.asarray(jax.jit(f)(p, x)) - want).max() / np.abs(want).max())
        for f, p in every.values()
    )
    for direction in ("forward", "forward+backward"):
        runs, collectives = {}, {}
        for name, (f, p) in every.items():
            compiled = jax.jit(_direction(f, direction)).lower(p, x).compile()
            runs[name] = functools.partial(compiled, p, x)
            collectives[name] = sum(count_collectives(compiled.as_text() or "").values())
        found = alternate(runs, rounds=spec.rounds)
        for name, seconds in found.items():
            ms, over = Spread.of(1e3 * seconds), Spread.of(seconds / found[DENSE])
            rows.append(
                Row(
                    direction, name, ms.median, ms.p10, ms.p90, over.median, over.p10, over.p90,
                    collectives[name],
                )
            )  # fmt: skip
    sizes = spec.tokens, config.num_experts, config.d_model, config.d_ff
    return Tasks(machine.describe(), error, rows, *sizes)


def _direction(f: Callable[..., Any], direction: str) -> Callable[..., Any]:
    if direction == "forward":
        return f

    def both(params: Any, x: jax.Array) -> Any:
        y, pull = jax.vjp(f, params, x)
        return y, pull(jnp.ones_like(y))

    return both
