"""gmm as a Pallas TPU kernel:  out[i] = lhs[i] @ rhs[g(i)], or the sum of several such products.

Grid: (blocks of width, visits, blocks of depth), see `group_visits`. Visits walk the rows in order,
so a group's matrix is fetched once a width block, and a block of rows that straddles groups stays
in VMEM until its last group has written its rows.

Products are written out in pieces of the MXU's size, two vector registers wide: the compiler then
keeps each piece's sum in registers, where the product of whole blocks spills.

Matrices may be `Quantized`: 8 bits are what is copied, a piece of them at a time is converted to
the rows' dtype, and scales multiply the piece's product; with transpose_rhs they lie along depth
and multiply the rows. `QuantizedRows` meet them as int8 where the chip multiplies that, else as
bfloat16, which holds every int8.

VMEM: two buffers each of lhs [m, k], rhs [k, n] and out [m, n], and the sum [m, n] in f32 where
depth is cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import tiling as tilings
from taskmoe.kernels.block_products import (
    dot,
    each,
    keep,
    passes,
    pieces,
    scale_index,
    within_scales,
)
from taskmoe.kernels.checks import result_like
from taskmoe.kernels.group_visits import (
    Visit,
    Visits,
    mixed_rows,
    part_sizes,
    visit_blocks,
)
from taskmoe.kernels.groups import Groups
from taskmoe.kernels.options import ProductOptions
from taskmoe.kernels.platforms import chip
from taskmoe.kernels.product_tiling import ProductSizes, gmm_tiling, gmm_vmem_bytes
from taskmoe.kernels.quantized import Quantized, QuantizedRows, nbytes, with_scales
from taskmoe.kernels.quantized import itemsize as itemsize_of
from taskmoe.kernels.visit_pipeline import Blocks, visits_call

#: Columns of one piece of a product.
PIECE_COLUMNS = 256
#: MXU-sized products of bfloat16 that are written out side by side; of float32 half as many.
WRITTEN = 160


def cost(s: ProductSizes, rhs_bytes: int) -> pl.CostEstimate:
    """FLOPs and least bytes of gmm when every group has rows; rhs_bytes: of one pair's rhs."""
    moved = s.count * (s.m * s.k * s.itemsize + rhs_bytes) + s.m * s.n * s.out_itemsize
    flops = 2 * s.count * s.m * s.k * s.n
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)


def lhs_block(width: Any, visit: Any, depth: Any, walk: Visits) -> tuple[Any, ...]:
    """Rows of the visit's block, at this depth."""
    return walk.block[visit], depth


def rhs_block(width: Any, visit: Any, depth: Any, walk: Visits) -> tuple[Any, ...]:
    """The matrix [K, N] of the visit's group."""
    return walk.group[visit], depth, width


def rhs_block_transposed(width: Any, visit: Any, depth: Any, walk: Visits) -> tuple[Any, ...]:
    """The matrix [N, K] of the visit's group."""
    return walk.group[visit], width, depth


def lhs_scales_block(width: Any, visit: Any, depth: Any, walk: Visits) -> tuple[Any, ...]:
    """Scales of the rows of the visit's block, at all depths."""
    return walk.block[visit], 0


def scales_block(width: Any, visit: Any, depth: Any, walk: Visits) -> tuple[Any, ...]:
    """Scales of the group's matrix [K, N], of all its blocks."""
    return walk.group[visit], 0, 0, width


def scales_block_transposed(width: Any, visit: Any, depth: Any, walk: Visits) -> tuple[Any, ...]:
    """Scales of the group's matrix [N, K], of all its blocks."""
    return walk.group[visit], 0, 0, depth


def out_block(width: Any, visit: Any, depth: Any, walk: Visits) -> tuple[Any, ...]:
    """Rows of the visit's block; the same for all visits of the block and all depths."""
    return walk.block[visit], width


