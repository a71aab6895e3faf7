"""The best continuations of a sentence's hypotheses, without sorting the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 64  # words whose maximum is ranked in their stead


def best_continuations(
    logits: jax.Array, scores: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `count` likeliest of all hypotheses' continuations by one word.

    logits: [B*K, V] f32. scores: [B, K] f32, log probabilities of the hypotheses so far.
    Returns log probabilities [B, count], falling, and whose hypothesis they continue and with which
    word [B, count] i32 each; of equals the first hypothesis and word go first.

    As `jax.lax.top_k` of `scores[:, :, None] + log_softmax(logits)`, ties included, in two stages:
    the `count` best lie in the `count` blocks with the best maxima, and what is done to the logits
    keeps their order, so that maxima can be taken before it.
    """
    batch, beam = scores.shape
    vocab = logits.shape[1]
    most = _block_maxima(logits)
    top = jnp.max(most, axis=1)
    total = jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), axis=1))

    def ranked(values: jax.Array, rows: jax.Array) -> jax.Array:
        """Log probabilities of continuations from their logits [B, N] and rows [B, N]."""
        return scores.reshape(-1)[rows] + (values - top[rows] - total[rows])

    first = jnp.arange(batch)[:, None] * beam
    blocks = most.shape[1]
    if beam * blocks > count:
        rows = first + jnp.arange(beam * blocks) // blocks
        _, chosen = jax.lax.top_k(ranked(most.reshape(batch, -1), rows), count)
        chosen = jnp.sort(chosen, axis=1)  # equals keep their order
        word = (chosen % blocks * BLOCK)[:, :, None] + jnp.arange(BLOCK)
        rows = jnp.broadcast_to((first + chosen // blocks)[:, :, None], word.shape)
        word, rows = word.reshape(batch, -1), rows.reshape(batch, -1)
    else:
        every = jnp.arange(beam * vocab)
        word = jnp.broadcast_to(every % vocab, (batch, beam * vocab))
        rows = first + every // vocab
    values = logits[rows, jnp.minimum(word, vocab - 1)]
    found = jnp.where(word < vocab, ranked(values, rows), -jnp.inf)
    score, at = jax.lax.top_k(found, count)
    origin = jnp.take_along_axis(rows - first, at, axis=1)
    return score, origin.astype(jnp.int32), jnp.take_along_axis(word, at, axis=1).astype(jnp.int32)


def _block_maxima(logits: jax.Array) -> jax.Array:
    """Maximum of each block of words, the last of which may be shorter: [B*K, ceil(V/BLOCK)]."""
    rows, vocab = logits.shape
    whole = vocab // BLOCK * BLOCK
    parts = [jnp.max(logits[:, :whole].reshape(rows, -1, BLOCK), axis=2)]
    if whole < vocab:
        parts.append(jnp.max(logits[:, whole:], axis=1, keepdims=True))
    return jnp.concatenate(parts, axis=1)
