"""A task's sub-network equals the full layer, and a wrong one is noticed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe import moe
from taskmoe.tests.moe import support

KINDS = [("relu", False), ("gelu", False), ("silu", False), ("silu", True)]


def disagreement(ffn_params: moe.FFNParams, config: Any, weights: Any, task: int) -> float:
    """Largest difference from the full layer, relative to its largest output."""
    x = support.normal(3, 4, 7, 6)
    full = support.apply(config, x, None, np.full(4, task, np.int32), weights=weights)[0]
    small = np.asarray(support.run_ffn(ffn_params, x))
    return float(np.abs(small - full).max() / np.abs(full).max())


@pytest.mark.as_shipped
@pytest.mark.parametrize(
    ("activation", "gated", "top_k"),
    [*((*kind, 2) for kind in KINDS), ("relu", False, 1), ("gelu", True, 3)],
)
def test_the_sub_network_is_the_full_layer(activation: Any, gated: bool, top_k: int) -> None:
    config = support.make(routing="task", activation=activation, gated=gated, top_k=top_k)
    for task in range(config.num_tasks):
        small = support.extract(support.params(config), config, task)
        assert small.w_in.shape == (6, 5 * top_k)
        assert small.w_out.shape == (5 * top_k, 6)
        assert (small.w_gate is not None) == gated
        assert small.activation == activation
        assert disagreement(small, config, support.params(config), task) <= 1e-5


@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_a_wrong_sub_network_is_noticed(activation: Any, gated: bool) -> None:
    config = support.make(routing="task", activation=activation, gated=gated)
    weights = support.params(config)
    small = support.extract(weights, config, 1)
    second = slice(5, 10)  # the second expert's rows
    wrong_gate = dataclasses.replace(small, w_out=small.w_out.at[second].multiply(1.01))
    assert disagreement(wrong_gate, config, weights, 1) > 1e-4
    assert disagreement(support.extract(weights, config, 2), config, weights, 1) > 1e-2
    other = dataclasses.replace(small, activation="relu" if activation != "relu" else "silu")
    assert disagreement(other, config, weights, 1) > 1e-3
    if gated:
        swapped = dataclasses.replace(small, w_in=small.w_gate, w_gate=small.w_in)
        assert disagreement(swapped, config, weights, 1) > 1e-3


def test_extraction_in_bfloat16_is_within_its_rounding() -> None:
    config = support.make(routing="task", d_model=32, d_ff=64)
    weights = jax.tree.map(lambda w: w.astype(jnp.bfloat16), support.params(config))
    x = support.normal(0, 2, 8, 32).astype(jnp.bfloat16)
    full, _ = support.compiled(config)(weights, x, None, np.full(2, 1, np.int32), None)
    small = support.run_ffn(support.extract(weights, config, 1), x)
    assert full.dtype == small.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), weights)
    exact = np.asarray(support.run_ffn(support.extract(wide, config, 1), x.astype(jnp.float32)))
    scale = np.abs(exact).max()
    errors = [np.abs(np.asarray(y, np.float32) - exact).max() / scale for y in (full, small)]
    assert max(errors) <= 2 * float(jnp.finfo(jnp.bfloat16).eps)


def test_a_traced_task_extracts_under_jit() -> None:
    config = support.make(routing="task")
    weights = support.params(config)
    found = jax.jit(lambda task: moe.extract(weights, config, task))(np.int32(2))
    support.check(found, moe.extract(weights, config, 2), 1e-6)
    clamped = jax.jit(lambda task: moe.extract(weights, config, task))(np.int32(50))
    jax.tree.map(np.testing.assert_array_equal, clamped, found)


@pytest.mark.parametrize("task", [-1, 3, np.int32(3), np.array(-1), jnp.array(3)])
def test_a_task_that_is_not_there_is_an_error(task: Any) -> None:
    config = support.make(routing="task")
    with pytest.raises(ValueError, match=r"task must be in \[0, 3\), got"):
        moe.extract(support.params(config), config, task)


@pytest.mark.parametrize("task", [True, 1.0, [0, 1], np.array([1])])
def test_what_is_no_task_is_an_error(task: Any) -> None:
    config = support.make(routing="task")
    with pytest.raises(TypeError, match="task must be one integer, got"):
        moe.extract(support.params(config), config, task)


def test_tasks_may_be_an_array() -> None:
    config = support.make(routing="task")
    wanted = moe.extract_tasks(support.params(config), config, [2, 0])
    for tasks in (np.array([2, 0]), jnp.array([2, 0]), [jnp.array(2), np.int64(0)]):
        found = moe.extract_tasks(support.params(config), config, tasks)
        assert found[1] == wanted[1]
        jax.tree.map(np.testing.assert_array_equal, found[0], wanted[0])


@pytest.mark.parametrize("routing", ["token", "sentence"])
def test_only_task_routing_has_sub_networks(routing: Any) -> None:
    config = support.make(routing=routing)
    with pytest.raises(
        ValueError, match=f"routing must be 'task' or 'static' to extract.*{routing}"
    ):
        moe.extract(support.params(config), config, 0)


def test_ffn_names_the_argument_that_does_not_fit() -> None:
    config = support.make(routing="task")
    small = moe.extract(support.params(config), config, 0)
    with pytest.raises(TypeError, match="params must be FFNParams, got dict"):
        moe.ffn({}, jnp.ones((2, 6)))
    for wrong in (jnp.ones((2, 7)), jnp.ones(())):
        with pytest.raises(ValueError, match=r"x must be \[..., D\] with D=6, got"):
            moe.ffn(small, wrong)
    for name in ("tanh", "gpt_oss"):  # the second wants gated experts
        with pytest.raises(ValueError, match=f"activation must be one of .*got '{name}'"):
            moe.ffn(dataclasses.replace(small, activation=name), jnp.ones((2, 6)))
