"""top_k_gating as Pallas TPU kernels, forward and backward.

    experts, weights: by a `Router`;  slots: queue places

Tokens lie along lanes and experts along sublanes ([E, T]), so that few experts waste no lanes and
maxima over experts are plain vector operations. The grid walks blocks of tokens in order. The k
largest are found one after the other, each by a tournament of registers that carries the index
along. Places are counted in windows of 32 tokens, see `queue_kernel`; what each window has of each
expert is a product on the MXU, exact because counts below 2^24 are whole numbers in f32. Counts so
far stay in VMEM with experts along lanes. All first choices come before any second, so a second
kernel adds the counts of earlier choices once all are known.

VMEM: two buffers of logits [E, block] and of a few [k, block] rows, and what does not stay in
registers of a dozen [E, block] values; the counts of a block's windows [k * block / 32, E].
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import tiling as tilings
from taskmoe.kernels.checks import result_like
from taskmoe.kernels.platforms import chip
from taskmoe.kernels.queue_kernel import (
    ROWS,
    WINDOW,
    behind_earlier_choices,
    lane_parts,
    look_up,
    only,
    places_in_windows,
    tokens_block,
    whole_block,
)
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

#: Most tokens a block.
BLOCK = 512


def cost(tokens: int, num_experts: int, top_k: int, itemsize: int, flops: int) -> pl.CostEstimate:
    """Bytes of either direction, beside its FLOPs for a token and an expert."""
    return pl.CostEstimate(
        flops=flops * tokens * num_experts,
        bytes_accessed=tokens * (num_experts * itemsize + (3 * top_k + 1) * 4),
        transcendentals=2 * tokens * num_experts,
    )


def valid_tokens(valid_ref: Any, block: int, num_tokens: int) -> jax.Array | None:
    """Which tokens of the block [1, block] count; None where all do."""
    if valid_ref is None and num_tokens % block == 0:
        return None
    token = pl.program_id(0) * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
    inside = token < num_tokens
    return inside if valid_ref is None else (valid_ref[...] != 0) & inside


def softmax_parts(
    logits_ref: Any, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array, Denominator]:
    """Logits [E, block] in f32 with 0 where not valid, and their softmax."""
    x = only(valid, logits_ref[...].astype(jnp.float32), 0)
    largest = jnp.max(x, axis=0, keepdims=True)
    shifted = jnp.exp(x - largest)
    total = jnp.sum(shifted, axis=0, keepdims=True)
    return x, shifted * (1 / total), Denominator(largest, total)


def shares(router: Router, x: jax.Array, softmax: jax.Array, of: Denominator) -> jax.Array:
    """Scores [E, block] divided by their sum."""
    if router.scores == "softmax":
        return softmax
    scores = score(router, x, of)
    return scores / jnp.sum(scores, axis=0, keepdims=True)


def first_largest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest of each column [E, block] and its row, the first of equal ones: f32 [1, block].

    Neighbouring registers meet, so that the winner of a tie is the one above. Rows are f32, whose
    minimum is one operation.
    """
    height = x.shape[0]
    if height % ROWS:
        row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0).astype(jnp.float32)
        best = jnp.max(x, axis=0, keepdims=True)
        return best, jnp.min(jnp.where(x == best, row, height - 1), axis=0, keepdims=True)
    value, start = _winner(x, 0, height // ROWS)
    row = jax.lax.broadcasted_iota(jnp.int32, value.shape, 0).astype(jnp.float32) + start
    best = jnp.max(value, axis=0, keepdims=True)
    return best, jnp.min(jnp.where(value == best, row, height - 1), axis=0, keepdims=True)


def _winner(x: jax.Array, first: int, end: int) -> tuple[jax.Array, Any]:
    """The largest in each place of a register among registers [first, end), and where that begins.

    Few registers are alive at a time.
    """
    if end - first == 1:
        return x[first * ROWS : end * ROWS], float(first * ROWS)
    middle = (first + end) // 2
    above, its = _winner(x, first, middle)
    below, other = _winner(x, middle, end)
    return jnp.maximum(above, below), jnp.where(above >= below, its, other)


def turned(x: jax.Array) -> jax.Array:
    """A row [1, E] as a column [E, 1], or a column as a row."""
    is_row = x.shape[0] == 1
    parts = []
    for part in lane_parts(max(x.shape)):
        piece = x[:, part] if is_row else x[part]
        shape = (part.stop - part.start,) * 2
        up, along = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        parts.append(jnp.sum(jnp.where(up == along, piece, 0), axis=int(is_row), keepdims=True))
    return jnp.concatenate(parts, axis=int(not is_row))


def kernel(
    logits_ref: Any,
    valid_ref: Any,
    bias_ref: Any,
    experts_ref: Any,
    weights_ref: Any,
    places_ref: Any,
    counts_ref: Any,
    probs_ref: Any,
    z_ref: Any,
    so_far_ref: Any,
    found_ref: Any,
    of_lanes_ref: Any,
    of_tokens_ref: Any,
    *,
    num_tokens: int,
    router: Router,
) -> None:
    """One block of tokens.

    places: among the tokens of the same choice. so_far [k, E]: counts of earlier blocks. of_lanes
    [E, 128] and of_tokens [2, block]: sums so far of probabilities, of squared logsumexp and of
    valid tokens.
    """
    top_k, block = experts_ref.shape
    step, last = pl.program_id(0), pl.num_programs(0) - 1

    @pl.when(step == 0)
    def _init() -> None:
        for ref in (so_far_ref, of_lanes_ref, of_tokens_ref):
            ref[...] = jnp.zeros_like(ref)

    valid = valid_tokens(valid_ref, block, num_tokens)
    x, softmax, of = softmax_parts(logits_ref, valid)
    probs, lse = shares(router, x, softmax, of), jnp.log(of.total) + of.largest
    probs = only(valid, probs, 0)
    of_lanes_ref[...] += sum(
        probs[:, start : start + tilings.LANES] for start in range(0, block, tilings.LANES)
    )
    of_tokens_ref[0:1, :] += only(valid, lse * lse, 0)
    of_tokens_ref[1:2, :] += only(valid, jnp.ones_like(lse), 0)

    # NaN comes last, and all lie above the mark of those already chosen.
    known = jnp.where(x >= jnp.finfo(jnp.float32).min, x, jnp.finfo(jnp.float32).min)
    bias = None if bias_ref is None else turned(bias_ref[...])
    of_known = denominator(known, 0) if router.scores == "softmax" else of
    left = limit_to_groups(router, choice_scores(router, known, of_known, bias), 0)
    expert = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0).astype(jnp.float32)
    windows = block // WINDOW
    window = jax.lax.broadcasted_iota(jnp.int32, (windows, block), 1) // WINDOW
    of_window = (window == jax.lax.broadcasted_iota(jnp.int32, window.shape, 0)).astype(jnp.float32)
    values, choices = [], []
    for j in range(top_k):
        best, choice = first_largest(left)
        chosen = expert == choice
        left = jnp.where(chosen, -jnp.inf, left)
        if not by_logit(router, bias):
            best = jnp.sum(jnp.where(chosen, known, 0), axis=0, keepdims=True)
        values.append(best)
        taken = chosen if valid is None else expert == only(valid, choice, -1)
        found = jax.lax.dot_general(  # counts of windows, with experts along lanes
            of_window,
            jnp.where(taken, 1.0, 0.0),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        rows = slice(j * windows, (j + 1) * windows)
        for part, columns in enumerate(lane_parts(x.shape[0])):
            found_ref[part, rows, : columns.stop - columns.start] = found[:, columns]
        choices.append(choice.astype(jnp.int32))
        experts_ref[j : j + 1, :] = only(valid, choices[-1], j)
    for j, weight in enumerate(weigh(router, values, of_known)):
        weights_ref[j : j + 1, :] = only(valid, weight, 0)
    places = places_in_windows(choices, valid, x.shape[0])
    for j, place in enumerate(places):
        places_ref[j : j + 1, :] = place
    ahead = [so_far_ref[part] for part in range(len(so_far_ref))]
    for start in range(0, block, tilings.LANES):
        of_strip = (slice(None), slice(start, start + tilings.LANES))
        ids = experts_ref[of_strip]
        lane = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 1)
        before: Any = None
        for w in range(start // WINDOW, (start + tilings.LANES) // WINDOW):
            here = look_up(ahead, ids)
            before = here if before is None else jnp.where(lane >= w * WINDOW - start, here, before)
            for part, counts in enumerate(ahead):
                ahead[part] = counts + found_ref[part, pl.ds(w, top_k, stride=windows), :]
        places = places_ref[of_strip] + before.astype(jnp.int32)
        some = None if valid is None else valid[:, start : start + tilings.LANES]
        places_ref[of_strip] = only(some, places, -1)
    for part, counts in enumerate(ahead):
        so_far_ref[part] = counts

    @pl.when(step == last)
    def _results() -> None:
        for part, columns in enumerate(lane_parts(counts_ref.shape[1])):
            counts = so_far_ref[part, :, : columns.stop - columns.start]
            counts_ref[:, columns] = counts.astype(jnp.int32)
        tokens = jnp.maximum(jnp.sum(of_tokens_ref[1:2, :], axis=1, keepdims=True), 1)
        z_ref[...] = jnp.sum(of_tokens_ref[0:1, :], axis=1, keepdims=True) / tokens
        probs_ref[...] = turned(jnp.sum(of_lanes_ref[...], axis=1, keepdims=True)) / tokens


def backward_kernel(
    logits_ref: Any,
    valid_ref: Any,
    experts_ref: Any,
    weights_ref: Any,
    d_weights_ref: Any,
    d_probs_ref: Any,
    d_z_ref: Any,
    out_ref: Any,
    *,
    num_tokens: int,
    mean_over: int,
    router: Router,
) -> None:
    """One block of tokens; the formula is `gating_gradient`'s.

    d_probs [1, E], d_z [1, 1]: of sums over valid tokens, times mean_over.
    """
    valid = valid_tokens(valid_ref, out_ref.shape[1], num_tokens)
    x, softmax, of = softmax_parts(logits_ref, valid)
    probs, lse = shares(router, x, softmax, of), jnp.log(of.total) + of.largest
    d_probs = turned(d_probs_ref[...] * (1 / mean_over))
    mean = jnp.sum(probs * d_probs, axis=0, keepdims=True)
    squares = 2 * lse * (d_z_ref[...] * (1 / mean_over))
    weights, d_weights = weights_ref[...], d_weights_ref[...]
    chosen, taken = weight_gradient(router, weights, d_weights, 0)
    expert = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    at_chosen = jnp.zeros_like(x)
    for j in range(weights.shape[0]):
        at_chosen = jnp.where(expert == experts_ref[j : j + 1, :], chosen[j : j + 1, :], at_chosen)
    if router.scores == "softmax":
        grad = softmax * (d_probs + (squares - mean - taken)) + at_chosen
    else:
        inner = slope(router, x)
        grad = inner * (probs * (d_probs - mean) + at_chosen) + softmax * squares
    out_ref[...] = only(valid, grad, 0).astype(out_ref.dtype)


def block_tokens(tokens: int, num_experts: int) -> int:
    """Tokens a block: as many as fit with a dozen [E, block] values, and no more than there are."""
    block, budget = BLOCK, tilings.vmem_budget_bytes(chip())
    while block > tilings.LANES and num_experts * block * 4 * 12 > budget:
        block //= 2
    return min(block, tilings.round_up(tokens, tilings.LANES))


def gating_mosaic(
    logits: jax.Array, top_k: int, valid: jax.Array | None, router: Router, bias: jax.Array | None
) -> tuple[jax.Array, ...]:
    """The forward call: what `Gating` holds, in its order."""
    tokens, num_experts = logits.shape
    block = block_tokens(tokens, num_experts)
    parts = pl.cdiv(num_experts, tilings.LANES)
    experts = pl.BlockSpec((num_experts, block), tokens_block)
    rows = pl.BlockSpec((top_k, block), tokens_block)
    line = pl.BlockSpec((1, block), tokens_block)
    call = pl.pallas_call(
        functools.partial(kernel, num_tokens=tokens, router=router),
        grid=(pl.cdiv(tokens, block),),
        in_specs=[
            experts,
            None if valid is None else line,
            None if bias is None else pl.BlockSpec((1, num_experts), whole_block),
        ],
        out_specs=[
            rows,
            rows,
            rows,
            pl.BlockSpec((top_k, num_experts), whole_block),
            pl.BlockSpec((1, num_experts), whole_block),
            pl.BlockSpec((1, 1), whole_block),
        ],
        out_shape=[
            result_like(logits, (top_k, tokens), jnp.int32),
            result_like(logits, (top_k, tokens), jnp.float32),
            result_like(logits, (top_k, tokens), jnp.int32),
            result_like(logits, (top_k, num_experts), jnp.int32),
            result_like(logits, (1, num_experts), jnp.float32),
            result_like(logits, (1, 1), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((parts, top_k, tilings.LANES), jnp.float32),
            pltpu.VMEM((parts, top_k * block // WINDOW, tilings.LANES), jnp.float32),
            pltpu.VMEM((num_experts, tilings.LANES), jnp.float32),
            pltpu.VMEM((2, block), jnp.float32),
        ],
        compiler_params=tilings.compiler_params(("arbitrary",), num_experts * block * 48),
        # The product that counts windows has most.
        cost_estimate=cost(
            tokens, num_experts, top_k, logits.dtype.itemsize, 2 * top_k * block // WINDOW
        ),
        name="taskmoe_top_k_gating",
    )
    chosen, weights, slots, counts, probs, z = call(
        logits.T,
        None if valid is None else valid[None].astype(jnp.int32),
        None if bias is None else bias[None],
    )
    if top_k > 1:
        slots = behind_earlier_choices(chosen, slots, counts)
    return chosen.T, weights.T, slots.T, counts, probs[0], z[0, 0]


def gating_backward_mosaic(
    router: Router,
    logits: jax.Array,
    valid: jax.Array | None,
    experts: jax.Array,
    weights: jax.Array,
    d_weights: jax.Array,
    d_probs: jax.Array,
    d_z: jax.Array,
) -> jax.Array:
    """The backward call: gradient of the logits [T, E].

    d_weights: [T, k]; d_probs: [E] and d_z: [], of the means over valid tokens.
    """
    (tokens, num_experts), top_k = logits.shape, experts.shape[1]
    block = block_tokens(tokens, num_experts)
    values = pl.BlockSpec((num_experts, block), tokens_block)
    rows = pl.BlockSpec((top_k, block), tokens_block)
    mean_over = tokens
    if valid is not None:
        num_valid = jnp.maximum(jnp.sum(valid), 1)
        d_probs, d_z, mean_over = d_probs / num_valid, d_z / num_valid, 1
    call = pl.pallas_call(
        functools.partial(backward_kernel, num_tokens=tokens, mean_over=mean_over, router=router),
        grid=(pl.cdiv(tokens, block),),
        in_specs=[
            values,
            None if valid is None else pl.BlockSpec((1, block), tokens_block),
            rows,
            rows,
            rows,
            pl.BlockSpec((1, num_experts), whole_block),
            pl.BlockSpec((1, 1), whole_block),
        ],
        out_specs=values,
        out_shape=result_like(logits, (num_experts, tokens), logits.dtype),
        compiler_params=tilings.compiler_params(("parallel",), num_experts * block * 48),
        cost_estimate=cost(tokens, num_experts, top_k, logits.dtype.itemsize, 2 * top_k + 10),
        name="taskmoe_top_k_gating_backward",
    )
    return call(
        logits.T,
        None if valid is None else valid[None].astype(jnp.int32),
        experts.T,
        weights.T,
        d_weights.T,
        d_probs[None],
        d_z[None, None],
    ).T
