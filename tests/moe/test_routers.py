"""Routers of models and of callers in the layer: on one device, on meshes, extracted."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from taskmoe import moe
from taskmoe.kernels import ROUTERS, Router, top_k_gating
from taskmoe.tests.kernels.support import normal, running

D, F, E, B, S = 16, 24, 16, 8, 3
MODELS = [
    ("switch", 1), ("qwen2_moe", 4), ("deepseek_v2", 6), ("deepseek_v3", 8), ("kimi_k2", 8),
    ("deepseek_v4", 6), ("mixtral", 2), ("llama4", 1),
]  # fmt: skip


def layer(**fields: Any) -> tuple[dict[str, jax.Array], moe.MoEConfig]:
    """A layer whose biases, where it has some, are not zero."""
    sizes: dict[str, Any] = {"d_model": D, "d_ff": F, "num_experts": E, "gated": True}
    config = moe.MoEConfig(**(sizes | {"activation": "silu"} | fields))
    params = moe.init(jax.random.key(0), config)
    for i, name in enumerate(("gate_bias", "choice_bias", "b_in", "b_out", "b_gate")):
        if name in params:
            params[name] = 0.2 * normal(7 + i, params[name].shape)
    return params, config


def by_hand(params: Any, config: moe.MoEConfig, x: jax.Array, gating: Any) -> jax.Array:
    """Every expert on every token, and a sum with the weights of the chosen."""
    rows, weights = x.reshape(-1, D), gating.weights
    if config.chosen_by.weighs == "input":
        rows, weights = rows * weights, jnp.ones_like(weights)
    bias = lambda name: params[name][:, None] if name in params else 0.0  # noqa: E731
    hidden = jax.nn.silu(jnp.einsum("td,edf->etf", rows, params["w_gate"]) + bias("b_gate"))
    hidden = hidden * (jnp.einsum("td,edf->etf", rows, params["w_in"]) + bias("b_in"))
    out = jnp.swapaxes(jnp.einsum("etf,efd->etd", hidden, params["w_out"]) + bias("b_out"), 0, 1)
    picked = jnp.take_along_axis(out, gating.experts[..., None], axis=1)
    return jnp.sum(picked * weights[..., None], axis=1).reshape(x.shape)


def gated(params: Any, config: moe.MoEConfig, x: jax.Array) -> Any:
    logits = x.reshape(-1, D) @ params["gate"]
    if "gate_bias" in params:
        logits = logits + params["gate_bias"]
    bias = params.get("choice_bias")
    options: Any = {"router": config.chosen_by, "bias": bias, "implementation": "reference"}
    return top_k_gating(logits, config.top_k, **options)


def mesh(devices: int = 8) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("expert",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("model", "top_k"), MODELS)
def test_the_layer_is_the_sum_over_chosen_experts(model: str, top_k: int, biased: bool) -> None:
    params, config = layer(
        router=model, top_k=top_k, gate_bias=biased, choice_bias=biased, biases=biased
    )
    x, upstream = normal(1, (B, S, D)), normal(2, (B, S, D))

    def ours(params: Any, x: Any) -> jax.Array:
        return jnp.sum(moe.apply(params, config, x)[0] * upstream)

    def hand(params: Any, x: Any) -> jax.Array:
        return jnp.sum(by_hand(params, config, x, gated(params, config, x)) * upstream)

    have, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(params, x) for f in (ours, hand))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), have, want)
    slopes = have[1][0]
    assert np.abs(slopes["gate"]).max() > 1e-3
    if biased:
        assert not slopes["choice_bias"].any()
        assert np.abs(slopes["gate_bias"]).max() > 1e-4


@pytest.mark.parametrize(("model", "top_k"), MODELS)
def test_extraction_is_exact_for_every_router(model: str, top_k: int) -> None:
    params, config = layer(
        router=model, top_k=top_k, routing="task", num_tasks=5, gate_bias=True, choice_bias=True,
        biases=True,
    )  # fmt: skip
    x = normal(3, (5, S, D))
    whole = moe.apply(params, config, x, task=jnp.arange(5))[0]
    smaller, static = moe.extract_tasks(params, config, [3, 1])
    for task in range(5):
        sub = moe.extract(params, config, task)
        one = moe.apply(params, config, x[task : task + 1], task=task)[0]
        np.testing.assert_array_equal(moe.ffn(sub, x[task : task + 1]), one)
        np.testing.assert_allclose(one[0], whole[task], rtol=2e-5, atol=2e-5)
    both = moe.apply(smaller, static, x[jnp.array([3, 1])], task=jnp.arange(2))[0]
    np.testing.assert_allclose(both, whole[jnp.array([3, 1])], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("model", "top_k"), [("deepseek_v3", 8), ("llama4", 1)])
@pytest.mark.parametrize("strategy", ["auto", "all_to_all", "ragged", "all_gather"])
def test_routers_on_a_mesh(strategy: str, model: str, top_k: int) -> None:
    params, config = layer(router=model, top_k=top_k, choice_bias=True, biases=True)
    x = normal(1, (B, S, D))
    want = moe.apply(params, config, x)[0]
    have = moe.apply(params, config, x, mesh=mesh(), strategy=strategy)[0]
    np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-5)


def test_biased_experts_whose_hidden_units_are_shared() -> None:
    params, config = layer(routing="task", num_tasks=3, biases=True)
    x, tasks = normal(1, (B, S, D)), jnp.arange(B) % 3
    shape = Mesh(
        np.array(jax.devices()).reshape(2, 2, 2),
        ("data", "expert", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
    )
    axes = moe.MeshAxes(batch="data", hidden="tensor")
    for task in (tasks, jnp.int32(1)):
        f = lambda p, m: moe.apply(p, config, x, task=task, mesh=m, axes=m and axes)[0]  # noqa: B023, E731
        np.testing.assert_allclose(f(params, shape), f(params, None), rtol=2e-5, atol=2e-5)
        loss = lambda p, m: jnp.sum(jnp.sin(f(p, m)))  # noqa: B023, E731
        have, want = (jax.grad(loss)(params, m) for m in (shape, None))
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)  # noqa: E731
        jax.tree.map(close, have, want)


def mine(x: jax.Array, gate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A router that the library does not know; one assignment in 7 goes nowhere."""
    scores = jnp.sin(x @ gate)
    value, experts = jax.lax.top_k(scores, 3)
    nowhere = jnp.arange(experts.size).reshape(experts.shape) % 7 == 0
    return jnp.where(nowhere, E, experts), value**2


