"""Ranking in two stages finds what sorting all continuations finds, ties and all."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.wmt.model import ranking
from taskmoe.wmt.model.ranking import BLOCK, best_continuations, most_likely

BATCH = 3
ULP = 2.0**-20  # of terms from 8 to 16, as log probabilities here are: sums may be near zero


def sorted_all(logits: Any, scores: Any, count: int) -> Any:
    """By its definition."""
    batch, beam = scores.shape
    log_probs = jax.nn.log_softmax(logits).reshape(batch, beam, -1)
    total = (scores[:, :, None] + log_probs).reshape(batch, -1)
    score, at = jax.lax.top_k(total, count)
    return score, at // log_probs.shape[-1], at % log_probs.shape[-1]


def inputs(vocab: int, beam: int, ties: bool, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((BATCH * beam, vocab)).astype(np.float32)
    scores = rng.standard_normal((BATCH, beam)).astype(np.float32)
    if ties:
        logits, scores = np.round(logits / 3), np.zeros_like(scores)
        logits[1::2] = logits[::2]  # two hypotheses whose words are as likely
    scores[1, 1:] = -1e9  # as at the beginning of a search
    return logits, scores


def differs(logits: Any, scores: Any, count: int, *, jit: bool, ties: bool = False) -> bool:
    find: Any = functools.partial(best_continuations, count=count)
    want = functools.partial(sorted_all, count=count)
    if jit:
        find, want = jax.jit(find), jax.jit(want)
    got, expected = find(logits, scores), want(logits, scores)
    same = all(np.array_equal(a, b) for a, b in zip(got[1:], expected[1:], strict=True))
    if not same and not ties:  # two that differ by a rounding may change places
        log_probs = jax.nn.log_softmax(logits).reshape(*scores.shape, -1)
        batch = np.arange(len(scores))[:, None]
        found = scores[batch, got[1]] + log_probs[batch, got[1], got[2]]
        picked = np.stack(got[1:], axis=-1)
        same = np.allclose(found, expected[0], rtol=1e-6, atol=ULP)
        same &= all(len(np.unique(row, axis=0)) == count for row in picked)
    return not (same and np.allclose(got[0], expected[0], rtol=1e-6, atol=ULP))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("beam", [2, 4])
@pytest.mark.parametrize("vocab", [5, BLOCK, 3 * BLOCK, 10 * BLOCK + 7, 40 * BLOCK - 1, 50 * 50])
def test_it_finds_what_a_sort_finds(vocab: int, beam: int, ties: bool, jit: bool) -> None:
    for seed in range(3):
        assert not differs(*inputs(vocab, beam, ties, seed), 2 * beam, jit=jit, ties=ties)


def test_the_last_block_may_hold_the_best() -> None:
    logits, scores = inputs(10 * BLOCK + 7, 4, False)
    logits[:, -1] += 50
    assert not differs(logits, scores, 8, jit=True)
    assert (best_continuations(logits, scores, 8)[2][0, :4] == 10 * BLOCK + 6).all()


def test_a_block_that_is_not_looked_at_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ranking._blocks

    def blind(logits: Any) -> Any:
        return right(logits).at[:, 3].set(-1e9)

    monkeypatch.setattr(ranking, "_blocks", blind)
    logits, scores = inputs(10 * BLOCK, 4, False)
    logits[:, 3 * BLOCK] += 50
    assert differs(logits, scores, 8, jit=False)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("vocab", [1, 5, BLOCK, 10 * BLOCK + 7, 50 * 50])
def test_the_most_likely_word_is_the_first_largest(vocab: int, ties: bool, jit: bool) -> None:
    logits, _ = inputs(vocab, 4, ties)
    word, score = (jax.jit(most_likely) if jit else most_likely)(logits)
    np.testing.assert_array_equal(word, np.argmax(logits, axis=1))
    want = np.max(jax.nn.log_softmax(logits), axis=1)
    np.testing.assert_allclose(score, want, rtol=1e-5, atol=1e-6)


def test_large_logits_have_log_probabilities() -> None:
    logits = np.full((2, 10 * BLOCK), -3e4, np.float32)
    logits[:, 7] = 3e4
    logits[1, 3 * BLOCK] = 3e4
    word, score = most_likely(jnp.asarray(logits))
    assert word.tolist() == [7, 7]
    np.testing.assert_allclose(score, [0, -np.log(2)], atol=1e-6)


@pytest.mark.parametrize("vocab", [5, 10 * BLOCK + 7])
def test_words_exist_where_logits_are_not_numbers(vocab: int) -> None:
    logits = jnp.full((4, vocab), jnp.nan)
    assert (most_likely(logits)[0] < vocab).all()
    assert (best_continuations(logits, jnp.zeros((2, 2)), 4)[2] < vocab).all()


def test_words_may_be_ruled_out_by_the_block() -> None:
    logits, scores = inputs(4 * BLOCK, 2, False)
    logits[:, BLOCK : 3 * BLOCK] = -np.inf
    assert not differs(logits, scores, 4, jit=True)
    word, score = most_likely(jnp.asarray(logits))
    np.testing.assert_array_equal(word, np.argmax(logits, axis=1))
    np.testing.assert_allclose(score, np.max(jax.nn.log_softmax(logits), axis=1), rtol=1e-5)
