"""gmm as a Pallas TPU kernel:  out[i] = lhs[i] @ rhs[g(i)].

Grid: (blocks of width, visits, blocks of depth), see `group_visits`. Visits walk the rows in order,
so a group's matrix is fetched once a width block, and a block of rows that straddles groups stays
in VMEM until its last group has written its rows. A visit that owns its whole block is one
product; one that owns a part works in sub-blocks and skips those that it has no row in.

Products are written out in pieces of the MXU's size, two vector registers wide: the compiler then
keeps each piece's sum in registers, where the product of whole blocks spills.

VMEM: two buffers each of lhs [m, k], rhs [k, n] and out [m, n], the product in f32, and the sum
[m, n] in f32 where depth is cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import tiling as tilings
from taskmoe.kernels.checks import result_like
from taskmoe.kernels.group_visits import visit_blocks
from taskmoe.kernels.groups import Groups, group_bounds
from taskmoe.kernels.options import ProductOptions
from taskmoe.kernels.platforms import chip

#: Rows of the sub-blocks that a visit works in when it owns a part of its block.
SUB_ROWS = 128
#: Columns of one piece of a product.
PIECE_COLUMNS = 256


def cost(m: int, k: int, n: int, e: int, itemsize: int, out_itemsize: int) -> pl.CostEstimate:
    """FLOPs and least bytes of gmm when every group has rows."""
    moved = (m * k + e * k * n) * itemsize + m * n * out_itemsize
    return pl.CostEstimate(flops=2 * m * k * n, bytes_accessed=moved, transcendentals=0)


def lhs_block(width: Any, visit: Any, depth: Any, *walk: Any) -> tuple[Any, ...]:
    """Rows of the visit's block, at this depth."""
    return walk[3][visit], depth


def rhs_block(width: Any, visit: Any, depth: Any, *walk: Any) -> tuple[Any, ...]:
    """The matrix [K, N] of the visit's group."""
    return walk[2][visit], depth, width


def rhs_block_transposed(width: Any, visit: Any, depth: Any, *walk: Any) -> tuple[Any, ...]:
    """The matrix [N, K] of the visit's group."""
    return walk[2][visit], width, depth


def out_block(width: Any, visit: Any, depth: Any, *walk: Any) -> tuple[Any, ...]:
    """Rows of the visit's block; the same for all visits of the block and all depths."""
    return walk[3][visit], width


