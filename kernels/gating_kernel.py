"""top_k_gating as Pallas TPU kernels, forward and backward.

    experts, weights: by a `Router`;  slots: queue places

Tokens lie along lanes and experts along sublanes ([E, T]), so that few experts waste no lanes and
maxima over experts are plain vector operations. The grid walks blocks of tokens in order. The k
largest are found by repeated maxima; places inside a block are prefix sums, a product with a
triangular matrix on the MXU, exact because counts below 2^24 are whole numbers in f32; the counts
so far stay in VMEM, with the sums of probabilities and of squared logsumexp.

VMEM: two buffers of logits [E, block] and of a few [k, block] rows; the triangle [block, block].
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from taskmoe.kernels import tiling as tilings
from taskmoe.kernels.checks import result_like
from taskmoe.kernels.platforms import chip
from taskmoe.kernels.router import (
    Denominator,
    Router,
    by_logit,
    choice_scores,
    denominator,
    limit_to_groups,
    score,
    slope,
    weigh,
    weight_gradient,
)

#: Tokens a block, unless E is so large that fewer fit.
BLOCK = 256


def cost(tokens: int, num_experts: int, top_k: int, itemsize: int) -> pl.CostEstimate:
    """FLOPs and bytes of either direction; the triangle's product counts most."""
    return pl.CostEstimate(
        flops=2 * top_k * tokens * num_experts * BLOCK,
        bytes_accessed=tokens * (num_experts * itemsize + (3 * top_k + 1) * 4),
        transcendentals=2 * tokens * num_experts,
    )


def tokens_block(step: Any) -> tuple[Any, ...]:
    """The step's tokens, along lanes."""
    return 0, step


def whole_block(step: Any) -> tuple[Any, ...]:
    """All of a small array that every step sees."""
    return 0, 0


def softmax_parts(
    logits_ref: Any, valid_ref: Any, num_tokens: int
) -> tuple[jax.Array, jax.Array, jax.Array, Denominator]:
    """Logits [E, block] with 0 where not valid, valid [1, block], and their softmax."""
    token = jax.lax.broadcasted_iota(jnp.int32, valid_ref.shape, 1)
    inside = pl.program_id(0) * valid_ref.shape[1] + token < num_tokens
    valid = (valid_ref[...] != 0) & inside
    x = jnp.where(valid, logits_ref[...].astype(jnp.float32), 0)
    largest = jnp.max(x, axis=0, keepdims=True)
    shifted = jnp.exp(x - largest)
    total = jnp.sum(shifted, axis=0, keepdims=True)
    return x, valid, shifted / total, Denominator(largest, total)


def shares(router: Router, x: jax.Array, softmax: jax.Array, of: Denominator) -> jax.Array:
    """Scores [E, block] divided by their sum."""
    if router.scores == "softmax":
        return softmax
    scores = score(router, x, of)
    return scores / jnp.sum(scores, axis=0, keepdims=True)


