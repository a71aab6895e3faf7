"""The case of `task` for pytest-benchmark: one task's layer, its sub-network, a dense layer."""

from typing import Any

import jax
import numpy as np
import pytest

from taskmoe import moe

CONFIG = moe.MoEConfig(256, 1024, 32, routing="task", num_tasks=16)
TOKENS = 512


def ways() -> dict[str, tuple[Any, Any]]:
    """Way -> function of (parameters, x), and its parameters."""
    params = moe.init(jax.random.key(0), CONFIG)
    small = moe.extract(params, CONFIG, 3)
    return {
        "dense": (lambda p, x: jax.nn.relu(x @ p[0]) @ p[1], (small.w_in, small.w_out)),
        "layer": (lambda p, x: moe.apply(p, CONFIG, x, task=3)[0], params),
        "sub-network": (moe.ffn, small),
    }


@pytest.mark.parametrize("way", ["dense", "layer", "sub-network"])
def test_task(way: str, benchmark: Any) -> None:
    """A forward pass, once it is the dense layer's."""
    x = jax.random.normal(jax.random.key(1), (1, TOKENS, CONFIG.d_model))
    every = ways()
    want = np.asarray(every["dense"][0](every["dense"][1], x))
    function, params = every[way]
    run = jax.jit(function)
    np.testing.assert_allclose(run(params, x), want, atol=1e-5 * np.abs(want).max())
    benchmark.pedantic(lambda: jax.block_until_ready(run(params, x)), rounds=9)
