"""The layers of `exchange` for pytest-benchmark: each strategy on eight host devices."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from taskmoe import moe
from taskmoe.bench.exchange.step import SYSTEMS
from taskmoe.bench.harness.collectives import count_collectives
from taskmoe.bench.serving import systems as serving

TOKENS, EXPERTS, D_MODEL = 64, 32, 256


@pytest.mark.parametrize("name", SYSTEMS)
def test_layer(name: str, benchmark: Any) -> None:
    """One layer, once it agrees with one device; what is kept agrees with nothing."""
    factor, strategy = SYSTEMS[name]
    mesh = serving.device_mesh(8)
    group = None if factor is None else TOKENS // mesh.size
    config = moe.MoEConfig(D_MODEL, 4 * D_MODEL, EXPERTS, capacity_factor=factor, group_size=group)
    params = moe.init(jax.random.key(0), config)
    x = np.random.default_rng(0).standard_normal((TOKENS, 1, D_MODEL)).astype(np.float32)
    placed = serving.place(mesh, params, moe.param_specs(params))
    spread = serving.place(mesh, x, P(serving.AXIS))

    def layer(params: Any, x: Any) -> jax.Array:
        return moe.apply(params, config, x, mesh=mesh, strategy=strategy)[0]

    compiled = jax.jit(layer).lower(placed, spread).compile()
    if strategy != "kept":
        want = np.asarray(jax.jit(lambda p, x: moe.apply(p, config, x)[0])(params, x))
        np.testing.assert_allclose(compiled(placed, spread), want, atol=1e-5 * np.abs(want).max())
    benchmark.extra_info["collectives"] = count_collectives(compiled.as_text() or "")
    run = functools.partial(compiled, placed, spread)
    benchmark.pedantic(lambda: jax.block_until_ready(run()), rounds=5, warmup_rounds=1)