def kernel(
    logits_ref: Any,
    valid_ref: Any,
    bias_ref: Any,
    experts_ref: Any,
    weights_ref: Any,
    slots_ref: Any,
    counts_ref: Any,
    probs_ref: Any,
    squares_ref: Any,
    *,
    num_tokens: int,
    router: Router,
) -> None:
    """One block of tokens. counts_ref holds the counts so far, slots count one choice alone."""
    top_k, block = experts_ref.shape

    @pl.when(pl.program_id(0) == 0)
    def _init() -> None:
        counts_ref[...] = jnp.zeros_like(counts_ref)
        probs_ref[...] = jnp.zeros_like(probs_ref)
        squares_ref[...] = jnp.zeros_like(squares_ref)

    x, valid, softmax, of = softmax_parts(logits_ref, valid_ref, num_tokens)
    probs, lse = shares(router, x, softmax, of), jnp.log(of.total) + of.largest
    probs_ref[...] += jnp.sum(jnp.where(valid, probs, 0), axis=1, keepdims=True)
    squares_ref[...] += jnp.sum(jnp.where(valid, lse * lse, 0), axis=1, keepdims=True)

    expert = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    before = jax.lax.broadcasted_iota(jnp.int32, (block, block), 0)
    after = jax.lax.broadcasted_iota(jnp.int32, (block, block), 1)
    triangle = (before < after).astype(jnp.float32)
    # NaN comes last, and all lie above the mark of those already chosen.
    known = jnp.where(x >= jnp.finfo(jnp.float32).min, x, jnp.finfo(jnp.float32).min)
    bias = None if bias_ref is None else bias_ref[...]
    of_known = denominator(known, 0) if router.scores == "softmax" else of
    left = limit_to_groups(router, choice_scores(router, known, of_known, bias), 0)
    values = []
    for j in range(top_k):
        best = jnp.max(left, axis=0, keepdims=True)
        choice = jnp.min(jnp.where(left == best, expert, x.shape[0] - 1), axis=0, keepdims=True)
        chosen = expert == choice
        left = jnp.where(chosen, -jnp.inf, left)
        if not by_logit(router, bias):
            best = jnp.sum(jnp.where(chosen, known, 0), axis=0, keepdims=True)
        values.append(best)
        hit = jnp.where(chosen & valid, 1.0, 0.0)
        earlier = jnp.dot(hit, triangle, preferred_element_type=jnp.float32)
        counts = counts_ref[:, j : j + 1]
        place = jnp.sum(hit * (earlier + counts), axis=0, keepdims=True)
        experts_ref[j : j + 1, :] = choice
        slots_ref[j : j + 1, :] = jnp.where(valid, place, -1).astype(jnp.int32)
        counts_ref[:, j : j + 1] = counts + jnp.sum(hit, axis=1, keepdims=True)
    for j, weight in enumerate(weigh(router, values, of_known)):
        weights_ref[j : j + 1, :] = jnp.where(valid, weight, 0)


def backward_kernel(
    logits_ref: Any,
    valid_ref: Any,
    experts_ref: Any,
    weights_ref: Any,
    d_weights_ref: Any,
    d_probs_ref: Any,
    d_squares_ref: Any,
    out_ref: Any,
    *,
    num_tokens: int,
    router: Router,
) -> None:
    """One block of tokens; the formula is `gating_gradient`'s."""
    x, valid, softmax, of = softmax_parts(logits_ref, valid_ref, num_tokens)
    probs, lse = shares(router, x, softmax, of), jnp.log(of.total) + of.largest
    d_probs = d_probs_ref[...]
    mean = jnp.sum(probs * d_probs, axis=0, keepdims=True)
    squares = 2 * lse * d_squares_ref[...]
    weights, d_weights = weights_ref[...], d_weights_ref[...]
    chosen, taken = weight_gradient(router, weights, d_weights, 0)
    expert = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    at_chosen = jnp.zeros_like(x)
    for j in range(weights.shape[0]):
        at_chosen += jnp.where(expert == experts_ref[j : j + 1, :], chosen[j : j + 1, :], 0)
    if router.scores == "softmax":
        grad = softmax * (d_probs - mean + squares - taken) + at_chosen
    else:
        inner = slope(router, x)
        grad = inner * (probs * (d_probs - mean) + at_chosen) + softmax * squares
    out_ref[...] = jnp.where(valid, grad, 0).astype(out_ref.dtype)


def block_tokens(tokens: int, num_experts: int) -> int:
    """Tokens a block: 256, or 128 where a dozen [E, 256] values do not fit or tokens are few."""
    budget = tilings.vmem_budget_bytes(chip())
    largest = BLOCK if num_experts * BLOCK * 4 * 12 <= budget else tilings.LANES
    return min(largest, tilings.round_up(tokens, tilings.LANES))