@pytest.mark.parametrize("capacity", [None, 1.0])
@pytest.mark.parametrize("strategy", [None, "auto", "all_to_all", "ragged", "all_gather"])
def test_a_router_of_the_callers_own(strategy: str | None, capacity: float | None) -> None:
    params, config = layer(routing="given", top_k=3, capacity_factor=capacity)
    x, upstream, own = normal(1, (B, S, D)), normal(2, (B, S, D)), normal(3, (D, E))
    options: Any = {} if strategy is None else {"mesh": mesh(), "strategy": strategy}

    def ours(params: Any, x: Any, own: Any) -> Any:
        experts, weights = mine(x, own)
        y, report = moe.apply(params, config, x, experts=experts, weights=weights, **options)
        return jnp.sum(y * upstream), report

    def hand(params: Any, x: Any, own: Any) -> Any:
        experts, weights = (a.reshape(-1, 3) for a in mine(x, own))
        weights = jnp.where(experts < E, weights, 0)
        out = by_hand(params, config, x, _Pair(jnp.minimum(experts, E - 1), weights))
        return jnp.sum(out * upstream)

    (value, report), slopes = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(
        params, x, own
    )
    assert report.load.sum() < 1  # what goes nowhere is no load
    if capacity is None:
        want, by = jax.jit(jax.value_and_grad(hand, (0, 1, 2)))(params, x, own)
        np.testing.assert_allclose(value, want, rtol=1e-4)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)  # noqa: E731
        jax.tree.map(close, slopes, by)
        assert np.abs(slopes[2]).max() > 1e-3


