"""top_k_gating in several blocks of tokens and parts of experts, and faults in its kernel."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.kernels import Gating, gating_kernel, top_k_gating
from taskmoe.tests.kernels import support

#: Tokens, experts, choices: whole and ragged blocks of 512 tokens, parts of 128 experts and
#: registers of 8, more choices than rows of a register or fields of a word.
SHAPES = [(1024, 8, 2), (1100, 256, 8), (520, 60, 11), (129, 300, 3), (700, 16, 16), (40, 1, 1)]


def want(logits: jax.Array, top_k: int, valid: np.ndarray) -> dict[str, np.ndarray]:
    """Choices, and queues filled one assignment after the other."""
    z = np.where(valid[:, None], np.asarray(logits, np.float64), 0)
    experts = np.argsort(-z, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    slots = np.full(experts.shape, -1, np.int32)
    counts = np.zeros((top_k, z.shape[1]), np.int32)
    for j, choices in enumerate(experts.T):
        for t in np.flatnonzero(valid):
            slots[t, j] = counts[:, choices[t]].sum()
            counts[j, choices[t]] += 1
    return {"experts": experts, "slots": slots, "counts": counts}


def assert_queues(ours: Gating, logits: jax.Array, top_k: int, valid: np.ndarray) -> None:
    for name, value in want(logits, top_k, valid).items():
        np.testing.assert_array_equal(getattr(ours, name), value, err_msg=name)


def gated(top_k: int) -> Any:
    return lambda x, valid=None: top_k_gating(x, top_k, valid=valid, implementation="mosaic")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_queues_over_blocks(shape: tuple[int, int, int], padded: bool) -> None:
    tokens, experts, top_k = shape
    logits = jnp.round(4 * support.normal(2, (tokens, experts))) / 4  # with ties
    valid = np.arange(tokens) % 7 != 3 if padded else np.ones(tokens, bool)
    seen = [jnp.asarray(valid)] if padded else []
    ours = support.call("mosaic", gated(top_k), logits, *seen)
    assert_queues(ours, logits, top_k, valid)


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(
    tokens=st.integers(1, 600),
    experts=st.integers(1, 140),
    levels=st.integers(0, 2),
    data=st.data(),
)
def test_any_size(tokens: int, experts: int, levels: int, data: Any) -> None:
    top_k = data.draw(st.integers(1, min(experts, 9)))
    logits = support.normal(tokens, (tokens, experts))
    logits = jnp.round(logits * levels) / levels if levels else logits
    with support.running("mosaic"):
        ours = jax.tree.map(np.asarray, jax.jit(gated(top_k))(logits))
    assert_queues(ours, logits, top_k, np.ones(tokens, bool))


@pytest.mark.parametrize("shape", [(600, 24, 3), (512, 136, 2)])
def test_statistics_and_gradient_where_all_are_valid(shape: tuple[int, int, int]) -> None:
    tokens, experts, top_k = shape
    logits = 2 * support.normal(0, (tokens, experts))
    grads = support.normal(5, (tokens, top_k)), support.normal(6, (experts,))

    def run(implementation: str) -> Any:
        def f(logits: Any, d_weights: Any, d_probs: Any) -> Any:
            def floats(z: Any) -> Any:
                gating = top_k_gating(z, top_k, implementation=implementation)
                return gating.weights, gating.mean_probs, gating.z_loss

            results, pull = jax.vjp(floats, logits)
            return results, pull((d_weights, d_probs, jnp.asarray(0.7, results[2].dtype)))

        return f

    truth = support.in_float64(run("reference"), logits, *grads)
    plain = support.call("reference", run("reference"), logits, *grads)
    ours = support.call("mosaic", run("mosaic"), logits, *grads)
    support.assert_as_good(ours, plain, truth)
    wrong = ours[0], (ours[1][0] * (1 + 1 / tokens),)  # as if one token more were averaged over
    with pytest.raises(AssertionError):
        support.assert_as_good(wrong, plain, truth)


def no_places(choices: list[Any], valid: Any, num_experts: int) -> list[Any]:
    return [jnp.zeros_like(choice) for choice in choices]


def first_part_only(table: Any, index: Any) -> Any:
    return jnp.take_along_axis(table[0], index & 127, axis=1, mode="promise_in_bounds")


def last_of_equals(x: Any) -> Any:
    best = jnp.max(x, axis=0, keepdims=True)
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0).astype(jnp.float32)
    return best, jnp.max(jnp.where(x == best, row, 0), axis=0, keepdims=True)


def places_alone(experts: Any, places: Any, counts: Any) -> Any:
    return places


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("places_in_windows", no_places, "slots"),
        ("look_up", first_part_only, "slots"),
        ("behind_earlier_choices", places_alone, "slots"),
        ("first_largest", last_of_equals, "experts"),
    ],
)
def test_planted_faults_are_caught(
    monkeypatch: pytest.MonkeyPatch, name: str, fault: Any, message: str
) -> None:
    monkeypatch.setattr(gating_kernel, name, fault)
    jax.clear_caches()
    logits = jnp.round(support.normal(3, (540, 200)))
    with support.running("mosaic"):
        ours = jax.tree.map(np.asarray, jax.jit(gated(2))(logits))
    jax.clear_caches()
    with pytest.raises(AssertionError, match=message):
        assert_queues(ours, logits, 2, np.ones(540, bool))
