"""Pallas kernels for products of groups of rows on NVIDIA Hopper.

Each thread block takes blocks of the result in turns. How it loads, multiplies and writes them is
in `hopper_ring`.

Rows of a group begin anywhere, and the copy engine begins at multiples of 8. So the first block of
a group may begin with rows of the group before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from taskmoe.kernels.hopper_ring import (
    BY_ROWS,
    COLUMNS,
    DEPTH,
    ROWS,
    TILE_ROWS,
    TILED,
    Blocks,
    kernel,
    multiplied,
    parts,
    ring_of,
    skip,
    work,
    write,
)


def rows_times_matrices(
    blocks: Blocks,
    rows: jax.Array,
    matrices: jax.Array,
    starts: jax.Array,
    ends: jax.Array,
    transposed: bool,
) -> jax.Array:
    """[M, K] and [E, K, N], or [E, N, K], to [M, N]; zeros in rows of no group.

    starts, ends: [E] i32, ascending. K: a multiple of 64. N: a multiple of the block's columns.
    """
    num_rows, depth = rows.shape
    num_groups, width = matrices.shape[0], matrices.shape[1 if transposed else 2]
    height, columns = blocks.block
    num_pieces, num_columns = depth // DEPTH, width // columns
    table, num_bands = bands(starts, ends, num_rows, height)

    def body(
        table: Any, num_bands: Any, left: Any, right: Any, out: Any, ring: Any, smem: Any
    ) -> None:
        total = num_bands[0] * num_columns

        def block(turn: Any) -> tuple[Any, ...]:
            """Matrix, its first row, the first and one past the last of the group, first column."""
            index = lax.axis_index("block") + turn * lax.axis_size("block")
            # Sixteen blocks one above the other, then those to their right: both operands stay in
            # the L2 cache.
            above = lax.div(index, 16 * num_columns) * 16
            index -= above * num_columns
            tall = jnp.minimum(num_bands[0] - above, 16)
            at = 4 * (above + lax.rem(index, tall))
            return *(table[at + i] for i in range(4)), lax.div(index, tall) * columns

        def operands(turn: Any) -> tuple[Any, Any, Any]:
            matrix, row, _, _, column = block(turn)
            these = pl.ds(pl.multiple_of(row, TILE_ROWS), height)

            def of_matrix(piece: Any) -> Any:
                at = (pl.ds(piece * DEPTH, DEPTH), pl.ds(column, columns))
                return right.at[(matrix, *(at[::-1] if transposed else at))]

            pieces = jnp.where(matrix < num_groups, num_pieces, 0)
            return pieces, lambda piece: left.at[these, pl.ds(piece * DEPTH, DEPTH)], of_matrix

        def multiply(turn: Any, step: Any) -> Any:
            matrix, row, first, last, column = block(turn)
            above, beside = parts(blocks)
            row, column = row + above, column + beside
            own_rows, own_columns = pl.ds(above, ROWS), pl.ds(beside, blocks.columns)

            def product(acc: Any, slot: Any, _: Any) -> None:
                if transposed:
                    b = ring.right.at[slot, own_columns].transpose((1, 0))
                else:
                    b = ring.right.at[slot, :, own_columns]
                plgpu.wgmma(acc, ring.left.at[slot, own_rows], b)

            # What is written stands here once: from two branches with the same code MLIR's
            # canonicalisation does not come to an end (JAX 0.11). So rows of no group are a sum of
            # no pieces.
            def some() -> None:
                acc = multiplied(ring, blocks, pieces, step, product).astype(out.dtype)

                def copy(piece: Any, c: int) -> None:
                    _out_rows(piece, out, row, column + c, first, last)

                write(smem, blocks, acc, copy)

            pieces = jnp.where(matrix < num_groups, num_pieces, 0)
            any_row = (row < last) & (row + ROWS > first)
            lax.cond(any_row, some, lambda: skip(ring, pieces, step))
            return step + pieces

        work(ring, blocks, total, operands, multiply)

    in_rows = _padded(rows, height)
    right = (columns, DEPTH) if transposed else (DEPTH, columns)
    result = jax.ShapeDtypeStruct((num_rows, width), rows.dtype)
    scratch = {
        "ring": ring_of(blocks, (height, DEPTH), right, rows.dtype),
        "smem": plgpu.SMEM((2, 2, ROWS, COLUMNS), rows.dtype, transforms=BY_ROWS),
    }
    return kernel(body, "gmm", result, scratch)(table, num_bands, in_rows, matrices)


def sums_of_groups(
    blocks: Blocks, lhs: jax.Array, grad: jax.Array, starts: jax.Array, ends: jax.Array
) -> jax.Array:
    """[M, K] and [M, N] to [E, K, N], whatever rows of other groups hold.

    starts, ends: [E] i32, ascending. K and N: multiples of the block's rows and columns.
    """
    depth, width, num_groups = lhs.shape[1], grad.shape[1], starts.shape[0]
    height, columns = blocks.block
    down, across = depth // height, width // columns

    def body(
        starts: Any, ends: Any, left: Any, right: Any, out: Any, ring: Any, smem: Any, cut: Any
    ) -> None:
        def block(turn: Any) -> tuple[Any, ...]:
            """Group, its bounds, first row and column of the result, first row that is loaded."""
            index = lax.axis_index("block") + turn * lax.axis_size("block")
            group, index = lax.div(index, down * across), lax.rem(index, down * across)
            column = lax.div(index, down)
            first, last = starts[group], ends[group]
            begin = lax.div(first, TILE_ROWS) * TILE_ROWS
            pieces = jnp.where(last > first, pl.cdiv(last - begin, DEPTH), 0)
            return (
                group,
                first,
                last,
                lax.rem(index, down) * height,
                column * columns,
                begin,
                pieces,
            )

        def operands(turn: Any) -> tuple[Any, Any, Any]:
            _, _, _, row, column, begin, pieces = block(turn)

            def of(ref: Any, at: Any, size: int) -> Callable[[Any], Any]:
                def rows(piece: Any) -> Any:
                    start = pl.multiple_of(begin + piece * DEPTH, TILE_ROWS)
                    return ref.at[pl.ds(start, DEPTH), pl.ds(at, size)]

                return rows

            return pieces, of(left, row, height), of(right, column, columns)

        def multiply(turn: Any, step: Any) -> Any:
            group, first, last, row, column, begin, pieces = block(turn)
            above, beside = parts(blocks)

            def product(acc: Any, slot: Any, piece: Any) -> None:
                low, high = (bound - (begin + piece * DEPTH) for bound in (first, last))

                @pl.when((low > 0) | (high < DEPTH))
                def _() -> None:
                    _cut(ring.left, slot, low, high)
                    _cut(ring.right, slot, low, high)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(cut)
                    plgpu.barrier_wait(cut)

                a = ring.left.at[slot, :, pl.ds(above, ROWS)].transpose((1, 0))
                plgpu.wgmma(acc, a, ring.right.at[slot, :, pl.ds(beside, blocks.columns)])

            acc = multiplied(ring, blocks, pieces, step, product).astype(out.dtype)

            def copy(piece: Any, c: int) -> None:
                columns = pl.ds(column + beside + c, COLUMNS)
                _out(piece, out.at[group, pl.ds(row + above, ROWS), columns])

            write(smem, blocks, acc, copy)
            return step + pieces

        work(ring, blocks, num_groups * down * across, operands, multiply)

    in_rows = (_padded(x, DEPTH) for x in (lhs, grad))
    result = jax.ShapeDtypeStruct((num_groups, depth, width), lhs.dtype)
    scratch = {
        "ring": ring_of(blocks, (DEPTH, height), (DEPTH, columns), lhs.dtype),
        "smem": plgpu.SMEM((2, 2, ROWS, COLUMNS), lhs.dtype, transforms=TILED),
        "cut": plgpu.Barrier(num_arrivals=2),
    }
    return kernel(body, "tgmm", result, scratch)(starts, ends, *in_rows)


def bands(
    starts: jax.Array, ends: jax.Array, num_rows: int, height: int
) -> tuple[jax.Array, jax.Array]:
    """Bands of at most `height` rows that have one matrix, [4 * most] i32, and how many, [1] i32.

    starts, ends: ascending, and each group begins where the one before it ends.
    Of each: the matrix, or E for rows of no group; its first row; the first and one past the last
    row of the group in it.
    """
    num_groups = starts.shape[0]
    rest = jnp.array([0, num_rows], jnp.int32)
    first = jnp.concatenate([starts, rest[:1], ends[-1:]])
    last = jnp.concatenate([ends, starts[:1], rest[1:]])
    begin = first // TILE_ROWS * TILE_ROWS
    count = jnp.where(last > first, pl.cdiv(last - begin, height), 0)
    upto = jnp.cumsum(count)
    most = (num_rows + min(num_groups + 2, num_rows) * (height + TILE_ROWS - 2)) // height
    band = jnp.arange(most, dtype=jnp.int32)
    whose = jnp.minimum(jnp.sum(band[:, None] >= upto, axis=1), num_groups + 1)
    row = begin[whose] + height * (band - (upto - count)[whose])
    low, high = jnp.maximum(first[whose], row), jnp.minimum(last[whose], row + height)
    table = jnp.stack([jnp.minimum(whose, num_groups), row, low, high], axis=1)
    return table.astype(jnp.int32).reshape(-1), upto[-1:].astype(jnp.int32)


def _padded(rows: jax.Array, least: int) -> jax.Array:
    """Whole tiles of rows, and at least as many as are loaded at a time."""
    more = max(-rows.shape[0] % TILE_ROWS, least - rows.shape[0])
    return jnp.pad(rows, ((0, more), (0, 0)))


def _cut(buffer: Any, slot: Any, low: Any, high: Any) -> None:
    """Zeros in rows of a buffer outside low to high, whatever they hold; each warpgroup a half."""
    warpgroup, num_pieces = lax.axis_index("warpgroup"), buffer.shape[2] // COLUMNS
    for piece in range(0, num_pieces, 2):

        @pl.when(piece + warpgroup < num_pieces)
        def _(piece: int = piece) -> None:
            row = plgpu.broadcasted_iota(jnp.int32, (DEPTH, COLUMNS), 0, layout=plgpu.Layout.WGMMA)
            at = pl.ds((piece + warpgroup) * COLUMNS, COLUMNS)
            values = buffer[slot, :, at]
            inside = (row >= low) & (row < high)
            buffer[slot, :, at] = jnp.where(inside, values, jnp.zeros_like(values))


def _out(smem: Any, gmem: Any) -> None:
    plgpu.copy_smem_to_gmem(smem, gmem, commit_group=False)


def _out_rows(smem: Any, out: Any, row: Any, column: Any, first: Any, last: Any) -> None:
    """Rows first to last of a piece that begins at this row and column of the result."""
    columns = pl.ds(column, COLUMNS)
    low = jnp.clip(first - row, 0, ROWS)
    count = jnp.clip(last - row, 0, ROWS) - low

    def some() -> None:
        # The copy engine copies fixed sizes only: the powers of two that make up the count.
        at = low
        for size in (32, 16, 8, 4, 2, 1):

            @pl.when(count & size != 0)
            def _(at: Any = at, size: int = size) -> None:
                _out(smem.at[pl.ds(at, size)], out.at[pl.ds(row + at, size), columns])

            at += count & size

    lax.cond(count == ROWS, lambda: _out(smem, out.at[pl.ds(row, ROWS), columns]), some)
