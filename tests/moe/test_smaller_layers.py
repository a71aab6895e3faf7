"""Static routing, several tasks cut out together, and pruning."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe import moe
from taskmoe.tests.moe import support

X = support.normal(3, 6, 5, 6)
TASK = np.array([0, 2, 1, 2, 0, 1], np.int32)
VALID = np.random.default_rng(0).random((6, 5)) < 0.8


def sixteen() -> moe.MoEConfig:
    return support.make(routing="task", num_tasks=16, num_experts=8, activation="silu", gated=True)


def test_three_of_sixteen_tasks_are_served_as_the_whole_layer_serves_them() -> None:
    config, chosen = sixteen(), (11, 0, 5)
    weights = support.params(config)
    small, smaller = moe.extract_tasks(weights, config, chosen)
    assert smaller.routing == "static"
    assert smaller.num_experts == small["w_in"].shape[0] <= 6
    assert set(small) == {"w_in", "w_out", "w_gate"}
    want, _ = support.apply(config, X, VALID, np.array(chosen, np.int32)[TASK])
    have, report = support.apply(smaller, X, VALID, TASK, weights=small)
    support.check(have, want)
    assert report.aux_loss == 0
    for i, task in enumerate(chosen):  # and once more, from the smaller layer
        ours = moe.ffn(moe.extract(small, smaller, i), X)
        support.check(ours, moe.ffn(moe.extract(weights, config, task), X))
    again, smallest = moe.extract_tasks(small, smaller, (2,))
    support.check(
        support.apply(smallest, X, None, TASK * 0, weights=again)[0],
        support.apply(config, X, None, TASK * 0 + 5)[0],
    )


def test_a_wrong_task_or_weight_is_noticed() -> None:
    config = sixteen()
    small, smaller = moe.extract_tasks(support.params(config), config, (11, 0, 5))
    have, _ = support.apply(smaller, X, VALID, TASK, weights=small)
    for wrong in ((0, 11, 5), (11, 0, 6)):
        want, _ = support.apply(config, X, VALID, np.array(wrong, np.int32)[TASK])
        with pytest.raises(AssertionError, match="relative error"):
            support.check(have, want)


def test_a_smaller_layer_survives_being_written_down() -> None:
    config = sixteen()
    _, smaller = moe.extract_tasks(support.params(config), config, (3, 4))
    fields = json.loads(json.dumps(dataclasses.asdict(smaller)))
    for name in ("table", "table_weights"):
        fields[name] = tuple(tuple(row) for row in fields[name])
    assert moe.MoEConfig(**fields) == smaller


def test_static_routing_is_a_weighted_sum_of_the_given_experts() -> None:
    table, weights = ((3, 1), (0, 2), (1, 0)), ((0.75, 0.25), (0.5, 0.5), (0.1, 0.9))
    for given in (None, weights):
        config = support.make(routing="static", table=table, table_weights=given)
        params = support.params(config)
        assert "gate" not in params
        y, report = support.apply(config, X, VALID, TASK)
        wide = {name: np.asarray(w, np.float64) for name, w in params.items()}
        for b in range(6):
            for s in range(5):
                row = np.asarray(X[b, s], np.float64)
                mix = given[TASK[b]] if given else (0.5, 0.5)
                parts = [
                    w * support.expert(config, wide, e, row)
                    for w, e in zip(mix, table[TASK[b]], strict=True)
                ]
                support.check(y[b, s], sum(parts) if VALID[b, s] else np.zeros(6))
        assert report.load_balance_loss == report.z_loss == report.aux_loss == 0


def test_pruning_keeps_the_busiest_experts_and_nothing_else_changes_between_them() -> None:
    config = support.make(num_experts=6)
    weights = support.params(config)
    load = [0.1, 0.3, 0.0, 0.3, 0.2, 0.1]
    small, smaller = moe.prune(weights, config, load, 3)
    assert smaller.num_experts == 3
    np.testing.assert_array_equal(small["w_in"], weights["w_in"][jnp.array([1, 3, 4])])
    # The same as closing the other experts' gates: x is positive, so such a column is hopeless.
    x = jnp.abs(X)
    closed = weights | {"gate": weights["gate"].at[:, jnp.array([0, 2, 5])].set(-1e6)}
    want, _ = support.apply(config, x, VALID, weights=closed)
    support.check(support.apply(smaller, x, VALID, weights=small)[0], want)
    other, _ = moe.prune(weights, config, load[::-1], 3)
    with pytest.raises(AssertionError, match="relative error"):
        support.check(support.apply(smaller, x, VALID, weights=other)[0], want)


def test_all_experts_kept_is_the_same_layer() -> None:
    config = support.make()
    small, same = moe.prune(support.params(config), config, np.ones(4), 4)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, small, support.params(config))


TASKS = {"routing": "task", "num_tasks": 3}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, c: moe.extract_tasks(p, c, ()), r"one or more different ids, got \(\)"),
        (lambda p, c: moe.extract_tasks(p, c, (1, 1)), r"different ids, got \(1, 1\)"),
        (lambda p, c: moe.extract_tasks(p, c, (3,)), r"task must be in \[0, 3\), got 3"),
        (lambda p, c: moe.prune(p, c, np.ones(4), 2), "must be 'token' or 'sentence' to prune"),
    ],
)
def test_wrong_calls_name_what_fits(call: Any, message: str) -> None:
    config = support.make(**TASKS)
    with pytest.raises(ValueError, match=message):
        call(support.params(config), config)
    token = support.make()
    with pytest.raises(ValueError, match=r"keep must be in \[2, 4\], got 1"):
        moe.prune(support.params(token), token, np.ones(4), 1)
    with pytest.raises(ValueError, match=r"usage must be \[4\], got \[3\]"):
        moe.prune(support.params(token), token, np.ones(3), 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"routing": "static"}, "table must be given with routing='static'"),
        ({"table": ((0, 1),)}, "table must be given with routing='static'"),
        ({"routing": "static", "table": ()}, "a row for each task, got none"),
        ({"routing": "static", "table": ((0, 0),)}, "2 different experts, got .0, 0."),
        ({"routing": "static", "table": ((0, 4),)}, r"experts in \[0, 4\), got .0, 4."),
        (
            {"routing": "static", "table": ((0, 1),), "table_weights": ((0.5, 0.0),)},
            "must be positive, got",
        ),
        ({"group_size": 4}, "group_size must be None without a capacity_factor"),
        ({"second_policy": "first"}, "second_policy must be one of"),
        ({"second_policy": "random"}, "give a capacity_factor"),
        ({**TASKS, "second_policy": "sampling"}, "second_policy must be 'all' with routing='task'"),
        ({**TASKS, "jitter": 0.1}, "jitter must be 0 with routing='task'"),
        ({"jitter": 1.5}, r"jitter must be in \[0, 1\), got 1.5"),
    ],
)
def test_configurations_name_the_field_that_does_not_fit(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        support.make(**fields)
