"""Grouped work in tiles of rows, for CPU: each expert's rows, tile by tile, with its own matrices.

Rows are sorted by group, so a tile is a slice and its result is written back in place; there is no
gather, no padding and no work for groups without rows. Tiles start where their group starts, so
that a tile never needs two experts; rows of other groups that a tile overhangs into are masked.

Groups that fit a tile go as one, those near the mean size as one that just holds them; only larger
groups are cut: see `Tiles`.
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


class Tiles(NamedTuple):
    """How many rows a tile has, by size of its group; all static.

    rows: of a group's tiles; a smaller group is one tile, a larger one takes as many as it needs.
    whole: rising sizes above `rows`; a group of more than `rows` rows that fits one is one tile.

    A product of all of a group's rows with its matrix packs the matrix once, and with a choice of
    sizes near the mean few rows are masked, which are wasted work: routers that balance their load
    give most experts such a group.
    """

    rows: int
    whole: tuple[int, ...] = ()


def choose_tiles(num_rows: Any, num_groups: int, depth: int, width: int) -> Tiles:
    """Tiles for products with matrices of [depth, width].

    num_rows may be symbolic: then tiles are small, and rows must be `padded`.

    The mean group, as a power of two between 8 and 128. Groups up to the mean, and up to an eighth
    above it, both rounded up to 32 rows, go whole, where the mean is neither tiny nor above
    LARGEST_WHOLE. A product of fewer than SPLIT_WORK multiplications stays on one core, so where
    groups are large enough, tiles of small matrices grow up to that.
    """
    if not isinstance(num_rows, int):
        return Tiles(SYMBOLIC_ROWS)
    mean = num_rows // num_groups
    rows = 8
    while rows * 2 <= min(mean, 128):
        rows *= 2
    shared = -(-SPLIT_WORK // (depth * width) // 32) * 32
    if rows < shared <= mean:
        rows = shared
    whole: tuple[int, ...] = ()
    if 16 <= mean <= LARGEST_WHOLE:
        whole = tuple(-(-n // 32) * 32 for n in (mean, mean + mean // 8))
    return Tiles(min(rows, num_rows), tuple(n for n in sorted(set(whole)) if rows < n <= num_rows))


#: Rows of a tile where the number of rows is not known when the op is traced.
SYMBOLIC_ROWS = 32
#: Multiplications from which XLA was seen to spread one product over two cores.
SPLIT_WORK = 3 << 22
#: Mean group up to which whole tiles were tried; larger groups spread what one tile would save.
LARGEST_WHOLE = 512


def for_each_tile(
    bounds: tuple[jax.Array, jax.Array],
    tiles: Tiles,
    num_rows: Any,
    body: Callable[[jax.Array, Tile, Any], tuple[Any, Any]],
    done: Callable[[jax.Array, Any, Any], Any],
    init: Any,
) -> Any:
    """Run over all tiles of all groups that have rows.

        for each group:
            for each of its tiles, in order of rows:  state, value = body(group, tile, state)
            state = done(group, sum of the values, state)

    value: a tree of arrays, () where a group has nothing to sum. The groups' order is not promised.
    """
    first, end = bounds
    sizes = end - first
    whole = (tiles.rows, *tiles.whole)

    def tile_at(group: jax.Array, i: jax.Array | int, rows: int) -> Tile:
        begin = first[group] + i * rows
        start = jnp.minimum(begin, num_rows - rows)
        row = start + jnp.arange(rows, dtype=jnp.int32)[:, None]
        return Tile(start, (row >= begin) & (row < end[group]))

    def in_one(rows: int) -> Callable[[jax.Array, Any], Any]:
        def per_group(group: jax.Array, state: Any) -> Any:
            state, value = body(group, tile_at(group, 0, rows), state)
            return done(group, value, state)

        return per_group

    def in_several(group: jax.Array, state: Any) -> Any:
        def step(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            state, value = body(group, tile_at(group, i, tiles.rows), carry[0])
            return state, jax.tree.map(jnp.add, carry[1], value)

        # A sum that starts with the first tile's values, taken before the loop, needs no zeros, but
        # XLA then copies the group's matrices twice, for that tile and for the loop.
        value = jax.eval_shape(lambda: body(group, tile_at(group, 0, tiles.rows), state)[1])
        zeros = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), value)
        count = (sizes[group] + tiles.rows - 1) // tiles.rows
        state, value = jax.lax.fori_loop(0, count, step, (state, zeros))
        return done(group, value, state)

    state = _over(sizes > whole[-1], in_several, init)
    for least, rows in zip((0, *whole), whole, strict=False):
        state = _over((sizes > least) & (sizes <= rows), in_one(rows), state)
    return state


def _over(chosen: jax.Array, body: Callable[[jax.Array, Any], Any], state: Any) -> Any:
    """Run `state = body(group, state)` over the chosen groups, [E] bool."""
    order = jnp.argsort(~chosen, stable=True).astype(jnp.int32)
    count = jnp.sum(chosen, dtype=jnp.int32)
    return jax.lax.fori_loop(0, count, lambda i, state: body(order[i], state), state)


def padded(x: jax.Array) -> jax.Array:
    """X with rows enough for one tile where its number of rows [M, D] is symbolic."""
    return x if isinstance(x.shape[0], int) else jnp.pad(x, ((0, SYMBOLIC_ROWS), (0, 0)))


def take(x: jax.Array, tile: Tile) -> jax.Array:
    """The tile's rows of x [M, D]; rows that are not its own are zero."""
    rows = jax.lax.dynamic_slice_in_dim(x, tile.start, tile.mask.shape[0])
    return jnp.where(tile.mask, rows, 0)


def put(x: jax.Array, tile: Tile, values: jax.Array) -> jax.Array:
    """x with the tile's own rows replaced by values."""
    old = jax.lax.dynamic_slice_in_dim(x, tile.start, tile.mask.shape[0])
    values = jnp.where(tile.mask, values.astype(x.dtype), old)
    return jax.lax.dynamic_update_slice_in_dim(x, values, tile.start, 0)


def pick(x: Any, group: jax.Array) -> Any:
    """The group's matrix of x [E, K, N], an array or a `Quantized`."""
    return jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, group, keepdims=False), x)


def put_group(x: jax.Array, group: jax.Array, values: jax.Array) -> jax.Array:
    """x [E, K, N] with the group's matrix replaced by values."""
    return jax.lax.dynamic_update_index_in_dim(x, values.astype(x.dtype), group, 0)
