"""What a layer chose: returned, replayed, a function's, of another tensor, renormalised."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe import moe
from taskmoe.moe import gates, routing
from taskmoe.tests.kernels.support import planted
from taskmoe.tests.moe import support
from taskmoe.tests.moe.test_meshes import mesh_of

E = 8


def made(**fields: Any) -> moe.MoEConfig:
    return support.make(**{"num_experts": E, "d_ff": 8} | fields)


X = support.normal(1, 4, 6, 6)
STRATEGIES = [None, "all_to_all", "ragged", "all_gather"]


def on(strategy: str | None) -> dict[str, Any]:
    return {} if strategy is None else {"mesh": mesh_of(("expert", 4)), "strategy": strategy}


def gradients(config: moe.MoEConfig, **options: Any) -> Any:
    def loss(params: Any, x: Any) -> Any:
        y, report = moe.apply(params, config, x, **options)
        return jnp.sum(jnp.sin(y)) + report.aux_loss, (y, report)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(support.params(config), X)


@pytest.mark.parametrize(
    ("strategy", "router"),
    [
        *((name, "gemma4") for name in STRATEGIES),
        *((None, name) for name in (None, "deepseek_v4", "olmoe")),
    ],
)
def test_a_choice_is_returned_and_replayed(strategy: str | None, router: str | None) -> None:
    scaled = {"gate_norm": 1e-6, "expert_scale": True} if router == "gemma4" else {}
    config = made(router=router, top_k=3, **scaled)
    y, report, chosen = moe.apply(
        support.params(config), config, X, return_chosen=True, **on(strategy)
    )
    assert chosen.experts.shape == chosen.weights.shape == (4, 6, 3)
    assert chosen.experts.dtype == jnp.int32
    np.testing.assert_allclose(
        np.bincount(np.ravel(chosen.experts), minlength=E) / 72,
        report.load,
        rtol=1e-6,
    )
    # Weighed by the gate again, with all gradients; or given, weights and all.
    again = gradients(config, experts=chosen.experts, **on(strategy))
    support.check(again, gradients(config), 2e-5)
    given = made(routing="given", top_k=3)
    only = {n: w for n, w in support.params(config).items() if n.startswith("w_")}
    told = {"experts": chosen.experts, "weights": chosen.weights}
    np.testing.assert_allclose(moe.apply(only, given, X, **told)[0], y, rtol=1e-5, atol=1e-6)
    others = jnp.roll(chosen.experts, 1, axis=0)
    with pytest.raises(AssertionError):
        support.check(moe.apply(support.params(config), config, X, experts=others)[0], y, 1e-2)


def test_choices_of_sequences_and_of_one_task() -> None:
    for routing_, task in (("sentence", None), ("task", jnp.array([0, 1, 1, 2])), ("task", 1)):
        config = made(routing=routing_)
        options: Any = {"task": task, "return_chosen": True}
        chosen = moe.apply(support.params(config), config, X, **options)[2]
        assert chosen.experts.shape == (4, 2)
        mesh = mesh_of(("expert", 4))
        same = moe.apply(support.params(config), config, X, mesh=mesh, **options)[2]
        np.testing.assert_array_equal(chosen.experts, same.experts)
        np.testing.assert_allclose(chosen.weights, same.weights, rtol=1e-6)
        np.testing.assert_allclose(chosen.weights.sum(1), 1, rtol=1e-6)


def test_choices_inside_a_shard_map_over_some_axes() -> None:
    config, mesh = made(), mesh_of(("data", 2), ("expert", 4))
    spec, params = jax.sharding.PartitionSpec("data"), support.params(config)

    def inside(x: Any) -> Any:
        return moe.apply(params, config, x, return_chosen=True)[2]

    run = jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"data"})
    have, want = jax.jit(run)(X), inside(X)
    np.testing.assert_array_equal(have.experts, want.experts)
    np.testing.assert_allclose(have.weights, want.weights, rtol=1e-6)


def test_an_expert_that_is_none_gets_nothing_when_replayed() -> None:
    config = made()
    experts = jnp.full((4, 6, 2), E).at[..., 0].set(3)
    y, report = moe.apply(support.params(config), config, X, experts=experts)
    np.testing.assert_allclose(report.load, np.eye(E)[3] / 2)
    assert np.isfinite(y).all()
    alone = made(balance="sequence")
    _, report = moe.apply(support.params(alone), alone, X, experts=experts)
    logits = X.reshape(-1, 6) @ support.params(alone)["gate"]
    share = np.asarray(jax.nn.softmax(logits, axis=1))[:, 3].mean()
    np.testing.assert_allclose(report.load_balance_loss, E * share / 2, rtol=1e-5)


def mine(logits: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    values, experts = jax.lax.top_k(jnp.sin(logits), top_k)
    return experts, values**2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_router_that_is_a_function(strategy: str | None) -> None:
    config, plain = made(router=mine), made()
    have = gradients(config, **on(strategy))

    def loss(params: Any, x: Any) -> Any:
        experts, weights = mine(x.reshape(-1, 6) @ params["gate"], 2)
        told = {"experts": experts.reshape(4, 6, 2), "weights": weights.reshape(4, 6, 2)}
        only = {n: w for n, w in params.items() if n != "gate"}
        y, _ = moe.apply(only, made(routing="given"), x, **told)
        # The losses are those of a softmax; only first choices differ.
        _, report = moe.apply(params, plain, x, experts=told["experts"])
        return jnp.sum(jnp.sin(y)) + report.aux_loss, (y, report)

    want = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(support.params(config), X)
    support.check(have, want)
    assert np.abs(have[0][0]["gate"]).max() > 1e-3


def test_a_function_may_take_every_level_and_a_wrong_one_is_an_error() -> None:
    config = made(router=mine, routing="task")
    task = jnp.array([0, 2, 1, 1])
    whole = moe.apply(support.params(config), config, X, task=task)[0]
    for i in range(4):
        small = moe.extract(support.params(config), config, int(task[i]))
        support.check(moe.ffn(small, X[i]), whole[i])
    wrong = made(router=lambda logits, top_k: mine(logits, top_k + 1))
    with pytest.raises(ValueError, match=r"router must return experts \[U, k\] = \[24, 2\], got"):
        moe.apply(support.params(wrong), wrong, X)


def test_the_gate_sees_another_tensor() -> None:
    config, seen = made(), support.normal(9, 4, 6, 6)
    chosen = moe.apply(support.params(config), config, seen, return_chosen=True)[2]
    y = moe.apply(support.params(config), config, X, gate_input=seen)[0]
    want = moe.apply(support.params(config), config, X, experts=chosen.experts, gate_input=seen)
    support.check(y, want[0], 1e-6)
    support.check(
        y, moe.apply(support.params(config), config, X, gate_input=seen, **on("ragged"))[0]
    )
    with pytest.raises(AssertionError):
        support.check(y, moe.apply(support.params(config), config, X)[0], 1e-2)
    slope = jax.grad(lambda s: moe.apply(support.params(config), config, X, gate_input=s)[0].sum())(
        seen
    )
    assert np.abs(slope).max() > 1e-3


def test_padding_gives_zeros_and_is_not_looked_at() -> None:
    """Also where experts make something of zeros, and sequences are routed whole."""
    valid = jnp.ones((4, 6), bool).at[1, 3:].set(False).at[2].set(False)
    dirty = jnp.where(valid[..., None], X, jnp.nan)
    for fields in ({"biases": True}, {"activation": jax.nn.sigmoid, "shared": 4}):
        for level, task in (("token", None), ("sentence", None), ("task", 1), ("task", None)):
            config: Any = made(routing=level, **fields)
            params = support.params(config)
            params = {n: w + 0.3 if n.startswith("b_") else w for n, w in params.items()}
            if level == "task":
                task = jnp.arange(4) % 3 if task is None else task
            told: Any = {"gate_input": dirty} if level == "token" else {}

            def loss(params: Any, told: Any = told, task: Any = task, config: Any = config) -> Any:
                y, _ = moe.apply(params, config, dirty, valid=valid, task=task, **told)
                return jnp.sum(jnp.sin(y)), y

            slopes, y = jax.grad(loss, has_aux=True)(params)
            assert not np.asarray(y)[~np.asarray(valid)].any()
            assert np.abs(np.asarray(y)[np.asarray(valid)]).min() > 0
            jax.tree.map(lambda a: np.testing.assert_array_equal(np.isfinite(a), True), slopes)


def test_weights_after_dropping_sum_to_what_they_were() -> None:
    config = made(capacity_factor=0.5, renormalise=True)
    plain = made(capacity_factor=0.5)
    params = support.params(config)
    logits = X.reshape(-1, 6) @ params["gate"]
    valid = jnp.ones(24, bool)
    have = routing.assign(config, logits, valid, routing.Noise(), None)
    want = routing.assign(plain, logits, valid, routing.Noise(), None)
    np.testing.assert_array_equal(have.plan.rows, want.plan.rows)
    placed = np.asarray(want.plan.rows < want.plan.num_rows)
    assert 0 < placed.sum() < placed.size
    alone = placed.sum(1) == 1
    assert alone.any()
    weights, before = np.asarray(have.gating.weights), np.asarray(want.gating.weights)
    np.testing.assert_allclose(weights[placed & alone[:, None]], 1, rtol=1e-6)
    np.testing.assert_allclose(weights[placed.all(1)], before[placed.all(1)], rtol=1e-6)
    assert not weights[~placed].any()
    assert np.abs(before[placed & alone[:, None]] - 1).max() > 0.1


def test_a_planted_fault_in_replay_is_caught() -> None:
    config = made(top_k=3)
    y, _, chosen = moe.apply(support.params(config), config, X, return_chosen=True)

    def turned(router: Any, chosen: Any, softmax: Any) -> Any:
        return list(reversed(right(router, chosen, softmax)))

    right = gates.weigh
    with planted(gates, "weigh", turned):
        wrong = moe.apply(support.params(config), config, X, experts=chosen.experts)[0]
    with pytest.raises(AssertionError):
        support.check(wrong, y, 1e-3)


def test_all_of_it_under_vmap_and_strict_promotion() -> None:
    fields: dict[str, Any] = {"gate_norm": 1e-6, "expert_scale": True, "gated": True}
    fields |= {"shared": 4, "shared_gate": True, "balance": "sequence"}
    config = made(router="gemma4", capacity_factor=1.0, renormalise=True, **fields)
    params = support.params(config)
    pair = jnp.stack([X, X[::-1] * 2])

    def all_of_it(params: Any, x: Any) -> Any:
        y, report, chosen = moe.apply(params, config, x, gate_input=x, return_chosen=True)
        again = moe.apply(params, config, x, experts=chosen.experts)[0]
        return y, again, report.aux_loss, chosen

    def slopes(params: Any, x: Any) -> Any:
        return jax.grad(lambda p: sum(jnp.sum(part) for part in all_of_it(p, x)[:3]))(params)

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        assert all_of_it(narrow, X.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16
        for f in (all_of_it, slopes):
            many = jax.vmap(f, (None, 0))(params, pair)
            for i in range(2):
                one = jax.jit(f)(params, pair[i])
                support.check(jax.tree.map(lambda a, i=i: a[i], many), one)
        experts, weights = moe.sparse_mixer(jnp.array([[1.0, 1.01, 0.5]]), 2)
        np.testing.assert_array_equal(experts, [[1, 0]])
        np.testing.assert_allclose(weights, [[1 / (1 + np.exp(-0.01)), 1.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": mine, "choice_bias": True}, "choice_bias must be False with a router that is"),
        ({"gate_norm": 0.0}, "gate_norm must be None or above 0, got 0.0"),
        ({"renormalise": True}, "renormalise must be False without a capacity_factor"),
        ({"routing": "given", "expert_scale": True}, "expert_scale must be False with routing"),
        ({"balance": "last"}, "balance must be one of .*, got 'last'"),
        ({"balance": "sequence", "routing": "task"}, "balance 'sequence' wants routing='token'"),
    ],
)
def test_configurations_that_do_not_fit(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**fields)


def test_calls_that_do_not_fit() -> None:
    config, task = made(), made(routing="task")
    ids = jnp.zeros((4, 6, 2), jnp.int32)
    with pytest.raises(ValueError, match="gate_input must be given with routing='token' only"):
        moe.apply(support.params(task), task, X, task=jnp.zeros(4, jnp.int32), gate_input=X)
    with pytest.raises(ValueError, match=r"gate_input must have shape \[4, 6, 6\]"):
        moe.apply(support.params(config), config, X, gate_input=X[..., :5])
    with pytest.raises(ValueError, match="routing is 'task', experts are given"):
        moe.apply(support.params(task), task, X, task=jnp.zeros(4, jnp.int32), experts=ids)
    function = made(router=mine)
    with pytest.raises(ValueError, match="experts must not be given alone with a router that is a"):
        moe.apply(support.params(function), function, X, experts=ids)
