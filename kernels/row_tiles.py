"""Grouped work in tiles of rows, for CPU: each expert's rows, tile by tile, with its own matrices.

Rows are sorted by group, so a tile is a slice and its result is written back in place; there is no
gather, no padding and no work for groups without rows. Tiles start where their group starts, so
that a tile never needs two experts; rows of other groups that a tile overhangs into are masked.

Tile size: see `tile_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Tile(NamedTuple):
    """One tile of a group's rows.

    start: [] i32, first row of the slice
    mask: [rows, 1] bool, rows of the slice that are the tile's own
    """

    start: jax.Array
    mask: jax.Array


def group_bounds(
    group_sizes: jax.Array, group_offset: jax.Array, num_groups: int, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    """First and one past the last row, [num_groups] i32 each, of the local groups; both ascend.

    Negative sizes count as 0, rows past num_rows are cut off, and groups that group_sizes does not
    have are empty.
    """
    sizes = jnp.maximum(group_sizes.astype(jnp.int32), 0)
    ends = jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), num_rows)
    bounds = jnp.concatenate([jnp.zeros_like(ends[:1]), ends])
    index = group_offset + jnp.arange(num_groups, dtype=jnp.int32)
    last = sizes.shape[0]
    return bounds[jnp.clip(index, 0, last)], bounds[jnp.clip(index + 1, 0, last)]


def tile_rows(num_rows: int, num_groups: int, depth: int, width: int) -> int:
    """Rows a tile for products with matrices of [depth, width].

    The mean group, as a power of two between 8 and 128: a tile's masked rows are wasted work, and
    each tile reads its matrices once. A product of fewer than SPLIT_WORK multiplications
    stays on one core, so where groups are large enough, tiles of small matrices grow up to that.
    """
    mean = num_rows // num_groups
    rows = 8
    while rows * 2 <= min(mean, 128):
        rows *= 2
    shared = -(-SPLIT_WORK // (depth * width) // 32) * 32
    if rows < shared <= mean:
        rows = shared
    return min(rows, num_rows)


#: Multiplications from which XLA was seen to spread one product over two cores.
SPLIT_WORK = 3 << 22


def for_each_group(
    bounds: tuple[jax.Array, jax.Array], body: Callable[[jax.Array, Any], Any], init: Any
) -> Any:
    """Run `state = body(group, state)` over all groups that have rows, in order."""
    held = bounds[1] > bounds[0]
    order = jnp.argsort(~held, stable=True).astype(jnp.int32)
    return jax.lax.fori_loop(
        0, jnp.sum(held, dtype=jnp.int32), lambda i, state: body(order[i], state), init
    )


def for_each_tile(
    bounds: tuple[jax.Array, jax.Array],
    group: jax.Array,
    num_rows: int,
    rows: int,
    body: Callable[[Tile, Any], Any],
    init: Any,
) -> Any:
    """Run `state = body(tile, state)` over all tiles of one group, in order of rows."""
    first, end = bounds[0][group], bounds[1][group]

    def step(i: jax.Array, state: Any) -> Any:
        begin = first + i * rows
        start = jnp.minimum(begin, num_rows - rows)
        row = start + jnp.arange(rows, dtype=jnp.int32)[:, None]
        return body(Tile(start, (row >= begin) & (row < end)), state)

    return jax.lax.fori_loop(0, (end - first + rows - 1) // rows, step, init)


def take(x: jax.Array, tile: Tile) -> jax.Array:
    """The tile's rows of x [M, D]; rows that are not its own are zero."""
    rows = jax.lax.dynamic_slice_in_dim(x, tile.start, tile.mask.shape[0])
    return jnp.where(tile.mask, rows, 0)


def put(x: jax.Array, tile: Tile, values: jax.Array) -> jax.Array:
    """x with the tile's own rows replaced by values."""
    old = jax.lax.dynamic_slice_in_dim(x, tile.start, tile.mask.shape[0])
    values = jnp.where(tile.mask, values.astype(x.dtype), old)
    return jax.lax.dynamic_update_slice_in_dim(x, values, tile.start, 0)


def pick(x: jax.Array, group: jax.Array) -> jax.Array:
    """The group's matrix of x [E, K, N]."""
    return jax.lax.dynamic_index_in_dim(x, group, keepdims=False)


def put_group(x: jax.Array, group: jax.Array, values: jax.Array) -> jax.Array:
    """x [E, K, N] with the group's matrix replaced by values."""
    return jax.lax.dynamic_update_index_in_dim(x, values.astype(x.dtype), group, 0)
