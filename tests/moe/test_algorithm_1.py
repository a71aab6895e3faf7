"""Capacity routing against a NumPy transcription of GShard's Algorithm 1, all three policies."""

import math
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from taskmoe.moe.routing import Noise, assign
from taskmoe.tests.moe import support

EXPERTS = 4


class Routed(NamedTuple):
    """Combine weights [U, E] (0 where dropped), load-balance loss, queue lengths [E]."""

    combine: np.ndarray
    balance: float
    queue: np.ndarray


def algorithm_1(config: Any, logits: Any, valid: Any, draws: Any) -> Routed:
    """GShard, Algorithm 1, group by group and token by token, in float64."""
    logits = np.asarray(logits, np.float64)
    units = len(logits)
    size = config.group_size or units
    room = math.ceil(config.capacity_factor * 2 * size / EXPERTS)
    combine, whole_queue = np.zeros((units, EXPERTS)), np.zeros(EXPERTS, int)
    losses = []
    for group in range(0, units, size):
        members = [u for u in range(group, group + size) if valid[u]]
        queue, first, chosen = np.zeros(EXPERTS, int), np.zeros(EXPERTS), {}
        gates = {u: np.exp(logits[u]) / np.exp(logits[u]).sum() for u in members}
        for u in members:
            g = gates[u]
            e1 = int(np.argmax(g))
            second = np.delete(np.arange(EXPERTS), e1)
            score = logits[u]
            if config.second_policy == "sampling":
                score = logits[u] - np.log(-np.log(np.maximum(draws[u], 1e-38)))
            e2 = int(second[np.argmax(score[second])])
            chosen[u] = e1, e2
            first[e1] += 1
            if queue[e1] < room:
                combine[u, e1] = g[e1] / (g[e1] + g[e2])
            queue[e1] += 1
        for u in members:
            e1, e2 = chosen[u]
            g2 = gates[u][e2] / (gates[u][e1] + gates[u][e2])
            lucky = config.second_policy != "random" or draws[u, 0] < 2 * g2
            if queue[e2] < room and lucky:
                combine[u, e2] = g2
            queue[e2] += 1
        whole_queue += queue
        if members:
            mean = np.mean([gates[u] for u in members], axis=0)
            losses.append((len(members), EXPERTS * float(first / len(members) @ mean)))
    weights = [n for n, _ in losses] or [1]
    balance = float(np.average([loss for _, loss in losses] or [0.0], weights=weights))
    return Routed(combine, balance, whole_queue)


def ours(config: Any, logits: Any, valid: Any, draws: Any) -> Routed:
    policies = {"all": None, "random": draws[:, :1], "sampling": draws}
    noise = Noise(policy=policies[config.second_policy])

    @jax.jit
    def run(logits: Any, valid: Any, noise: Any) -> Any:
        return assign(config, logits, valid, noise, None)

    gating, plan, balance = run(logits, valid, noise)
    rows, weights = np.asarray(plan.rows), np.asarray(gating.weights)
    combine = np.zeros(logits.shape)
    taken = []
    for u, experts in enumerate(np.asarray(gating.experts)):
        for j, e in enumerate(experts):
            if rows[u, j] < plan.num_rows:
                combine[u, e] += weights[u, j]
                taken.append(rows[u, j])
                assert rows[u, j] // (plan.num_rows // EXPERTS) == e
    assert len(set(taken)) == len(taken), "two assignments share a row"
    if balance is None:
        counts = np.asarray(gating.counts[0]) / max(int(np.sum(valid)), 1)
        balance = EXPERTS * float(counts @ np.asarray(gating.mean_probs))
    return Routed(combine, float(balance), np.asarray(gating.counts).sum(0))


CONFIGS = [
    support.make(capacity_factor=factor, group_size=size, second_policy=policy)
    for policy in ("all", "random", "sampling")
    for factor, size in ((0.5, None), (1.0, 3))
]


@st.composite
def drawn(draw: Any) -> Any:
    """Logits [12, 4] with ties, valid [12], uniforms [12, 4]."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    logits = rng.standard_normal((12, EXPERTS)).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits)  # ties
    valid = rng.random(12) < draw(st.sampled_from([1.0, 0.6, 0.0]))
    return logits, valid, rng.random((12, EXPERTS)).astype(np.float32)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.second_policy}-{c.group_size}")
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(case=drawn())
def test_routing_is_algorithm_1(config: Any, case: Any) -> None:
    logits, valid, draws = case
    want, have = (f(config, logits, valid, draws) for f in (algorithm_1, ours))
    np.testing.assert_array_equal(have.combine > 0, want.combine > 0)
    np.testing.assert_allclose(have.combine, want.combine, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(have.balance, want.balance, rtol=1e-5)
    np.testing.assert_array_equal(have.queue, want.queue)


@pytest.mark.parametrize("field", ["capacity_factor", "group_size", "second_policy"])
def test_another_rule_is_noticed(field: str) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((12, EXPERTS)).astype(np.float32)
    valid, draws = np.ones(12, bool), rng.random((12, EXPERTS)).astype(np.float32)
    fields: Any = {"capacity_factor": 1.0, "group_size": 6, "second_policy": "random"}
    other: Any = {"capacity_factor": 0.5, "group_size": 4, "second_policy": "all"}
    want = algorithm_1(support.make(**fields), logits, valid, draws)
    have = ours(support.make(**fields | {field: other[field]}), logits, valid, draws)
    assert np.any((have.combine > 0) != (want.combine > 0))
