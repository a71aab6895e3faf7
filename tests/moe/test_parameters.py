"""Parameters that are not those of the configuration are refused, not half used."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe import moe
from taskmoe.moe.parameters import shapes
from taskmoe.tests.moe import support

CONFIGS: list[dict[str, Any]] = [
    {},
    {"routing": "task", "gated": True, "biases": True, "gate_bias": True, "choice_bias": True},
    {"routing": "sentence", "gate_norm": 1e-6, "expert_scale": True, "shared": 4},
    {"routing": "static", "table": ((0, 1), (2, 3))},
    {"routing": "given", "gated": True, "shared": 4, "shared_gate": True},
]


@pytest.mark.parametrize("fields", CONFIGS)
def test_init_makes_what_shapes_says(fields: Any) -> None:
    config = support.make(**fields)
    params = moe.init(jax.random.key(0), config)
    assert {name: w.shape for name, w in params.items()} == shapes(config)


GATED = {"gated": True}
WRONG: list[tuple[Any, Any, type[Exception], str]] = [
    ({}, {"w_gate": jnp.ones((4, 6, 8))}, ValueError, "params must not hold w_gate"),
    ({}, {"gate_bias": jnp.ones(4)}, ValueError, "params must not hold gate_bias"),
    ({}, {"shared_in": jnp.ones((6, 8))}, ValueError, "params must not hold shared_in"),
    (GATED, {"w_gate": None}, ValueError, "params must hold w_gate by the configuration"),
    ({}, {"w_out": None}, ValueError, "params must hold w_out"),
    ({"biases": True}, {"b_out": None}, ValueError, "params must hold b_out"),
    ({"expert_scale": True}, {"expert_scale": None}, ValueError, "params must hold expert_scale"),
    (
        {},
        {"w_in": jnp.ones((5, 6, 8))},
        ValueError,
        r"params\['w_in'\] must be \[E, D, F\] = \[4, 6, 8\] .*got \[5, 6, 8\]",
    ),
    ({}, {"w_in": jnp.ones((4, 6, 9))}, ValueError, r"params\['w_in'\] must be .*\[4, 6, 9\]"),
    ({}, {"gate": jnp.ones((6, 3))}, ValueError, r"params\['gate'\] must be \[D, E\] = \[6, 4\]"),
    ({}, {"gate": jnp.ones((6, 4), int)}, TypeError, r"params\['gate'\] must be bfloat16 or"),
    ({}, {"gate": jnp.ones((6, 4), "float16")}, TypeError, r"params\['gate'\] .*got float16"),
]


@pytest.mark.parametrize(("fields", "change", "error", "message"), WRONG)
def test_what_does_not_fit_is_named(
    fields: Any, change: Any, error: type[Exception], message: str
) -> None:
    config = support.make(routing="task", d_ff=8, **fields)
    params = moe.init(jax.random.key(0), config) | change
    params = {name: w for name, w in params.items() if w is not None}
    x = jnp.ones((2, 3, config.d_model))
    for task in (1, np.array([1, 1])):
        with pytest.raises(error, match=message):
            moe.apply(params, config, x, task=task)
    with pytest.raises(error, match=message):
        moe.extract(params, config, 1)
    with pytest.raises(error, match=message):
        moe.extract_tasks(params, config, [1])


def test_what_is_no_dictionary_is_named() -> None:
    config = support.make()
    with pytest.raises(TypeError, match="params must be a dict as `init` makes it, got NoneType"):
        moe.apply(None, config, jnp.ones((2, 3, 6)))
    with pytest.raises(TypeError, match="params must be a dict as `init` makes it, got list"):
        moe.prune([], config, np.ones(4), 2)


def test_choices_that_are_given_need_no_gate_and_may_have_one() -> None:
    gated, given = (support.make(routing=routing) for routing in ("token", "given"))
    x, params = jnp.ones((2, 3, 6)), support.params(gated) | {"gate_bias": jnp.ones(4)}
    chosen = {"experts": jnp.ones((2, 3, 2), int) * jnp.arange(2), "weights": jnp.ones((2, 3, 2))}
    found = moe.apply(params, given, x, **chosen)
    without = {name: w for name, w in params.items() if "gate" not in name}
    jax.tree.map(np.testing.assert_array_equal, found, moe.apply(without, given, x, **chosen))
    with pytest.raises(ValueError, match="params must not hold expert_scale"):
        moe.apply(params | {"expert_scale": jnp.ones(4)}, given, x, **chosen)


def test_what_the_layer_does_not_know_is_left_alone() -> None:
    config, x = support.make(), jnp.ones((2, 3, 6))
    params = support.params(config)
    found = moe.apply(params | {"norm": jnp.ones(6)}, config, x)
    jax.tree.map(np.testing.assert_array_equal, found, moe.apply(params, config, x))
