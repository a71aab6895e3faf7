"""A task's sub-network of every model's layer equals the layer: shared experts, biases, top-1."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe import moe
from taskmoe.tests.kernels.support import normal
from taskmoe.tests.moe import parity

BY_TOKEN = ("capacity_factor", "group_size", "renormalise")
CASES = [*parity.FIELDS, "top_1", "biased"]


def layer(name: str) -> tuple[Any, moe.MoEConfig]:
    """A model's layer that routes by task, nothing of it zero or one by chance."""
    extra: dict[str, Any] = {"top_k": 1} if name == "top_1" else {"biases": True, "gate_bias": True}
    fields = parity.FIELDS.get(name) or parity.FIELDS["qwen2_moe"] | extra
    fields = {n: v for n, v in fields.items() if n not in BY_TOKEN}
    sizes: dict[str, Any] = {"d_model": 8, "d_ff": 12, "num_experts": 16}
    config = moe.MoEConfig(**sizes, **fields, routing="task", num_tasks=5)
    params = moe.init(jax.random.key(0), config)
    for i, (part, value) in enumerate(sorted(params.items())):
        if "bias" in part or "scale" in part or part.startswith("b_"):
            params[part] = value + 0.3 * normal(i, value.shape)
    return params, config


@pytest.mark.parametrize("name", CASES)
def test_what_is_cut_out_is_the_layer(name: str) -> None:
    params, config = layer(name)
    x = normal(3, (5, 4, 8))
    whole = np.asarray(moe.apply(params, config, x, task=jnp.arange(5))[0])
    size = np.abs(whole).max()
    for task in range(5):
        small, part = moe.extract(params, config, task), x[task : task + 1]
        one = moe.apply(params, config, part, task=task)[0]
        np.testing.assert_array_equal(moe.ffn(small, part), one)
        np.testing.assert_allclose(one[0], whole[task], rtol=0, atol=1e-6 * size)
        other = moe.ffn(moe.extract(params, config, (task + 1) % 5), part)[0]
        assert np.abs(other - whole[task]).max() > 1e-3 * size  # another task's is not
    several, static = moe.extract_tasks(params, config, [3, 1])
    tasks = jnp.array([3, 1])
    both = moe.apply(several, static, x[tasks], task=jnp.arange(2))[0]
    np.testing.assert_allclose(both, whole[tasks], rtol=0, atol=2e-6 * size)
    for i in range(2):
        again = moe.ffn(moe.extract(several, static, i), x[tasks[i]])
        np.testing.assert_allclose(again, whole[tasks[i]], rtol=0, atol=2e-6 * size)
