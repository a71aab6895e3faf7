"""The best words of hypotheses, without sorting the vocabulary.

All that is asked of the logits is first asked of blocks of words, so that XLA reads them once; one
or a few blocks are then looked at word by word.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 128  # words of a block at most: the lanes of a TPU


def most_likely(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index of the largest of logits [R, V], the first of equals, and its log probability.

    [R] i32 and [R] f32. As maxima and searches for them, which XLA's CPU code vectorises; its
    argmax it does not. Both must see the same numbers: XLA may compute the softmax's product twice,
    rounded otherwise.
    """
    blocks = _blocks(jax.lax.optimization_barrier(logits))
    most = _maxima(blocks)
    block = _first_largest(most)
    words = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    index = block * blocks.shape[2] + _first_largest(words)
    # Where logits are not numbers it is the last word, not one behind it.
    return jnp.minimum(index, logits.shape[1] - 1), -_log_sum(blocks, most)


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
    split = _blocks(logits)
    blocks, width = split.shape[1:]
    most = _maxima(split)
    top, total = jnp.max(most, axis=1), _log_sum(split, most)
    first = jnp.arange(batch)[:, None] * beam

    def ranked(values: jax.Array, rows: jax.Array) -> jax.Array:
        """Log probabilities of continuations from their logits and rows, [B, N] or [B, N, 1]."""
        return scores.reshape(-1)[rows] + (values - top[rows] - total[rows])

    chosen = jnp.broadcast_to(jnp.arange(beam * blocks), (batch, beam * blocks))
    if beam * blocks > count:
        maxima = ranked(most.reshape(batch, -1), first + chosen // blocks)
        chosen = jnp.sort(jax.lax.top_k(maxima, count)[1], axis=1)  # equals keep their order
    origin, block = chosen // blocks, chosen % blocks
    # Out of the blocks, not the logits: XLA would compute these twice, for each shape.
    values = split[first + origin, block]
    found = ranked(values, (first + origin)[:, :, None])
    score, at = jax.lax.top_k(found.reshape(batch, -1), count)
    origin, block = (jnp.take_along_axis(x, at // width, axis=1) for x in (origin, block))
    word = jnp.minimum(block * width + at % width, logits.shape[1] - 1)
    return score, origin.astype(jnp.int32), word.astype(jnp.int32)


def _blocks(logits: jax.Array) -> jax.Array:
    """Logits [R, V] by blocks of words, -inf behind the last word: [R, blocks, words]."""
    rows, vocab = logits.shape
    # Padding copies all logits.
    width = next((w for w in range(BLOCK, BLOCK // 2, -1) if vocab % w == 0), BLOCK)
    padded = jnp.pad(logits, ((0, 0), (0, -vocab % width)), constant_values=-jnp.inf)
    return padded.reshape(rows, -1, width)


def _maxima(blocks: jax.Array) -> jax.Array:
    """Of logits by blocks: [R, blocks].

    Behind a barrier: XLA would take a row's maximum from all its logits once more, not from these.
    """
    return jax.lax.optimization_barrier(jnp.max(blocks, axis=2))


def _first_largest(x: jax.Array) -> jax.Array:
    """Index of the largest of x [R, N], the first of equals: [R] i32."""
    index = jnp.arange(x.shape[1], dtype=jnp.int32)
    largest = jnp.max(x, axis=1, keepdims=True)
    return jnp.min(jnp.where(x == largest, index, x.shape[1] - 1), axis=1)


def _log_sum(blocks: jax.Array, most: jax.Array) -> jax.Array:
    """Log of the sum of exponentials relative to a row's maximum, of logits by blocks: [R].

    most: [R, blocks], maxima. A block's exponentials are taken relative to its own maximum first:
    XLA then sums them while it has the block at hand, in half the time with 64,000 words on CPU.
    """
    most = jnp.maximum(most, jnp.finfo(most.dtype).min)  # a block may be all -inf
    sums = jnp.sum(jnp.exp(blocks - most[:, :, None]), axis=2)
    top = jnp.max(most, axis=1, keepdims=True)
    return jnp.log(jnp.sum(sums * jnp.exp(most - top), axis=1))