def kernel(
    starts_ref: Any,
    ends_ref: Any,
    group_ref: Any,
    block_ref: Any,
    lhs_ref: Any,
    rhs_ref: Any,
    out_ref: Any,
    *acc_ref: Any,
    depth_size: int,
    transpose_rhs: bool,
    mxu_size: int,
) -> None:
    """One visit at one depth. acc_ref is there when depth is cut."""
    visit, depth = pl.program_id(1), pl.program_id(2)
    rows, block_depth = lhs_ref.shape
    depths = pl.cdiv(depth_size, block_depth)
    block, group = block_ref[visit], group_ref[visit]
    low = jnp.maximum(starts_ref[group] - block * rows, 0)
    high = jnp.minimum(ends_ref[group] - block * rows, rows)
    owns_all = (low == 0) & (high == rows)
    arrives = (visit == 0) | (block_ref[jnp.maximum(visit - 1, 0)] != block)

    def product(part: Any, columns: Any) -> jax.Array:
        total: Any = 0
        for units in pieces(block_depth, mxu_size):
            lhs = lhs_ref[part, units]
            rhs = rhs_ref[columns, units] if transpose_rhs else rhs_ref[units, columns]
            if depth_size % block_depth:  # the last block of depth overhangs: both may hold NaN
                left = depth_size - depth * block_depth - units.start
                lhs = keep(lhs, left, axis=1)
                rhs = keep(rhs, left, axis=1 if transpose_rhs else 0)
            dims: Any = (((1,), (1 if transpose_rhs else 0,)), ((), ()))
            total += jax.lax.dot_general(lhs, rhs, dims, preferred_element_type=jnp.float32)
        return total

    def work(start: Any, size: int, masked: bool) -> None:
        def each_piece(act: Callable[[Any, Any, Any], None]) -> None:
            for inside in pieces(size, mxu_size):
                first = start + inside.start
                for columns in pieces(out_ref.shape[1], PIECE_COLUMNS):
                    act(first, pl.ds(first, inside.size), columns)

        def store(first: Any, part: Any, columns: Any) -> None:
            value = product(part, columns)
            if acc_ref:
                value += acc_ref[0][part, columns]
            if masked:
                row = first + jax.lax.broadcasted_iota(jnp.int32, value.shape, 0)
                old = out_ref[part, columns].astype(value.dtype)
                value = jnp.where((row >= low) & (row < high), value, old)
            out_ref[part, columns] = value.astype(out_ref.dtype)

        def init(first: Any, part: Any, columns: Any) -> None:
            acc_ref[0][part, columns] = product(part, columns)

        def accumulate(first: Any, part: Any, columns: Any) -> None:
            acc_ref[0][part, columns] += product(part, columns)

        if not acc_ref:
            each_piece(store)
            return
        pl.when(depth == 0)(functools.partial(each_piece, init))
        pl.when((depth > 0) & (depth < depths - 1))(functools.partial(each_piece, accumulate))
        pl.when(depth == depths - 1)(functools.partial(each_piece, store))

    @pl.when(arrives & (depth == 0) & ~owns_all)
    def _zero() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(owns_all)
    def _whole() -> None:
        work(0, rows, masked=False)

    @pl.when(~owns_all & (high > low))
    def _parts() -> None:
        sub = SUB_ROWS if rows % SUB_ROWS == 0 else rows

        def one(i: jax.Array, carry: None) -> None:
            work(pl.multiple_of(i * sub, sub), sub, masked=True)

        jax.lax.fori_loop(low // sub, pl.cdiv(high, sub), one, None)


def pieces(size: int, piece: int) -> list[pl.Slice]:
    """Slices that cut `size` into pieces, or one of all of it where they do not fit exactly."""
    piece = piece if size % piece == 0 else size
    return [pl.Slice(first, piece) for first in range(0, size, piece)]


def keep(x: jax.Array, left: Any, axis: int) -> jax.Array:
    """X with everything from index `left` of this axis on set to zero."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(index < left, x.astype(jnp.float32), 0).astype(x.dtype)


def gmm_mosaic(
    options: ProductOptions, lhs: jax.Array, rhs: jax.Array, groups: Groups
) -> jax.Array:
    """The kernel call; arguments as in `gmm`, validated."""
    m, k = lhs.shape
    e, n = rhs.shape[0], rhs.shape[1 if options.transpose_rhs else 2]
    itemsize, out_itemsize = lhs.dtype.itemsize, jnp.dtype(options.out_dtype).itemsize
    t = options.tiling or tilings.gmm_tiling(m, k, n, e, itemsize, out_itemsize, chip())
    walk = visit_blocks(group_bounds(groups, e, m), m, t.m)
    rhs_spec = (
        pl.BlockSpec((None, t.n, t.k), rhs_block_transposed)
        if options.transpose_rhs
        else pl.BlockSpec((None, t.k, t.n), rhs_block)
    )
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(pl.cdiv(n, t.n), walk.num, pl.cdiv(k, t.k)),
        in_specs=[pl.BlockSpec((t.m, t.k), lhs_block), rhs_spec],
        out_specs=pl.BlockSpec((t.m, t.n), out_block),
        scratch_shapes=[pltpu.VMEM((t.m, t.n), jnp.float32)] if t.k < k else [],
    )
    vmem = tilings.gmm_vmem_bytes(t, k, itemsize, out_itemsize)
    call = pl.pallas_call(
        functools.partial(
            kernel,
            depth_size=k,
            transpose_rhs=options.transpose_rhs,
            mxu_size=chip().mxu_column_size,
        ),
        grid_spec=grid_spec,
        out_shape=result_like(lhs, (m, n), options.out_dtype),
        compiler_params=tilings.compiler_params(("parallel", "arbitrary", "arbitrary"), vmem),
        cost_estimate=cost(m, k, n, e, itemsize, out_itemsize),
        name="taskmoe_gmm",
    )
    return call(walk.starts, walk.ends, walk.group, walk.block, lhs, rhs)
