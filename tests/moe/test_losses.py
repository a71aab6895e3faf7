"""Metrics in cases whose answer is known without a computer."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.tests.moe import support


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


def test_one_hot_traffic_drops_what_does_not_fit() -> None:
    config = support.make(capacity_factor=1.0)  # room for 2 * 16 / 4 = 8 of 16 tokens
    weights = support.params(config) | {"gate": jnp.zeros((6, 4)).at[:, :2].set(1)}
    y, report = support.apply(config, jnp.ones((2, 8, 6)), weights=weights)
    assert report.dropped == 0.5
    np.testing.assert_array_equal(report.load, [0.5, 0.5, 0, 0])  # before any capacity
    assert y[0].any(axis=-1).all()
    assert not y[1].any()
