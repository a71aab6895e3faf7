"""Grouped matmuls: every expert's rows times its own matrix, and the transposed twin.

    gmm:  out[i] = lhs[i] @ rhs[g(i)]            g(i) = the group that row i lies in
    tgmm: out[g] = sum over i in group g of  lhs[i]^T grad[i]

They are each other's gradients: d lhs = gmm(grad, rhs^T), d rhs = tgmm(lhs, grad). Gale et al.
2022, MegaBlocks (arXiv 2211.15841), section 5; `group_offset` is for a shard that holds some of
the experts.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from taskmoe.kernels import row_tiles
from taskmoe.kernels.checks import (
    accumulator,
    check_float,
    check_int,
    check_shape,
    choose_implementation,
    match_varying,
)
from taskmoe.kernels.gmm_kernel import gmm_mosaic
from taskmoe.kernels.tgmm_kernel import tgmm_mosaic
from taskmoe.kernels.tiling import Tiling, check_tiling

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def gmm_reference(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    transpose_rhs: bool,
    out_dtype: Any,
) -> jax.Array:
    """The definition of `gmm`."""
    own = _membership(group_sizes, group_offset, rhs.shape[0], lhs.shape[0])
    rows = jnp.where(own[:, :, None], lhs, 0)  # [E, M, K]
    acc = accumulator(lhs.dtype)
    product = "emk,enk->emn" if transpose_rhs else "emk,ekn->emn"
    out = jnp.einsum(product, rows, rhs, preferred_element_type=acc, precision="highest")
    return jnp.sum(jnp.where(own[:, :, None], out, 0), axis=0).astype(out_dtype)


def tgmm_reference(
    lhs: jax.Array,
    grad: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    num_groups: int,
    out_dtype: Any,
) -> jax.Array:
    """The definition of `tgmm`."""
    own = _membership(group_sizes, group_offset, num_groups, lhs.shape[0])[:, :, None]
    out = jnp.einsum(
        "emk,emn->ekn",
        jnp.where(own, lhs, 0),
        jnp.where(own, grad, 0),
        preferred_element_type=accumulator(lhs.dtype),
        precision="highest",
    )
    return out.astype(out_dtype)


def _membership(
    group_sizes: jax.Array, group_offset: jax.Array, num_groups: int, num_rows: int
) -> jax.Array:
    """[E, M] bool: whether row i belongs to local group e."""
    starts, ends = row_tiles.group_bounds(group_sizes, group_offset, num_groups, num_rows)
    row = jnp.arange(num_rows)
    return (row >= starts[:, None]) & (row < ends[:, None])


def _gmm_xla(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    transpose_rhs: bool,
    out_dtype: Any,
) -> jax.Array:
    num_rows = lhs.shape[0]
    width = rhs.shape[1] if transpose_rhs else rhs.shape[2]
    contract: Any = (((1,), (1 if transpose_rhs else 0,)), ((), ()))
    bounds = row_tiles.group_bounds(group_sizes, group_offset, rhs.shape[0], num_rows)
    tiles = row_tiles.choose_tiles(num_rows, rhs.shape[0], lhs.shape[1], width)

    def per_tile(group: jax.Array, tile: row_tiles.Tile, out: jax.Array) -> tuple[jax.Array, Any]:
        product = jax.lax.dot_general(
            row_tiles.take(lhs, tile),
            row_tiles.pick(rhs, group),
            contract,
            preferred_element_type=accumulator(lhs.dtype),
        )
        return row_tiles.put(out, tile, product), ()

    (out,) = match_varying(jnp.zeros((num_rows, width), out_dtype), lhs)[:1]
    return row_tiles.for_each_tile(bounds, tiles, num_rows, per_tile, lambda _, __, out: out, out)


def _tgmm_xla(
    lhs: jax.Array,
    grad: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    num_groups: int,
    out_dtype: Any,
) -> jax.Array:
    num_rows = lhs.shape[0]
    acc = accumulator(lhs.dtype)
    bounds = row_tiles.group_bounds(group_sizes, group_offset, num_groups, num_rows)
    tiles = row_tiles.choose_tiles(num_rows, num_groups, lhs.shape[1], grad.shape[1])
    zeros = jnp.zeros((num_groups, lhs.shape[1], grad.shape[1]), out_dtype)
    out, _ = match_varying(zeros, lhs)

    def per_tile(_: jax.Array, tile: row_tiles.Tile, out: jax.Array) -> tuple[jax.Array, jax.Array]:
        return out, jax.lax.dot_general(
            row_tiles.take(lhs, tile),
            row_tiles.take(grad, tile),
            (((0,), (0,)), ((), ())),
            preferred_element_type=acc,
        )

    def per_group(group: jax.Array, total: jax.Array, out: jax.Array) -> jax.Array:
        return row_tiles.put_group(out, group, total)

    return row_tiles.for_each_tile(bounds, tiles, num_rows, per_tile, per_group, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _gmm(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    transpose_rhs: bool,
    out_dtype: Any,
    implementation: str,
    tiling: Tiling | None = None,
) -> jax.Array:
    if implementation == "mosaic":
        args = (lhs, rhs, group_sizes, group_offset, transpose_rhs, out_dtype)
        return gmm_mosaic(*args, tiling)
    return _gmm_xla(lhs, rhs, group_sizes, group_offset, transpose_rhs, out_dtype)


def _gmm_forward(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    transpose_rhs: bool,
    out_dtype: Any,
    implementation: str,
    tiling: Tiling | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out = _gmm(
        lhs, rhs, group_sizes, group_offset, transpose_rhs, out_dtype, implementation, tiling
    )
    return out, (lhs, rhs, group_sizes, group_offset)


def _gmm_backward(
    transpose_rhs: bool,
    out_dtype: Any,
    implementation: str,
    tiling: Tiling | None,
    residuals: tuple[jax.Array, ...],
    grad: jax.Array,
) -> tuple[Any, ...]:
    lhs, rhs, sizes, offset = residuals
    grad = grad.astype(lhs.dtype)
    d_lhs = _gmm(grad, rhs, sizes, offset, not transpose_rhs, lhs.dtype, implementation)
    left, right = (grad, lhs) if transpose_rhs else (lhs, grad)
    d_rhs = _tgmm(left, right, sizes, offset, rhs.shape[0], rhs.dtype, implementation)
    return d_lhs, d_rhs, None, None


_gmm.defvjp(_gmm_forward, _gmm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _tgmm(
    lhs: jax.Array,
    grad: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    num_groups: int,
    out_dtype: Any,
    implementation: str,
    tiling: Tiling | None = None,
) -> jax.Array:
    if implementation == "mosaic":
        args = (lhs, grad, group_sizes, group_offset, num_groups, out_dtype)
        return tgmm_mosaic(*args, tiling)
    return _tgmm_xla(lhs, grad, group_sizes, group_offset, num_groups, out_dtype)


def _tgmm_forward(
    lhs: jax.Array,
    grad: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    num_groups: int,
    out_dtype: Any,
    implementation: str,
    tiling: Tiling | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out = _tgmm(lhs, grad, group_sizes, group_offset, num_groups, out_dtype, implementation, tiling)
    return out, (lhs, grad, group_sizes, group_offset)


def _tgmm_backward(
    num_groups: int,
    out_dtype: Any,
    implementation: str,
    tiling: Tiling | None,
    residuals: tuple[jax.Array, ...],
    d_out: jax.Array,
) -> tuple[Any, ...]:
    lhs, grad, sizes, offset = residuals
    d_out = d_out.astype(lhs.dtype)
    d_lhs = _gmm(grad, d_out, sizes, offset, True, lhs.dtype, implementation)
    d_grad = _gmm(lhs, d_out, sizes, offset, False, grad.dtype, implementation)
    return d_lhs, d_grad, None, None


_tgmm.defvjp(_tgmm_forward, _tgmm_backward)


def gmm(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "E K N"] | Float[Array, "E N K"],
    group_sizes: Int[Array, " G"],
    *,
    transpose_rhs: bool = False,
    group_offset: int | Int[Array, ""] | None = None,
    preferred_element_type: Any = None,
    tiling: Tiling | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """Multiply each group of rows with its own matrix.

        out[i] = lhs[i] @ rhs[g(i) - group_offset],  rows of group g follow those of group g-1

    lhs: [M, K] bf16|f32, rows sorted by group.
    rhs: [E, K, N], same dtype; [E, N, K] with transpose_rhs, without a transposed copy.
    group_sizes: [G] i32, rows of each group; negative counts as 0, rows past M are cut off.
    group_offset: scalar i32, the group that rhs[0] belongs to, for a shard that holds E of the G
      groups; None means 0 and wants E == G.
    preferred_element_type: dtype of the result, lhs's if None. Sums are f32 always.
    tiling: a `Tiling` that overrides the kernel's choice of block sizes ("mosaic" only).
    implementation: "mosaic" (Pallas TPU), "xla", "reference" or None (by platform).

    Returns [M, N]; rows past sum(group_sizes) and of groups that rhs does not hold are zero,
    whatever lhs holds there. Gradients of empty groups are zero. Raises ValueError or TypeError
    where an argument does not fit.

    Gale et al. 2022, MegaBlocks (arXiv 2211.15841), section 5.
    """
    check_shape("lhs", lhs, ("M", "K"))
    check_float("lhs", lhs)
    depth = lhs.shape[1]
    check_shape("rhs", rhs, ("E", "N", depth) if transpose_rhs else ("E", depth, "N"))
    check_float("rhs", rhs, ("lhs", lhs))
    offset = check_groups(group_sizes, group_offset, rhs.shape[0], "rhs.shape[0]")
    width = rhs.shape[1 if transpose_rhs else 2]
    check_tiling(tiling, depth, width, lhs.dtype.itemsize)
    chosen = choose_implementation("gmm", implementation)
    out_dtype = _out_dtype(preferred_element_type, lhs)
    lhs, rhs, group_sizes, offset = match_varying(lhs, rhs, group_sizes, offset)
    if chosen == "reference":
        return gmm_reference(lhs, rhs, group_sizes, offset, transpose_rhs, out_dtype)
    return _gmm(lhs, rhs, group_sizes, offset, transpose_rhs, out_dtype, chosen, tiling)


def tgmm(
    lhs: Float[Array, "M K"],
    grad: Float[Array, "M N"],
    group_sizes: Int[Array, " G"],
    *,
    num_groups: int | None = None,
    group_offset: int | Int[Array, ""] | None = None,
    preferred_element_type: Any = None,
    tiling: Tiling | None = None,
    implementation: str | None = None,
) -> Float[Array, "E K N"]:
    """Sum the outer products of each group's rows: the gradient of `gmm` for its matrices.

        out[e] = sum over rows i of group e + group_offset of  lhs[i]^T grad[i]

    lhs: [M, K] bf16|f32, rows sorted by group.
    grad: [M, N], same dtype.
    group_sizes: [G] i32, rows of each group; negative counts as 0, rows past M are cut off.
    num_groups: E, groups in the result; None means all G.
    group_offset: scalar i32, the group that out[0] belongs to; None means 0.
    preferred_element_type: dtype of the result, lhs's if None. Sums are f32 always.
    tiling: a `Tiling` that overrides the kernel's choice of block sizes ("mosaic" only).
    implementation: "mosaic" (Pallas TPU), "xla", "reference" or None (by platform).

    Returns [E, K, N]; zero for empty groups. Rows of no group reach no output, whatever they hold.
    Raises ValueError or TypeError where an argument does not fit.
    """
    check_shape("lhs", lhs, ("M", "K"))
    check_float("lhs", lhs)
    check_shape("grad", grad, (lhs.shape[0], "N"))
    check_float("grad", grad, ("lhs", lhs))
    if num_groups is None:
        num_groups = jnp.shape(group_sizes)[0]
    if not isinstance(num_groups, int) or num_groups < 1:
        raise ValueError(f"num_groups must be an int of at least 1, got {num_groups!r}")
    offset = check_groups(group_sizes, group_offset, num_groups, "num_groups")
    check_tiling(tiling, lhs.shape[1], grad.shape[1], lhs.dtype.itemsize)
    chosen = choose_implementation("tgmm", implementation)
    out_dtype = _out_dtype(preferred_element_type, lhs)
    lhs, grad, group_sizes, offset = match_varying(lhs, grad, group_sizes, offset)
    if chosen == "reference":
        return tgmm_reference(lhs, grad, group_sizes, offset, num_groups, out_dtype)
    return _tgmm(lhs, grad, group_sizes, offset, num_groups, out_dtype, chosen, tiling)


def check_groups(group_sizes: Any, group_offset: Any, num_groups: int, source: str) -> jax.Array:
    """The group offset as an array, if it and the group sizes fit num_groups = `source`."""
    check_shape("group_sizes", group_sizes, ("G",))
    check_int("group_sizes", group_sizes)
    total = group_sizes.shape[0]
    if group_offset is None:
        if num_groups != total:
            raise ValueError(
                f"group_sizes must have {source}={num_groups} entries, got {total}; "
                "with group_offset it may have more"
            )
        group_offset = 0
    check_shape("group_offset", group_offset, ())
    check_int("group_offset", group_offset)
    return jnp.asarray(group_offset, jnp.int32)


def _out_dtype(preferred: Any, lhs: jax.Array) -> Any:
    if preferred is None:
        return lhs.dtype
    dtype = jnp.dtype(preferred)
    if dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise TypeError(f"preferred_element_type must be bfloat16 or float32, got {dtype}")
    return dtype
