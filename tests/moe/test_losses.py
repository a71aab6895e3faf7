"""Metrics in cases whose answer is known without a computer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe import moe
from taskmoe.tests.moe import support
from taskmoe.tests.moe.test_meshes import mesh_of


def test_balanced_routing_has_load_balance_1_and_full_entropy() -> None:
    config = support.make(top_k=1)
    weights = support.params(config) | {"gate": jnp.eye(6, 4) * 3}
    x = jnp.eye(6)[jnp.arange(16) % 4].reshape(2, 8, 6)  # token i asks for expert i mod 4
    _, report = support.apply(config, x, weights=weights)
    support.check(report.load_balance_loss, 1.0, 1e-6)
    support.check(report.entropy, math.log(4), 1e-6)
    np.testing.assert_array_equal(report.load, np.full(4, 0.25))
    assert report.dropped == 0


def test_everything_on_one_expert_has_load_balance_near_E() -> None:
    config = support.make(top_k=1)
    weights = support.params(config) | {"gate": jnp.zeros((6, 4)).at[:, 2].set(5)}
    _, report = support.apply(config, jnp.ones((2, 8, 6)), weights=weights)
    support.check(report.load_balance_loss, 4.0)
    np.testing.assert_array_equal(report.load, [0, 0, 1, 0])
    assert report.entropy < 1e-5


@pytest.mark.parametrize("size", [0.0, 1.5])
def test_z_loss_is_the_squared_log_of_the_sum(size: float) -> None:
    config = support.make()
    weights = support.params(config) | {"gate": jnp.full((6, 4), size / 6)}
    _, report = support.apply(config, jnp.ones((1, 3, 6)), weights=weights)
    support.check(report.z_loss, (size + math.log(4)) ** 2, 1e-6)


def test_the_auxiliary_loss_weighs_both() -> None:
    x = support.normal(0, 2, 5, 6)
    config = support.make(load_balance_weight=0.5, z_loss_weight=0.25)
    _, report = support.apply(config, x)
    support.check(report.aux_loss, 0.5 * report.load_balance_loss + 0.25 * report.z_loss, 1e-6)
    with pytest.raises(AssertionError):
        support.check(report.aux_loss, 0.5 * report.load_balance_loss + 0.26 * report.z_loss, 1e-6)


@pytest.mark.parametrize("group_size", [None, 8])
def test_the_loss_over_all_choices_is_top_k_when_balanced(group_size: int | None) -> None:
    grouped = {} if group_size is None else {"group_size": group_size, "capacity_factor": 4.0}
    config = support.make(top_k=2, balance="all", **grouped)
    weights = support.params(config) | {"gate": jnp.zeros((6, 4))}  # all choose experts 0 and 1
    _, report = support.apply(config, jnp.ones((2, 8, 6)), weights=weights)
    support.check(report.load_balance_loss, 2.0, 1e-6)
    skewed = weights | {"gate": jnp.zeros((6, 4)).at[:, :2].set(5)}
    _, report = support.apply(config, jnp.ones((2, 8, 6)), weights=skewed)
    support.check(report.load_balance_loss, 4.0, 1e-5)  # E * (1 * 1/2 + 1 * 1/2)
    first = support.apply(support.make(top_k=2, **grouped), jnp.ones((2, 8, 6)), weights=skewed)
    support.check(first[1].load_balance_loss, 2.0, 1e-5)


@pytest.mark.parametrize("router", [None, "deepseek_v4", "kimi_k2"])
def test_the_loss_of_each_sequence_alone(router: str | None) -> None:
    config = support.make(top_k=2, balance="sequence", router=router)
    x, valid = support.normal(0, 3, 6, 6), np.ones((3, 6), bool)
    valid[1, 4:] = False
    _, report = support.apply(config, x, valid)
    z = np.asarray(x, np.float64) @ np.asarray(support.params(config)["gate"], np.float64)
    scores = {
        None: np.exp(z),
        "kimi_k2": 1 / (1 + np.exp(-z)),
        "deepseek_v4": np.sqrt(np.log1p(np.exp(z))),
    }[router]
    probs = scores / scores.sum(-1, keepdims=True)
    total = 0.0
    for b in range(3):
        best = np.argsort(-z[b][valid[b]], axis=1)[:, :2]
        f = np.bincount(best.reshape(-1), minlength=4) / best.size
        total += valid[b].sum() * 4 * float(f @ probs[b][valid[b]].mean(0))
    support.check(report.load_balance_loss, total / valid.sum(), 1e-6)
    on_mesh = moe.apply(
        support.params(config), config, x, valid=valid, mesh=mesh_of(("expert", 2))
    )[1]
    support.check(on_mesh, report)
    other = support.apply(support.make(top_k=2, balance="all", router=router), x, valid)[1]
    with pytest.raises(AssertionError):
        support.check(other.load_balance_loss, total / valid.sum(), 1e-6)


def test_every_balance_loss_is_the_same_on_a_mesh() -> None:
    x = support.normal(0, 4, 6, 6)
    for balance in ("first", "all", "sequence"):
        config = support.make(balance=balance)
        mesh = mesh_of(("expert", 4))
        value = lambda params, m: moe.apply(params, config, x, mesh=m)[1].aux_loss  # noqa: B023, E731
        have, want = (jax.value_and_grad(value)(support.params(config), m) for m in (mesh, None))
        support.check(have, want)
        assert np.abs(want[1]["gate"]).max() > 1e-5


def test_one_hot_traffic_drops_what_does_not_fit() -> None:
    config = support.make(capacity_factor=1.0)  # room for 2 * 16 / 4 = 8 of 16 tokens
    weights = support.params(config) | {"gate": jnp.zeros((6, 4)).at[:, :2].set(1)}
    y, report = support.apply(config, jnp.ones((2, 8, 6)), weights=weights)
    assert report.dropped == 0.5
    np.testing.assert_array_equal(report.load, [0.5, 0.5, 0, 0])  # before any capacity
    assert y[0].any(axis=-1).all()
    assert not y[1].any()


def test_a_load_of_other_experts_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"load must have shape \[4\], got \[3\]"):
        moe.balance_bias(jnp.zeros(4), jnp.ones(3))
    with pytest.raises(TypeError, match="bias must be bfloat16 or float32, got int"):
        moe.balance_bias(jnp.zeros(4, int), jnp.ones(4))
