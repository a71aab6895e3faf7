"""gmm and tgmm in tiles of rows by ordinary matmuls: the twins for CPU, see `row_tiles`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from taskmoe.kernels import row_tiles
from taskmoe.kernels.checks import accumulator
from taskmoe.kernels.groups import Groups, group_bounds
from taskmoe.kernels.options import ProductOptions
from taskmoe.kernels.quantized import both_dense, dense
from taskmoe.kernels.row_tiles import Tile, Tiles, choose_tiles


def gmm_xla(options: ProductOptions, lhs: Any, rhs: Any, groups: Groups) -> jax.Array:
    """`gmm`: [M, N]. A `Quantized` matrix is converted where a tile of rows meets it."""
    lhs, _ = both_dense(lhs, None)
    num_rows, depth = lhs.shape
    width = rhs.shape[1 if options.transpose_rhs else 2]
    contract: Any = (((1,), (1 if options.transpose_rhs else 0,)), ((), ()))
    bounds = group_bounds(groups, options.num_groups, num_rows)
    tiles = choose_tiles(num_rows, options.num_groups, depth, width)
    lhs = row_tiles.padded(lhs)

    def per_tile(group: jax.Array, tile: Tile, out: jax.Array) -> tuple[jax.Array, Any]:
        product = jax.lax.dot_general(
            row_tiles.take(lhs, tile),
            dense(row_tiles.pick(rhs, group), lhs.dtype),
            contract,
            preferred_element_type=accumulator(lhs.dtype),
        )
        return row_tiles.put(out, tile, product), ()

    out = jnp.zeros((lhs.shape[0], width), options.out_dtype)
    out = row_tiles.for_each_tile(
        bounds, tiles, lhs.shape[0], per_tile, lambda _, __, out: out, out
    )
    return out[:num_rows]


def tgmm_xla(options: ProductOptions, lhs: jax.Array, grad: jax.Array, groups: Groups) -> jax.Array:
    """`tgmm`: [E, K, N]."""
    tiles = choose_tiles(lhs.shape[0], options.num_groups, lhs.shape[1], grad.shape[1])
    return tgmm_in_tiles(options, lhs, grad, groups, tiles)


def tgmm_in_tiles(
    options: ProductOptions, lhs: jax.Array, grad: jax.Array, groups: Groups, tiles: Tiles
) -> jax.Array:
    """`tgmm` with tiles of the caller's choice."""
    bounds = group_bounds(groups, options.num_groups, lhs.shape[0])
    out = jnp.zeros((options.num_groups, lhs.shape[1], grad.shape[1]), options.out_dtype)
    lhs, grad = row_tiles.padded(lhs), row_tiles.padded(grad)

    def per_tile(_: jax.Array, tile: Tile, out: jax.Array) -> tuple[jax.Array, jax.Array]:
        return out, jax.lax.dot_general(
            row_tiles.take(lhs, tile),
            row_tiles.take(grad, tile),
            (((0,), (0,)), ((), ())),
            preferred_element_type=accumulator(lhs.dtype),
        )

    def per_group(group: jax.Array, total: jax.Array, out: jax.Array) -> jax.Array:
        return row_tiles.put_group(out, group, total)

    return row_tiles.for_each_tile(bounds, tiles, lhs.shape[0], per_tile, per_group, out)
