"""Places in the queues of experts, inside Pallas TPU kernels.

    place: of a token among those that made the same choice;  slot: behind all earlier choices too

Tokens of a window are compared with one another, counts of windows and of blocks are looked up by
expert: experts lie along lanes, and the lanes of a register can be looked up by index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from taskmoe.kernels import tiling as tilings
from taskmoe.kernels.checks import result_like

#: Rows of a vector register.
ROWS = 8
#: Tokens that are compared with one another.
WINDOW = 32
#: The first TPU whose registers' lanes can be looked up by index. On TPU v3 gating is XLA's.
LOOKS_UP = 4
#: Tokens up to which counts, in f32, are exact. Gating of more is XLA's.
MOST_TOKENS = 1 << 24
#: Most tokens in a block of the kernel that adds the counts of earlier choices.
BLOCK = 2048


def tokens_block(step: Any) -> tuple[Any, ...]:
    """The step's tokens, along lanes."""
    return 0, step


def whole_block(step: Any) -> tuple[Any, ...]:
    """All of a small array that every step sees."""
    return 0, 0


def only(valid: jax.Array | None, x: Any, other: Any) -> Any:
    """x of valid tokens, which None says all are, and the other value elsewhere."""
    return x if valid is None else jnp.where(valid, x, other)


def look_up(table: Sequence[jax.Array], index: jax.Array) -> jax.Array:
    """table[j, index[j, t]] of a table [k, E], in parts of 128 columns, and indices [k, 128]."""
    if len(index) == 1:  # Mosaic refuses to gather from a single row
        both = [jnp.concatenate([x, x]) for x in (index, *table)]
        return look_up(both[1:], both[0])[:1]
    lane = index & (tilings.LANES - 1)
    value: Any = None
    for i, part in enumerate(table):
        here = jnp.take_along_axis(part, lane, axis=1, mode="promise_in_bounds")
        value = here if value is None else jnp.where(index >= i * tilings.LANES, here, value)
    return value


def lane_parts(width: int) -> list[slice]:
    """Columns in parts of 128, of which the last may be narrower."""
    return [slice(i, min(i + tilings.LANES, width)) for i in range(0, width, tilings.LANES)]


def places_in_windows(
    choices: list[jax.Array], valid: jax.Array | None, num_experts: int
) -> list[jax.Array]:
    """How many earlier valid tokens of a token's window made the same choice: i32 [1, block] each.

    choices: experts i32 [1, block]. Several lie in one word, in fields with a bit to spare. What
    two tokens' words differ in, subtracted from those bits, leaves a bit where fields are the same.
    """
    block = choices[0].shape[1]
    nobody = 0 if valid is None else 1  # the expert of tokens that are not valid, which none chose
    width = max((num_experts - 1 + nobody).bit_length(), (WINDOW - 1).bit_length()) + 1
    places = []
    for first in range(0, len(choices), 32 // width):
        some = choices[first : first + 32 // width]
        word: Any = sum(choice << (width * i) for i, choice in enumerate(some))
        ids = [only(valid, choice, num_experts) for choice in some]
        others: Any = sum(choice << (width * i) for i, choice in enumerate(ids))
        spare = sum(1 << (width * (i + 1) - 1) for i in range(len(some)))
        bits = np.uint32(spare).astype(np.int32)
        same: list[Any] = []
        for start in range(0, block, tilings.LANES):
            strip = slice(start, start + tilings.LANES)
            shape = (ROWS, tilings.LANES)
            lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            total: Any = 0
            for i in range(0, WINDOW, ROWS):
                earlier = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + i
                source = (lane & ~(WINDOW - 1)) + earlier
                other = look_up([jnp.broadcast_to(others[:, strip], shape)], source)
                equal = bits - (other ^ word[:, strip])
                equal &= jnp.where(source < lane, bits, 0)
                total += jax.lax.shift_right_logical(equal, width - 1)
            same.append(jnp.sum(total, axis=0, keepdims=True))
        count = jnp.concatenate(same, axis=1)
        places += [
            jax.lax.shift_right_logical(count, width * i) & ((1 << width) - 1)
            for i in range(len(some))
        ]
    return places


def slots_kernel(experts_ref: Any, places_ref: Any, counts_ref: Any, slots_ref: Any) -> None:
    """Places behind all earlier choices, of one block of tokens. counts_ref: [k, E]."""
    top_k = experts_ref.shape[0]
    rows = [jnp.zeros_like(counts_ref[0:1, :])]
    for j in range(top_k - 1):
        rows.append(rows[-1] + counts_ref[j : j + 1, :])
    ahead = jnp.concatenate(rows)
    table = [ahead[:, columns] for columns in lane_parts(ahead.shape[1])]
    for start in range(0, experts_ref.shape[1], tilings.LANES):
        strip = (slice(None), slice(start, start + tilings.LANES))
        places = places_ref[strip]
        slots_ref[strip] = jnp.where(places < 0, -1, places + look_up(table, experts_ref[strip]))


def behind_earlier_choices(experts: jax.Array, places: jax.Array, counts: jax.Array) -> jax.Array:
    """Slots [k, T] of places among the tokens of the same choice, and of counts [k, E]."""
    top_k, tokens = experts.shape
    block = min(BLOCK, tilings.round_up(tokens, tilings.LANES))
    wide = tilings.round_up(counts.shape[1], tilings.LANES)
    rows = pl.BlockSpec((top_k, block), tokens_block)
    return pl.pallas_call(
        slots_kernel,
        grid=(pl.cdiv(tokens, block),),
        in_specs=[rows, rows, pl.BlockSpec((top_k, wide), whole_block)],
        out_specs=rows,
        out_shape=result_like(experts, experts.shape, jnp.int32),
        compiler_params=tilings.compiler_params(("parallel",), top_k * (6 * block + wide) * 4),
        name="taskmoe_queue_slots",
    )(experts, places, counts)
