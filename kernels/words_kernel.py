"""Rows as they travel between devices, [M, 1, W] of 32-bit words, and back, as Pallas TPU kernels.

`exchange_plan.to_words` and `from_words` are the definition. XLA moves rows from registers of eight
rows to registers of one by itself too, some ten times as slowly as HBM could.

Grid: blocks of rows. VMEM: two buffers each of a block of rows and of words, and the block padded.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import exchange_plan
from taskmoe.kernels.checks import result_like
from taskmoe.kernels.exchange_plan import join_words, split_words
from taskmoe.kernels.platforms import interpret_mode
from taskmoe.kernels.tiling import LANES, round_up, sublanes

#: Most rows and bytes of a block.
BLOCK_ROWS, BLOCK_BYTES = 256, 1 << 20


def columns_of(rows_ref: Any, first: int, on_tpu: bool) -> Any:
    """A ref to 128 columns of rows [m, 1, W] as [m, 128].

    On a TPU as every (W/128)-th of the [m W/128, 128] that lie there: eight rows share a register
    then, where indexing makes one of each. The interpreter cannot reshape refs.
    """
    rows, _, width = rows_ref.shape
    if not on_tpu:
        return rows_ref.at[:, 0, pl.ds(first, LANES)]
    step = width // LANES
    flat = rows_ref.reshape(rows * step, LANES)
    return flat.at[pl.ds(first // LANES, rows, stride=step)]


def unpack_block(rows_ref: Any, x_ref: Any, on_tpu: bool) -> None:
    """Rows [m, 1, W] as they travelled to values [m, D], with their padding."""
    width = rows_ref.shape[2]
    for first in range(0, width, LANES):
        words = columns_of(rows_ref, first, on_tpu)[...]
        for part, values in enumerate(split_words(words, x_ref.dtype)):
            x_ref[:, pl.ds(part * width + first, LANES)] = values


def pack_block(x_ref: Any, rows_ref: Any, dtype: Any, on_tpu: bool) -> None:
    """Values [m, D], padded, to rows [m, 1, W] as they travel, rounded to dtype."""
    width = rows_ref.shape[2]
    for first in range(0, width, LANES):
        parts = range(first, x_ref.shape[1], width)
        values = [x_ref[:, pl.ds(part, LANES)] for part in parts]
        columns_of(rows_ref, first, on_tpu)[...] = join_words(values, dtype)


def pack_kernel(x_ref: Any, words_ref: Any, padded_ref: Any) -> None:
    """One block of rows to words."""
    d = x_ref.shape[1]
    if d == padded_ref.shape[1]:
        pack_block(x_ref, words_ref, x_ref.dtype, on_tpu=True)
        return
    padded_ref[...] = jnp.zeros_like(padded_ref)
    padded_ref[:, :d] = x_ref[...]
    pack_block(padded_ref, words_ref, x_ref.dtype, on_tpu=True)


def unpack_kernel(words_ref: Any, x_ref: Any, padded_ref: Any) -> None:
    """One block of words to rows."""
    d = x_ref.shape[1]
    if d == padded_ref.shape[1]:
        unpack_block(words_ref, x_ref, on_tpu=True)
        return
    unpack_block(words_ref, padded_ref, on_tpu=True)
    x_ref[...] = padded_ref[:, :d]


def _call(kernel: Any, x: jax.Array, shape: tuple[int, ...], d: int, dtype: Any) -> Any:
    """The call that makes an array of this shape, one of rows and words [m, 1, w]."""
    m, itemsize = shape[0], jnp.dtype(dtype).itemsize
    width = round_up(d, 4 // itemsize * LANES)
    rows = BLOCK_ROWS
    while rows > sublanes(itemsize) and (rows * width * itemsize > BLOCK_BYTES or rows >= 2 * m):
        rows //= 2

    def block(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((rows, *shape[1:]), lambda i: (i, *(0 for _ in shape[1:])))

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(m, rows),),
        in_specs=[block(x.shape)],
        out_specs=block(shape),
        out_shape=result_like(x, shape, jnp.int32 if len(shape) == 3 and itemsize < 4 else dtype),
        scratch_shapes=[pltpu.VMEM((rows, width), dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=m * (d * itemsize + width * itemsize)
        ),
        name=f"taskmoe_{kernel.__name__.removesuffix('_kernel')}_rows",
    )


def _as_defined(d: int, itemsize: int) -> bool:
    """Whether XLA lays rows out: in the interpreter, and where the least block is too large."""
    return interpret_mode() is not None or sublanes(itemsize) * d * itemsize > BLOCK_BYTES


def pack_rows(x: jax.Array) -> jax.Array:
    """`to_words` by the kernel on a TPU; as defined in the interpreter and for very wide rows."""
    if _as_defined(x.shape[1], x.dtype.itemsize):
        return exchange_plan.to_words(x)
    m, d = x.shape
    width = round_up(d, 4 // x.dtype.itemsize * LANES) * x.dtype.itemsize // 4
    return _call(pack_kernel, x, (m, 1, width), d, x.dtype)(x)


def unpack_rows(words: jax.Array, d: int, dtype: Any) -> jax.Array:
    """`from_words` by the kernel on a TPU, and as defined where `pack_rows` is."""
    if _as_defined(d, jnp.dtype(dtype).itemsize):
        return exchange_plan.from_words(words, d, dtype)
    return _call(unpack_kernel, words, (words.shape[0], d), d, dtype)(words)