def kernel(
    walk: Visits,
    pairs: Sequence[tuple[Any, Any]],
    out_ref: Any,
    *acc_ref: Any,
    depth_size: int,
    transpose_rhs: bool,
    depth_pieces: Sequence[pl.Slice],
    column_pieces: Sequence[pl.Slice],
    passes: Mapping[int, int],
    scaled_size: int,
    dtype: Any,
) -> None:
    """One visit at one depth. acc_ref is there when depth is cut.

    pairs: of lhs and rhs, whose products are added.
    depth_pieces, column_pieces: of a block of the matrix; a product has all rows of a part.
    passes: over the columns, for each size of a part, see `each`.
    scaled_size: rows of `Quantized` matrices, which their blocks of scales divide. dtype: what is
    multiplied.
    """
    rows, block_depth = pairs[0][0].shape
    visit, depth = Visit(walk, pl.program_id(1), rows), pl.program_id(2)
    depths = pl.cdiv(depth_size, block_depth)
    width = pl.program_id(0) * out_ref.shape[1]
    unit = tilings.sublanes(itemsize_of(pairs[0][0]))
    out_unit = tilings.sublanes(out_ref.dtype.itemsize)
    mixed = mixed_rows(rows, max(unit, out_unit))

    def product(lhs_ref: Any, rhs_ref: Any, part: Any, columns: Any) -> jax.Array:
        is_quantized = isinstance(rhs_ref, Quantized)
        values_ref = rhs_ref.values if is_quantized else rhs_ref
        rows_ref = lhs_ref.values if isinstance(lhs_ref, QuantizedRows) else lhs_ref
        block = scaled_size // rhs_ref.blocks if is_quantized else scaled_size
        total: Any = 0
        for units in depth_pieces:
            lhs = rows_ref[part, units].astype(dtype)
            rhs = values_ref[columns, units] if transpose_rhs else values_ref[units, columns]
            rhs = rhs.astype(dtype)
            if is_quantized and transpose_rhs:
                index = scale_index(rhs_ref, width + columns.start, block)
                lhs = (lhs.astype(jnp.float32) * rhs_ref.scales[index, :, units]).astype(dtype)
            if depth_size % block_depth:  # the last block of depth overhangs: both may hold NaN
                left = depth_size - depth * block_depth - units.start
                lhs = keep(lhs, left, axis=1)
                rhs = keep(rhs, left, axis=1 if transpose_rhs else 0)
            sums = dot(lhs, rhs, 1, 1 if transpose_rhs else 0)
            if is_quantized and not transpose_rhs:
                index = scale_index(rhs_ref, depth * block_depth + units.start, block)
                sums = sums.astype(jnp.float32) * rhs_ref.scales[index, :, columns]
                if isinstance(lhs_ref, QuantizedRows):
                    sums *= column(lhs_ref.scales[part, :], index)
            total += sums
        return total

    def work(start: Any, size: int) -> None:
        part = pl.ds(start, size)

        def total(columns: Any) -> Any:
            return sum(product(*pair, part, columns) for pair in pairs)

        def store(columns: Any) -> None:
            value = total(columns)
            if acc_ref:
                value += acc_ref[0][part, columns]
            visit.write(out_ref, value, part, columns, mixed)

        def init(columns: Any) -> None:
            acc_ref[0][part, columns] = total(columns)

        def accumulate(columns: Any) -> None:
            acc_ref[0][part, columns] += total(columns)

        def each_piece(act: Callable[[Any], None]) -> None:
            each(column_pieces, passes[size], act)

        if not acc_ref:
            each_piece(store)
            return
        pl.when(depth == 0)(functools.partial(each_piece, init))
        pl.when((depth > 0) & (depth < depths - 1))(functools.partial(each_piece, accumulate))
        pl.when(depth == depths - 1)(functools.partial(each_piece, store))

    visit.begin(out_ref, depth == 0)
    visit.work(work, unit)
    visit.finish(out_ref, depth == depths - 1, out_unit)


