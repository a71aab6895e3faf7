"""All ops together: a whole MoE layer, its gradient, and the same under jit and shard_map."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from taskmoe.kernels import combine, dispatch, expert_ffn, row_plan, top_k_gating
from taskmoe.tests.kernels import support

TOKENS, D, F, EXPERTS = 24, 6, 10, 4


@functools.cache
def loss(implementation: str, capacity: int | None = None) -> Any:
    """A scalar that every op and every differentiable output of the gating goes into."""

    def f(params: dict[str, Any], valid: Any) -> Any:
        options: Any = {"implementation": implementation}
        gating = top_k_gating(params["x"] @ params["gate"], 2, valid=valid, **options)
        plan = row_plan(gating, capacity=capacity)
        rows = dispatch(params["x"], plan.rows, plan.num_rows, **options)
        rows = expert_ffn(
            rows, params["w_in"], params["w_out"], plan.group_sizes,
            activation="silu", w_gate=params["w_gate"], **options,
        )  # fmt: skip
        y = combine(rows, plan.rows, gating.weights, **options)
        return jnp.sum(y**2) + gating.z_loss + jnp.sum(gating.mean_probs**2)

    return f


def parameters() -> dict[str, jax.Array]:
    shapes = {
        "x": (TOKENS, D),
        "gate": (D, EXPERTS),
        "w_in": (EXPERTS, D, F),
        "w_gate": (EXPERTS, D, F),
        "w_out": (EXPERTS, F, D),
    }
    return {name: 0.5 * support.normal(i, s) for i, (name, s) in enumerate(shapes.items())}


VALID = jnp.arange(TOKENS) % 5 != 1


@pytest.mark.parametrize("capacity", [None, 9])
def test_reference_gradient_against_finite_differences(capacity: int | None) -> None:
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters())
        f = jax.jit(loss("reference", capacity))
        grads = jax.jit(jax.grad(loss("reference", capacity)))(params, VALID)
        rng = np.random.default_rng(0)
        for name, grad in grads.items():
            for _ in range(3):
                way = rng.standard_normal(grad.shape)
                up, down = (
                    f(params | {name: params[name] + sign * 1e-6 * way}, VALID) for sign in (1, -1)
                )
                slope = float(up - down) / 2e-6
                np.testing.assert_allclose(np.sum(grad * way), slope, rtol=1e-6, err_msg=name)


@pytest.mark.as_shipped
@pytest.mark.parametrize(("implementation", "capacity"), [("xla", None), ("xla", 9), ("mosaic", 9)])
def test_gradient_equals_the_references(implementation: str, capacity: int | None) -> None:
    params = parameters()
    want = support.call("reference", jax.grad(loss("reference", capacity)), params, VALID)
    have = support.call(implementation, jax.grad(loss(implementation, capacity)), params, VALID)
    for name, grad in want.items():
        np.testing.assert_allclose(have[name], grad, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", "xla", "mosaic"])
def test_inside_shard_map_shared_weights_get_their_whole_gradient(implementation: str) -> None:
    params = parameters()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    specs = {name: P("data") if name == "x" else P() for name in params}

    def local(params: Any, valid: Any) -> Any:
        return jax.lax.psum(loss(implementation)(params, valid), "data")

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, P("data")),
        out_specs=P(),
        check_vma=implementation != "mosaic",  # JAX's interpreter does not know varying axes
    )
    have = support.call(implementation, jax.grad(mapped), params, VALID)
    want = support.call("reference", jax.grad(loss("reference")), params, VALID)
    for name, grad in want.items():
        np.testing.assert_allclose(have[name], grad, rtol=1e-4, atol=1e-5, err_msg=name)