def gating_mosaic(
    logits: jax.Array, top_k: int, valid: jax.Array, router: Router, bias: jax.Array | None
) -> tuple[jax.Array, ...]:
    """The forward call.

    Returns experts, weights and slots [T, k], counts [k, E] i32, and the sums over valid tokens of
    probabilities [E] and of squared logsumexp [].
    """
    tokens, num_experts = logits.shape
    block = block_tokens(tokens, num_experts)
    experts = pl.BlockSpec((num_experts, block), tokens_block)
    rows = pl.BlockSpec((top_k, block), tokens_block)
    call = pl.pallas_call(
        functools.partial(kernel, num_tokens=tokens, router=router),
        grid=(pl.cdiv(tokens, block),),
        in_specs=[
            experts,
            pl.BlockSpec((1, block), tokens_block),
            None if bias is None else pl.BlockSpec((num_experts, 1), whole_block),
        ],
        out_specs=[
            rows,
            rows,
            rows,
            pl.BlockSpec((num_experts, top_k), whole_block),
            pl.BlockSpec((num_experts, 1), whole_block),
            pl.BlockSpec((1, 1), whole_block),
        ],
        out_shape=[
            result_like(logits, (top_k, tokens), jnp.int32),
            result_like(logits, (top_k, tokens), jnp.float32),
            result_like(logits, (top_k, tokens), jnp.int32),
            result_like(logits, (num_experts, top_k), jnp.float32),
            result_like(logits, (num_experts, 1), jnp.float32),
            result_like(logits, (1, 1), jnp.float32),
        ],
        compiler_params=tilings.compiler_params(("arbitrary",), num_experts * block * 48),
        cost_estimate=cost(tokens, num_experts, top_k, logits.dtype.itemsize),
        name="taskmoe_top_k_gating",
    )
    chosen, weights, slots, counts, probs, squares = call(
        logits.T, valid[None].astype(jnp.int32), None if bias is None else bias[:, None]
    )
    counts = counts.T.astype(jnp.int32)
    # All first choices come before any second: later choices queue behind the earlier ones' counts.
    ahead = jax.lax.cumsum(counts, axis=0) - counts
    here = chosen[..., None] == jnp.arange(num_experts)
    slots = jnp.where(valid, slots + jnp.sum(jnp.where(here, ahead[:, None], 0), axis=2), -1)
    return chosen.T, weights.T, slots.T, counts, probs[:, 0], squares[0, 0]


def gating_backward_mosaic(
    router: Router,
    logits: jax.Array,
    valid: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    d_weights: jax.Array,
    d_probs: jax.Array,
    d_squares: jax.Array,
) -> jax.Array:
    """The backward call: gradient of the logits [T, E].

    d_weights: [T, k]; d_probs: [E] and d_squares: [], of the sums over valid tokens.
    """
    (tokens, num_experts), top_k = logits.shape, experts.shape[1]
    block = block_tokens(tokens, num_experts)
    values = pl.BlockSpec((num_experts, block), tokens_block)
    rows = pl.BlockSpec((top_k, block), tokens_block)
    call = pl.pallas_call(
        functools.partial(backward_kernel, num_tokens=tokens, router=router),
        grid=(pl.cdiv(tokens, block),),
        in_specs=[
            values,
            pl.BlockSpec((1, block), tokens_block),
            rows,
            rows,
            rows,
            pl.BlockSpec((num_experts, 1), whole_block),
            pl.BlockSpec((1, 1), whole_block),
        ],
        out_specs=values,
        out_shape=result_like(logits, (num_experts, tokens), logits.dtype),
        compiler_params=tilings.compiler_params(("parallel",), num_experts * block * 48),
        cost_estimate=cost(tokens, num_experts, top_k, logits.dtype.itemsize),
        name="taskmoe_top_k_gating_backward",
    )
    return call(
        logits.T,
        valid[None].astype(jnp.int32),
        experts.T,
        weights.T,
        d_weights.T,
        d_probs[:, None],
        d_squares[None, None],
    ).T
