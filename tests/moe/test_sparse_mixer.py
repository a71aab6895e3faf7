"""`moe.sparse_mixer` while training: what is drawn, how it weighs, what the gate learns of it."""

import functools
import importlib
import importlib.util
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe import moe
from taskmoe.tests.kernels.support import normal
from taskmoe.tests.moe import support
from taskmoe.tests.moe.test_meshes import mesh_of

UNITS, E, JITTER = 64, 8, 0.4
KEY = jax.random.key(3)
mixed = functools.partial(moe.sparse_mixer, top_k=2, jitter=JITTER)


def rivals(logits: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Softmax over near rivals, in float64."""
    z = logits.astype(np.float64)
    best = np.where(left, z, -np.inf).max(axis=1, keepdims=True)
    near = left & ((best - z) / np.maximum(abs(z), best) <= 2 * JITTER)
    odds = np.where(near, np.exp(z - best), 0)
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))


def by_hand(logits: np.ndarray, experts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of drawn experts [U, k]: their whole weights, and whether each was the best: [U, k]."""
    left, weights, first = np.ones(logits.shape, bool), [], []
    for expert in experts.T[..., None]:
        odds = rivals(logits, left)
        weights.append(np.take_along_axis(odds, expert, 1)[:, 0])
        first.append(odds.argmax(axis=1) == expert[:, 0])
        np.put_along_axis(left, expert, False, 1)
    return np.stack(weights, 1), np.stack(first, 1)


@pytest.mark.parametrize("jitted", [False, True])
def test_a_weight_that_is_not_the_best_is_whole_one_time_of_four(jitted: bool) -> None:
    logits = normal(0, (4096, E))
    run = jax.jit(lambda z: mixed(z, key=KEY)) if jitted else lambda z: mixed(z, key=KEY)
    experts, weights = (np.asarray(a) for a in run(logits))
    want, first = by_hand(np.asarray(logits), experts)
    share = weights / want
    np.testing.assert_allclose(share[first], 1, rtol=1e-5)
    whole = np.isclose(share, 1, rtol=1e-5)
    np.testing.assert_allclose(share[~whole], 1 / 3, rtol=1e-5)
    assert abs(whole[~first].mean() - 0.25) < 0.02
    assert not np.isclose(mixed(logits)[1], weights).all()


def test_experts_are_drawn_as_likely_as_they_weigh() -> None:
    logits = np.asarray(normal(1, (1, E)))
    many = jnp.asarray(np.repeat(logits, 20_000, axis=0))
    experts = np.asarray(mixed(many, key=KEY)[0])
    odds = rivals(logits, np.ones((1, E), bool))[0]
    assert (odds > 0).sum() > 2
    np.testing.assert_allclose(np.bincount(experts[:, 0], minlength=E) / 20_000, odds, atol=0.015)
    assert (experts[:, 0] != experts[:, 1]).all()
    best = np.asarray(mixed(many)[0][:, 0])  # without a key
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(np.bincount(best, minlength=E) / 20_000, odds, atol=0.015)


def test_the_gate_gets_the_gradient_of_the_whole_weight() -> None:
    logits, upstream = normal(2, (UNITS, E)), np.asarray(normal(3, (UNITS, 2)))

    def loss(z: jax.Array) -> jax.Array:
        return jnp.sum(mixed(z, key=KEY)[1] * upstream)

    experts = np.asarray(mixed(logits, key=KEY)[0])
    left, want = np.ones((UNITS, E), bool), np.zeros((UNITS, E))
    for i in range(2):
        odds, chosen = rivals(np.asarray(logits), left), np.eye(E)[experts[:, i]]
        weight = (odds * chosen).sum(1, keepdims=True)
        want += upstream[:, i : i + 1] * weight * (chosen - odds)
        left &= chosen == 0
    got = jax.jit(jax.grad(loss))(logits)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    served = jax.grad(lambda z: jnp.sum(mixed(z)[1] * upstream))(logits)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(served, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", ["all_to_all", "ragged", "all_gather"])
def test_a_layer_trains_by_it_on_a_mesh_as_on_one_device(strategy: str) -> None:
    config = support.make(num_experts=E, d_ff=8, routing="given", top_k=2)
    params = support.params(config) | {"gate": normal(5, (6, E))}
    x = support.normal(1, 4, 6, 6)

    def loss(params: Any, **options: Any) -> jax.Array:
        experts, weights = mixed((x @ params["gate"]).reshape(-1, E), key=KEY)
        told = {"experts": experts.reshape(4, 6, 2), "weights": weights.reshape(4, 6, 2)}
        layer = {name: w for name, w in params.items() if name != "gate"}
        return jnp.sum(jnp.sin(moe.apply(layer, config, x, **told, **options)[0]))

    want = jax.jit(jax.grad(loss))(params)
    options = {"mesh": mesh_of(("expert", 4)), "strategy": strategy}
    support.check(jax.jit(jax.grad(functools.partial(loss, **options)))(params), want, 2e-5)
    assert np.abs(want["gate"]).max() > 1e-3


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))),
    reason="torch and transformers are not installed",
)
@pytest.mark.filterwarnings("ignore")  # of torch and transformers, which are others'
def test_the_draw_is_that_of_transformers() -> None:
    torch: Any = importlib.import_module("torch")
    theirs: Any = importlib.import_module("transformers.models.phimoe.modeling_phimoe")
    logits, upstream = normal(2, (UNITS, E)), np.array(normal(3, (UNITS, 2)))
    draws: list[Any] = []
    for i in range(2):
        draw, step = jax.random.split(jax.random.fold_in(KEY, i))
        draws.append(np.exp(-np.asarray(jax.random.gumbel(draw, (UNITS, E)))))
        draws.append(np.asarray(jax.random.uniform(step, (UNITS,)))[:, None])

    def drawn(like: Any) -> Any:
        return like.copy_(torch.tensor(draws.pop(0)))

    z = torch.tensor(np.array(logits)).requires_grad_()
    with (
        mock.patch.object(torch.Tensor, "exponential_", drawn),
        mock.patch.object(torch, "rand_like", lambda like: drawn(torch.empty_like(like))),
        mock.patch.object(torch.Tensor, "uniform_", lambda same: same),  # of what was drawn
    ):
        weights, experts = theirs.sparsemixer(z, JITTER, True, 2)
    (weights * torch.tensor(upstream)).sum().backward()
    have = mixed(logits, key=KEY)
    np.testing.assert_array_equal(have[0], experts.numpy())
    np.testing.assert_allclose(have[1], weights.detach().numpy(), atol=1e-4)  # 1/3 there is 0.3333
    got = jax.grad(lambda z: jnp.sum(mixed(z, key=KEY)[1] * upstream))(logits)
    np.testing.assert_allclose(got, z.grad.numpy(), rtol=0, atol=1e-6 * np.abs(got).max())


@pytest.mark.parametrize(
    ("logits", "top_k", "error", "message"),
    [
        (jnp.ones((2, 4)), 5, ValueError, "top_k must be at most E=4, got 5"),
        (jnp.ones((2, 4)), 0, ValueError, "top_k must be an int of at least 1, got 0"),
        (jnp.ones(4), 1, ValueError, r"logits must have shape \[U, E\], got \[4\]"),
        (jnp.ones((2, 4), int), 1, TypeError, "logits must be bfloat16 or float32, got int"),
    ],
)
def test_errors_name_the_argument(
    logits: Any, top_k: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        moe.sparse_mixer(logits, top_k)
