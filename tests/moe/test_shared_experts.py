"""Experts that every token passes: added to the routed ones, on meshes, in extracted layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from taskmoe import moe
from taskmoe.moe import extraction
from taskmoe.tests.kernels.support import planted, running
from taskmoe.tests.moe import support
from taskmoe.tests.moe.test_meshes import all_of, framework, mesh_of

KINDS: list[dict[str, Any]] = [
    {"shared": 6},
    {"shared": 4, "gated": True, "activation": "silu"},
    {"shared": 10, "gated": True, "activation": "silu", "shared_gate": True},
    {"shared": 4, "shared_gate": True, "biases": True},
]


def made(**fields: Any) -> moe.MoEConfig:
    return support.make(**{"num_experts": 8, "d_ff": 8} | fields)


def by_hand(config: moe.MoEConfig, params: Any, x: Any) -> np.ndarray:
    """The shared expert alone, in float64."""
    p = {name: np.asarray(w, np.float64) for name, w in params.items()}
    x, act = np.asarray(x, np.float64), support.ACTIVATIONS[config.activation]
    hidden = x @ p["shared_in"]
    hidden = act(x @ p["shared_gate_in"]) * hidden if config.gated else act(hidden)
    y = hidden @ p["shared_out"]
    return y / (1 + np.exp(-(x @ p["shared_gate"]))) if config.shared_gate else y


def without(config: moe.MoEConfig, params: Any) -> Any:
    """The same layer without its shared expert."""
    fields = {**config.__dict__, "shared": 0, "shared_gate": False}
    return moe.MoEConfig(**fields), {n: w for n, w in params.items() if not n.startswith("shared")}


@pytest.mark.as_shipped
@pytest.mark.parametrize("fields", KINDS)
@pytest.mark.parametrize("routing", ["token", "sentence", "task"])
def test_the_shared_expert_is_added(routing: Any, fields: Any) -> None:
    config = made(routing=routing, **fields)
    params, x = support.params(config), support.normal(1, 4, 3, 6)
    valid = jnp.ones((4, 3), bool).at[1, 2].set(False)
    task = jnp.array([0, 2, 1, 0]) if routing == "task" else None
    y, report = support.apply(config, x, valid, task)
    other, routed = without(config, params)
    want, same = support.apply(other, x, valid, task, weights=routed)
    shared = np.where(valid[..., None], by_hand(config, params, x), 0)
    support.check(y, want + shared, 1e-6)
    support.check(report, same, 1e-6)
    with pytest.raises(AssertionError):
        support.check(y, want + 1.00001 * shared, 1e-6)


@pytest.mark.parametrize("fields", KINDS)
def test_gradients_are_those_of_the_sum(fields: Any) -> None:
    config = made(**fields)
    params, x, upstream = support.params(config), *(support.normal(i, 2, 3, 6) for i in (1, 2))

    def hand(params: Any, x: Any) -> Any:
        other, routed = without(config, params)
        act = {"relu": jax.nn.relu, "silu": jax.nn.silu}[str(config.activation)]
        hidden = x @ params["shared_in"]
        hidden = act(x @ params["shared_gate_in"]) * hidden if config.gated else act(hidden)
        y = hidden @ params["shared_out"]
        if config.shared_gate:
            y = y * jax.nn.sigmoid(x @ params["shared_gate"])
        return jnp.sum((moe.apply(routed, other, x)[0] + y) * upstream)

    def ours(params: Any, x: Any) -> Any:
        return jnp.sum(moe.apply(params, config, x)[0] * upstream)

    have, want = (jax.jit(jax.grad(f, (0, 1)))(params, x) for f in (ours, hand))
    support.check(have, want, 1e-5)


@pytest.mark.parametrize("strategy", ["auto", "all_to_all", "ragged", "all_gather"])
@pytest.mark.parametrize("fields", KINDS[2:])
def test_on_a_mesh_that_cuts_experts_and_hidden_units(fields: Any, strategy: str) -> None:
    config = made(**fields)
    params, x = support.params(config), support.normal(1, 4, 3, 6)
    mesh, axes = framework()
    have = jax.jit(all_of(config, mesh=mesh, axes=axes, strategy=strategy))(params, x)
    support.check(have, jax.jit(all_of(config))(params, x))


def test_beside_rows_that_a_kernel_sends() -> None:
    config = made(**KINDS[2])
    params, x = support.params(config), support.normal(1, 2, 3, 6)
    mesh = mesh_of(("expert", 2))
    with running("mosaic"):
        run = jax.jit(lambda p, x: moe.apply(p, config, x, mesh=mesh, strategy="mosaic")[0])
        have = np.asarray(run(params, x))
    support.check(have, moe.apply(params, config, x)[0])


def test_on_explicit_axes_and_with_a_batch_that_does_not_divide() -> None:
    config = made(**KINDS[2])
    params, x = support.params(config), support.normal(1, 3, 3, 6)
    want = jax.jit(all_of(config))(params, x)
    support.check(all_of(config, mesh=mesh_of(("expert", 8)))(params, x), want)
    mesh = mesh_of(("data", 2), ("expert", 4), kind=jax.sharding.AxisType.Explicit)
    with jax.set_mesh(mesh):
        y, _, chosen = moe.apply(params, config, x, return_chosen=True)
    np.testing.assert_allclose(y, want[1][0], rtol=1e-5, atol=1e-5)
    alone = moe.apply(params, config, x, return_chosen=True)[2]
    np.testing.assert_array_equal(chosen.experts, alone.experts)


@pytest.mark.parametrize("fields", KINDS[2:])
def test_a_task_on_a_mesh(fields: Any) -> None:
    config = made(routing="task", **fields)
    params, x = support.params(config), support.normal(1, 4, 3, 6)
    mesh, axes = framework()
    for task in (jnp.int32(1), jnp.array([0, 2, 1, 1])):
        have = jax.jit(all_of(config, mesh=mesh, axes=axes, task=task))(params, x)
        support.check(have, jax.jit(all_of(config, task=task))(params, x))


def test_where_its_parameters_lie() -> None:
    config = made(**KINDS[2])
    specs = moe.param_specs(support.params(config), framework()[1])
    assert specs["shared_in"] == specs["shared_gate_in"] == P(None, ("tensor",))
    assert specs["shared_out"] == P(("tensor",))
    assert specs["shared_gate"] == P()
    plain = moe.param_specs(support.params(config))
    assert plain["shared_in"] == plain["shared_out"] == P()


@pytest.mark.parametrize("fields", KINDS)
def test_smaller_layers_keep_it(fields: Any) -> None:
    config = made(routing="task", top_k=3, **fields)
    params, x = support.params(config), support.normal(1, 3, 5, 6)
    whole = support.apply(config, x, None, jnp.arange(3))[0]
    for task in range(3):
        small = moe.extract(params, config, task)
        assert small.w_in.shape == (6, 3 * 8 + config.shared)
        one = moe.apply(params, config, x[task : task + 1], task=task)[0]
        np.testing.assert_array_equal(moe.ffn(small, x[task : task + 1]), one)
        support.check(one[0], whole[task])
    smaller, static = moe.extract_tasks(params, config, [2, 0])
    both = moe.apply(smaller, static, x[jnp.array([2, 0])], task=jnp.arange(2))[0]
    support.check(both, whole[np.array([2, 0])])
    by_token = made(**fields)
    kept, pruned = moe.prune(support.params(by_token), by_token, np.arange(8), 4)
    want = by_hand(pruned, kept, x)
    other, routed = without(pruned, kept)
    support.check(moe.apply(kept, pruned, x)[0] - moe.apply(routed, other, x)[0], want, 2e-6)


def test_a_planted_fault_in_the_fold_is_caught() -> None:
    config = made(routing="task", **KINDS[2])
    params, x = support.params(config), support.normal(1, 1, 5, 6)
    right = extraction._joined
    want = moe.apply(params, config, x, task=jnp.array([1]))[0]

    def forgotten(routed: Any, shared: Any) -> Any:
        joined = right(routed, shared)
        return moe.FFNParams(**{**joined.__dict__, "shared": joined.shared - 1})

    support.check(moe.ffn(moe.extract(params, config, 1), x), want)
    with planted(extraction, "_joined", forgotten), pytest.raises(AssertionError):
        support.check(moe.ffn(moe.extract(params, config, 1), x), want)


def test_it_takes_bfloat16() -> None:
    config = made(**KINDS[2], d_model=32)
    params = support.params(config)
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), narrow)
    x = support.normal(1, 2, 4, 32).astype(jnp.bfloat16)
    y = moe.apply(narrow, config, x)[0]
    assert y.dtype == jnp.bfloat16
    want = moe.apply(wide, config, x.astype(jnp.float32))[0]
    support.check(y, want, 2 * float(jnp.finfo(jnp.bfloat16).eps))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared": -1}, "shared must be an int of at least 0, got -1"),
        ({"shared_gate": True}, "shared_gate must be False without a shared expert"),
    ],
)
def test_configurations_that_do_not_fit(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**fields)


def test_hidden_units_that_the_mesh_does_not_divide() -> None:
    config, (mesh, axes) = made(shared=5), framework()
    with pytest.raises(ValueError, match="mesh axis 'tensor' must divide shared=5, got size 2"):
        moe.apply(support.params(config), config, support.normal(1, 4, 3, 6), mesh=mesh, axes=axes)
