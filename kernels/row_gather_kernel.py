"""Row movement as one Pallas TPU kernel: gather rows of HBM by index, weigh and add them up.

    rows: out[i] = sum_j weights[i, j] * source[index[i, j]]        dispatch, combine, their grads
    dots: out[i, j] = <source[index[i, j]], grad[i]>                gradient of combine's weights

`dispatch` is a gather too, by the inverse of its rows: so every output row is written once, in
blocks, and rows that nobody fills are zeros without a pass that zeroes them.

Grid: blocks of output rows, and within each, blocks of width. Each step starts the asynchronous
copies of the next step's rows, one each, waits for its own, and combines them in f32. Indices of
this and of the next block lie in SMEM; an index below 0 copies nothing and counts as zero. Rows of
16-bit values share a sublane in pairs, so the pair is copied, and the half that was asked for is
taken in VMEM; TPU v3 copies 32-bit rows eight at a time.

VMEM: two buffers of k * [m, n] 32-bit values for the copies, two of [m, n] out (and grad).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import tiling as tilings
from taskmoe.kernels.checks import in_hbm, result_like
from taskmoe.kernels.platforms import chip


def cost(num_rows: int, top_k: int, width: int, itemsize: int) -> pl.CostEstimate:
    """FLOPs and bytes of moving num_rows * top_k rows into num_rows; 16-bit rows come in pairs."""
    moved = num_rows * width * (top_k * 4 + itemsize)
    return pl.CostEstimate(
        flops=2 * num_rows * top_k * width, bytes_accessed=moved, transcendentals=0
    )


def index_block(step: Any, *, widths: int) -> tuple[Any, ...]:
    """Indices of the step's block of rows."""
    return step // widths, 0, 0


def next_index_block(step: Any, *, widths: int) -> tuple[Any, ...]:
    """Indices of the next step's block of rows; behind the last one there are none."""
    return (step + 1) // widths, 0, 0


def rows_block(step: Any, *, widths: int) -> tuple[Any, ...]:
    """The step's rows, all columns: vectors of indices and weights, and dots."""
    return step // widths, 0


def value_block(step: Any, *, widths: int) -> tuple[Any, ...]:
    """The step's rows and columns."""
    return step // widths, step % widths