def column(x: jax.Array, index: Any) -> jax.Array:
    """One column [m, 1] of x [m, n]; index may be known at run time only."""
    if x.shape[1] == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.sum(jnp.where(lane == index, x, 0), axis=1, keepdims=True)


def gmm_mosaic(options: ProductOptions, lhs: Any, rhs: Any, groups: Groups) -> jax.Array:
    """The kernel call; arguments as in `gmm`, validated."""
    return sum_of_gmms_mosaic(options, [(lhs, rhs)], groups)


def sum_of_gmms_mosaic(
    options: ProductOptions, pairs: Sequence[tuple[Any, Any]], groups: Groups
) -> jax.Array:
    """`gmm` of each pair of lhs and rhs, which are alike, and their sum, rounded once."""
    lhs, rhs = pairs[0]
    (m, k), count = lhs.shape, len(pairs)
    e, n = rhs.shape[0], rhs.shape[1 if options.transpose_rhs else 2]
    itemsizes = itemsize_of(lhs), jnp.dtype(options.out_dtype).itemsize
    dtype = jnp.dtype(jnp.int8)
    if not isinstance(lhs, QuantizedRows):
        dtype = lhs.dtype
    elif not chip().int8_ops_per_second:
        dtype = jnp.dtype(jnp.bfloat16 if chip().generation > 3 else jnp.float32)
    sizes = ProductSizes(m, k, n, e, *itemsizes, chip(), itemsize_of(rhs), count)
    t = options.tiling or gmm_tiling(sizes)
    walk = visit_blocks(groups, e, m, t.m)
    scale_blocks = rhs.blocks if isinstance(rhs, Quantized) else 0
    mxu, scaled = chip().mxu_column_size, rhs.shape[1] // max(scale_blocks, 1)
    written = WRITTEN * 2 // max(dtype.itemsize, 2) * mxu
    if options.transpose_rhs:
        depth_pieces = pieces(t.k, mxu)
        column_pieces = within_scales(rhs, t.n, scaled, PIECE_COLUMNS)
        matrix = pl.BlockSpec((None, t.n, t.k), rhs_block_transposed)
        scales = pl.BlockSpec((None, scale_blocks, 1, t.k), scales_block_transposed)
    else:
        depth_pieces = within_scales(rhs, t.k, scaled, mxu)
        column_pieces = pieces(t.n, PIECE_COLUMNS)
        matrix = pl.BlockSpec((None, t.k, t.n), rhs_block)
        scales = pl.BlockSpec((None, scale_blocks, 1, t.n), scales_block)
    blocks = Blocks(
        grid=lambda walk: (pl.cdiv(n, t.n), walk.num[0], pl.cdiv(k, t.k)),
        in_specs=[
            [
                (
                    with_scales(
                        lhs,
                        pl.BlockSpec((t.m, t.k), lhs_block),
                        pl.BlockSpec((t.m, scale_blocks), lhs_scales_block),
                    ),
                    with_scales(rhs, matrix, scales),
                )
            ]
            * count
        ],
        out_specs=pl.BlockSpec((t.m, t.n), out_block),
    )
    return visits_call(
        functools.partial(
            kernel,
            depth_size=k,
            transpose_rhs=options.transpose_rhs,
            depth_pieces=depth_pieces,
            column_pieces=column_pieces,
            passes={
                size: passes(column_pieces, written // (max(size, mxu) * len(depth_pieces) * count))
                for size in part_sizes(t.m)
            },
            scaled_size=rhs.shape[1],
            dtype=dtype,
        ),
        blocks,
        walk,
        list(pairs),
        out_shape=result_like(groups.sizes, (m, n), options.out_dtype),
        scratch_shapes=[pltpu.VMEM((t.m, t.n), jnp.float32)] if t.k < k else [],
        semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_bytes=gmm_vmem_bytes(t, sizes),
        cost_estimate=cost(sizes, nbytes(rhs)),
        name="taskmoe_gmm",
    )