def test_a_router_of_the_callers_own_by_remote_dma() -> None:
    params, config = layer(routing="given", top_k=3)
    x, own = normal(1, (B, 1, D)), normal(3, (D, E))

    def ours(params: Any, x: Any, own: Any, **options: Any) -> Any:
        experts, weights = mine(x, own)
        y = moe.apply(params, config, x, experts=experts, weights=weights, **options)[0]
        return jnp.sum(jnp.sin(y))

    run = jax.value_and_grad(ours, (0, 1, 2))
    want = jax.jit(run)(params, x, own)
    with running("mosaic"):
        on = functools.partial(run, mesh=mesh(), strategy="mosaic")
        have = jax.jit(on)(params, x, own)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)  # noqa: E731
    jax.tree.map(close, have, want)


class _Pair:
    def __init__(self, experts: Any, weights: Any) -> None:
        self.experts, self.weights = experts, weights


def test_a_planted_fault_in_the_weights_is_caught() -> None:
    params, config = layer(router="deepseek_v3", top_k=8)
    x = normal(1, (B, S, D))
    wrong = moe.MoEConfig(**{**config.__dict__, "router": ROUTERS["kimi_k2"]})
    have = moe.apply(params, wrong, x)[0]
    want = by_hand(params, config, x, gated(params, config, x))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(have, want, rtol=2e-4, atol=2e-4)


def test_balance_bias_evens_the_load() -> None:
    params, config = layer(router=Router("sigmoid"), top_k=2, choice_bias=True)
    params["choice_bias"] = jnp.zeros(E)
    x = normal(1, (64, S, D)) + 0.5
    step = jax.jit(lambda params: moe.apply(params, config, x)[1].load)
    first = step(params)
    for _ in range(60):
        params["choice_bias"] = moe.balance_bias(params["choice_bias"], step(params), 0.01)
    assert step(params).max() < 0.7 * first.max()
    np.testing.assert_allclose(
        moe.balance_bias(jnp.zeros(3), jnp.array([0.2, 0.3, 0.5])), [1e-3, 1e-3, -1e-3]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": "qwen"}, "router must be a Router, None or one of mixtral"),
        ({"router": Router(groups=5)}, "groups must divide the 16 experts, got groups=5"),
        ({"routing": "given", "choice_bias": True}, "choice_bias must not be given with"),
        ({"router": "llama4"}, "weighs inputs, which wants top_k=1, got 2"),
        ({"routing": "given", "router": "switch"}, "router must not be given with"),
        ({"second_policy": "sampling", "router": "kimi_k2"}, "give no router or bias"),
    ],
)
def test_configurations_that_do_not_fit(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**fields)


def test_calls_that_do_not_fit() -> None:
    x, ids, weights = jnp.ones((B, S, D)), jnp.zeros((B, S, 2), jnp.int32), jnp.ones((B, S, 2))
    params, config = layer(routing="given")
    with pytest.raises(ValueError, match="experts are not given and weights are not given"):
        moe.apply(params, config, x)
    with pytest.raises(ValueError, match="experts are given and weights are not given"):
        moe.apply(params, config, x, experts=ids)
    with pytest.raises(
        ValueError, match=r"weights must be \[B, S, k\] = \[8, 3, 2\], got \[8, 3, 1\]"
    ):
        moe.apply(params, config, x, experts=ids, weights=weights[..., :1])
    with pytest.raises(TypeError, match="experts must be of a dtype integer, got float32"):
        moe.apply(params, config, x, experts=weights, weights=weights)
    params, config = layer()
    with pytest.raises(ValueError, match="routing is 'token', experts are given"):
        moe.apply(params, config, x, experts=ids, weights=weights)
    grouped, tight = layer(router="deepseek_v2", top_k=2)
    with pytest.raises(ValueError, match="one group to prune"):
        moe.prune(grouped, tight, np.ones(E), 8)