def kernel(
    index_ref: Any,
    next_ref: Any,
    vector_ref: Any,
    weights_ref: Any,
    grad_ref: Any,
    source_ref: Any,
    out_ref: Any,
    buffer_ref: Any,
    semaphores: Any,
    *,
    widths: int,
    top_k: int,
    pack: int,
) -> None:
    """One block of rows and columns. weights_ref or grad_ref may be None."""
    step = pl.program_id(0)
    groups, group, width = buffer_ref.shape[2], buffer_ref.shape[3] // pack, buffer_ref.shape[4]
    one_word = source_ref.dtype.itemsize == 4
    slot = jax.lax.rem(step, 2)

    def start(indices: Any, at_step: Any, i: Any, row: Any) -> None:
        """Start the copies of a row of the i-th group of a step."""
        at_slot = jax.lax.rem(at_step, 2)
        column = pl.multiple_of(jax.lax.rem(at_step, widths) * width, tilings.LANES)
        columns = pl.ds(column, width) if widths > 1 else slice(None)
        for j in range(top_k):
            index = indices[0, (i * group + row) * top_k + j]
            first = pl.multiple_of(index & -pack, pack)
            copy = pltpu.make_async_copy(
                source_ref.at[pl.ds(first, pack), columns],
                buffer_ref.at[at_slot, j, i, pl.ds(row * pack, pack)],
                semaphores.at[at_slot],
            )
            pl.when(index >= 0)(copy.start)

    def wait() -> None:
        """For the copies of all indices: a semaphore counts bytes, so for powers of two of them."""
        count = jnp.sum((vector_ref[...] >= 0).astype(jnp.float32)).astype(jnp.int32)
        rows = groups * group
        for bit in range((rows * top_k).bit_length()):
            held, many = min(1 << bit, rows), max((1 << bit) // rows, 1)
            whole, inner = max(held // group, 1), min(held, group) * pack
            part = buffer_ref.at[slot, pl.ds(0, many), pl.ds(0, whole), pl.ds(0, inner)]
            copy = pltpu.make_async_copy(part, part, semaphores.at[slot])
            pl.when(count & (1 << bit) != 0)(copy.wait)

    @pl.when(step == 0)
    def _first() -> None:
        def one(at: Any, carry: None) -> None:
            start(index_ref, step, at // group, at % group)

        jax.lax.fori_loop(0, groups * group, one, None)

    wait()

    def gathered(i: Any, j: int) -> jax.Array:
        """Rows of a group, [group, width] f32."""
        index = vector_ref[pl.ds(i * group, group), j : j + 1]
        copied = buffer_ref[slot, j, i]
        if pack == 1:
            value = copied
        elif one_word:
            parts = copied.reshape(group, pack, width)
            which = jax.lax.broadcasted_iota(jnp.int32, parts.shape, 1)
            value = jnp.sum(jnp.where(which == (index % pack)[..., None], parts, 0), axis=1)
        else:  # even rows are the low halves
            pair = pltpu.bitcast(copied, jnp.int32)
            pair = jnp.where(index % 2 == 1, pair & jnp.int32(-65536), pair << 16)
            value = jax.lax.bitcast_convert_type(pair, jnp.float32)
        return jnp.where(index >= 0, value, 0)

    @pl.when((jax.lax.rem(step, widths) == 0) if grad_ref is not None else False)
    def _init() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    def one_group(i: Any, carry: None) -> None:
        """The next step's copies are started while this one's rows are combined."""
        for row in range(group):
            start(next_ref, step + 1, i, row)
        rows = pl.ds(pl.multiple_of(i * group, group), group)
        if grad_ref is not None:
            grad = grad_ref[rows].astype(jnp.float32)
            lane = jax.lax.broadcasted_iota(jnp.int32, (group, top_k), 1)
            for j in range(top_k):
                dot = jnp.sum(gathered(i, j) * grad, axis=1, keepdims=True)
                out_ref[rows] += jnp.where(lane == j, dot, 0)
            return
        total = jnp.zeros((group, width), jnp.float32)
        for j in range(top_k):
            value = gathered(i, j)
            total += value if weights_ref is None else value * weights_ref[rows, j : j + 1]
        out_ref[rows] = total.astype(out_ref.dtype)

    jax.lax.fori_loop(0, groups, one_group, None)


def rows_a_copy(itemsize: int) -> int:
    """Rows that one copy must take: 16-bit rows come in pairs; TPU v3 copies whole registers."""
    if chip().generation <= 3:
        return tilings.sublanes(itemsize)
    return 4 // itemsize


def block_sizes(num_rows: int, top_k: int, width: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns a block: whole rows if 8 (16) fit, and of rows what fits, up to 128."""
    budget = tilings.vmem_budget_bytes(chip()) // 2
    least = tilings.sublanes(itemsize)
    per_value = 2 * top_k * rows_a_copy(itemsize) * itemsize + 4 * itemsize + 8
    columns = width
    if rows_a_copy(itemsize) == least and width <= tilings.LANES:
        columns = 2 * tilings.LANES  # TPU v3 takes no narrower rows
    if least * width * per_value > budget:
        fitting = budget // (least * per_value)
        columns = next(
            (c for c in tilings.splits(width, range(1, 1025)) if width % c == 0 and c <= fitting),
            tilings.LANES,
        )
    # SMEM holds two blocks of indices twice. That of TPU v3 has 16 KiB, that of others 1 MiB.
    indices = 256 if chip().generation <= 3 else 1 << 14
    rows = least
    while (
        rows < min(num_rows, 128)
        and 2 * rows * columns * per_value <= budget
        and 2 * rows * top_k <= indices
    ):
        rows *= 2
    return rows, columns


def gather_rows(
    source: jax.Array, index: jax.Array, weights: jax.Array | None, grad: jax.Array | None
) -> jax.Array:
    """The kernel call.

    source: [N, D] bf16|f32; index: [R, k] i32, below 0 for none; weights: [R, k] f32 or None.
    Returns [R, D] in source's dtype, or with grad [R, D] the dots [R, k] f32.
    """
    traced = isinstance(source, jax.core.Tracer)  # it is not under `jax.disable_jit`
    return (_batchable if traced else _gather_rows)(source, index, weights, grad)


def _gather_rows(
    source: jax.Array, index: jax.Array, weights: jax.Array | None, grad: jax.Array | None
) -> jax.Array:
    (num_rows, top_k), width = index.shape, source.shape[1]
    weights = None if weights is None else weights.astype(jnp.float32)
    itemsize = source.dtype.itemsize
    rows, columns = block_sizes(num_rows, top_k, width, itemsize)
    overhang = -width % columns
    if overhang:  # a width that has no fitting divisor
        source = jnp.pad(source, ((0, 0), (0, overhang)))
        grad = None if grad is None else jnp.pad(grad, ((0, 0), (0, overhang)))
    pack, group = rows_a_copy(itemsize), tilings.sublanes(itemsize)
    if source.shape[0] % pack:
        source = jnp.pad(source, ((0, -source.shape[0] % pack), (0, 0)))
    widths, blocks = (width + overhang) // columns, -(-num_rows // rows)
    steps = blocks * widths
    behind = (blocks + 1) * rows - num_rows
    index = jnp.pad(index, ((0, behind), (0, 0)), constant_values=-1)
    scalars = index.reshape(blocks + 1, 1, rows * top_k)
    at = functools.partial
    smem = at(pl.BlockSpec, (None, 1, rows * top_k), memory_space=pltpu.SMEM)
    vector = pl.BlockSpec((rows, top_k), at(rows_block, widths=widths))
    values = pl.BlockSpec((rows, columns), at(value_block, widths=widths))
    dots = grad is not None
    out_shape, out_dtype = (
        ((num_rows, top_k) if dots else (num_rows, width + overhang)),
        (jnp.float32 if dots else source.dtype),
    )
    call = pl.pallas_call(
        at(kernel, widths=widths, top_k=top_k, pack=pack),
        grid=(steps,),
        in_specs=[
            smem(index_map=at(index_block, widths=widths)),
            smem(index_map=at(next_index_block, widths=widths)),
            vector,
            None if weights is None else vector,
            values if dots else None,
            pl.BlockSpec(memory_space=pltpu.HBM),
        ],
        out_specs=vector if dots else values,
        out_shape=result_like(source, out_shape, out_dtype),
        scratch_shapes=[
            pltpu.VMEM((2, top_k, rows // group, group * pack, columns), source.dtype),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=tilings.compiler_params(
            ("arbitrary",), rows * columns * (2 * top_k * pack * itemsize + 4 * itemsize + 8)
        ),
        cost_estimate=cost(num_rows, top_k, width, itemsize),
        name="taskmoe_row_dots" if dots else "taskmoe_gather_rows",
    )
    out = call(scalars, scalars, index, weights, grad, in_hbm(source))
    return out if dots else out[:, :width]


_batchable = jax.custom_batching.custom_vmap(_gather_rows)


@_batchable.def_vmap
def _gather_batch(
    size: int,
    batched: Any,
    source: jax.Array,
    index: jax.Array,
    weights: jax.Array | None,
    grad: jax.Array | None,
) -> tuple[jax.Array, bool]:
    """A batch as one call: its sources behind one another, which no operand in HBM can be else."""
    if batched[0]:
        starts = jnp.arange(size, dtype=jnp.int32)[:, None, None] * source.shape[1]
        index = jnp.where(index >= 0, index + starts, -1)
        source = source.reshape(-1, source.shape[-1])

    def flat(x: jax.Array, mapped: bool) -> jax.Array:
        whole = x if mapped else jnp.broadcast_to(x, (size, *x.shape))
        return whole.reshape(-1, x.shape[-1])

    rows = jax.tree.map(flat, (index, weights, grad), (batched[0] or batched[1], *batched[2:]))
    out = _batchable(source, *rows)
    return out.reshape(size, -1, out.shape[-1]), True
