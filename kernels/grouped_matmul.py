"""Grouped matmuls: every expert's rows times its own matrix, and the transposed twin.

    gmm:  out[i] = lhs[i] @ rhs[g(i)]            g(i) = the group that row i lies in
    tgmm: out[g] = sum over i in group g of  lhs[i]^T grad[i]

They are each other's gradients: d lhs = gmm(grad, rhs^T), d rhs = tgmm(lhs, grad). Gale et al.
2022, MegaBlocks (arXiv 2211.15841), section 5; `group_offset` is for a shard that holds some of
the experts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from taskmoe.kernels import ragged_products
from taskmoe.kernels.checks import (
    accumulator,
    as_dtype,
    as_floats,
    as_integers,
    as_size,
    check_shape,
    match_varying,
    zeros_like_all,
)
from taskmoe.kernels.gmm_kernel import gmm_mosaic
from taskmoe.kernels.groups import Groups, check_groups, group_bounds
from taskmoe.kernels.options import ProductOptions
from taskmoe.kernels.platforms import Op, check_implementation, with_plain_settings
from taskmoe.kernels.quantized import (
    Quantized,
    as_weights,
    both_dense,
    quantises_rows,
    rows_to_meet,
)
from taskmoe.kernels.tgmm_kernel import tgmm_mosaic
from taskmoe.kernels.tiled_products import gmm_xla, tgmm_xla
from taskmoe.kernels.tiling import Tiling, check_tiling


@with_plain_settings
def gmm_reference(options: ProductOptions, lhs: Any, rhs: Any, groups: Groups) -> jax.Array:
    """The definition of `gmm`."""
    lhs, rhs = both_dense(lhs, rhs)
    own = _membership(groups, options.num_groups, lhs.shape[0])
    rows = jnp.where(own[:, :, None], lhs, 0)  # [E, M, K]
    acc = accumulator(lhs.dtype)
    product = "emk,enk->emn" if options.transpose_rhs else "emk,ekn->emn"
    out = jnp.einsum(product, rows, rhs, preferred_element_type=acc, precision="highest")
    return jnp.sum(jnp.where(own[:, :, None], out, 0), axis=0).astype(options.out_dtype)


@with_plain_settings
def tgmm_reference(
    options: ProductOptions, lhs: jax.Array, grad: jax.Array, groups: Groups
) -> jax.Array:
    """The definition of `tgmm`."""
    own = _membership(groups, options.num_groups, lhs.shape[0])[:, :, None]
    out = jnp.einsum(
        "emk,emn->ekn",
        jnp.where(own, lhs, 0),
        jnp.where(own, grad, 0),
        preferred_element_type=accumulator(lhs.dtype),
        precision="highest",
    )
    return out.astype(options.out_dtype)


def _membership(groups: Groups, num_groups: int, num_rows: Any) -> jax.Array:
    """[E, M] bool: whether row i belongs to local group e."""
    starts, ends = group_bounds(groups, num_groups, num_rows)
    row = jnp.arange(num_rows)
    return (row >= starts[:, None]) & (row < ends[:, None])


GMM = Op(
    "gmm",
    reference=gmm_reference,
    xla=gmm_xla,
    mosaic=gmm_mosaic,
    ragged_dot=ragged_products.gmm,
    mosaic_gpu=ragged_products.gmm,
    tokamax=ragged_products.gmm,
)
TGMM = Op(
    "tgmm",
    xla=tgmm_xla,
    mosaic=tgmm_mosaic,
    ragged_dot=ragged_products.tgmm,
    mosaic_gpu=ragged_products.tgmm,
    tokamax=ragged_products.tgmm,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_product(lhs: jax.Array, rhs: Any, groups: Groups, options: ProductOptions) -> jax.Array:
    """`gmm` of what was validated."""
    width = rhs.shape[1 if options.transpose_rhs else 2]
    result = jax.ShapeDtypeStruct((lhs.shape[0], width), options.out_dtype)
    rows = lhs if options.transpose_rhs else rows_to_meet(rhs, lhs)
    return GMM(options, options.implementation, result, rows, rhs, groups)


def _gmm_forward(
    lhs: jax.Array, rhs: Any, groups: Groups, options: ProductOptions
) -> tuple[jax.Array, tuple[Any, ...]]:
    return grouped_product(lhs, rhs, groups, options), (lhs, rhs, groups)


def _gmm_backward(
    options: ProductOptions, residuals: tuple[Any, ...], grad: jax.Array
) -> tuple[Any, ...]:
    lhs, rhs, groups = residuals
    grad = grad.astype(lhs.dtype)
    plain = dataclasses.replace(options, out_dtype=lhs.dtype, tiling=None)
    back = dataclasses.replace(plain, transpose_rhs=not options.transpose_rhs)
    d_lhs = grouped_product(grad, rhs, groups, back)
    if isinstance(rhs, Quantized):
        return d_lhs, None, None
    left, right = (grad, lhs) if options.transpose_rhs else (lhs, grad)
    return d_lhs, _tgmm(left, right, groups, plain), None


grouped_product.defvjp(_gmm_forward, _gmm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tgmm(lhs: jax.Array, grad: jax.Array, groups: Groups, options: ProductOptions) -> jax.Array:
    shape = (options.num_groups, lhs.shape[1], grad.shape[1])
    result = jax.ShapeDtypeStruct(shape, options.out_dtype)
    return TGMM(options, options.implementation, result, lhs, grad, groups)


def _tgmm_forward(
    lhs: jax.Array, grad: jax.Array, groups: Groups, options: ProductOptions
) -> tuple[jax.Array, tuple[Any, ...]]:
    return _tgmm(lhs, grad, groups, options), (lhs, grad, groups)


def _tgmm_backward(
    options: ProductOptions, residuals: tuple[Any, ...], d_out: jax.Array
) -> tuple[Any, ...]:
    lhs, grad, groups = residuals
    d_out = d_out.astype(lhs.dtype)
    plain = dataclasses.replace(options, out_dtype=lhs.dtype, tiling=None, transpose_rhs=False)
    back = dataclasses.replace(plain, transpose_rhs=True)
    d_lhs = grouped_product(grad, d_out, groups, back)
    return d_lhs, grouped_product(lhs, d_out, groups, plain), None


_tgmm.defvjp(_tgmm_forward, _tgmm_backward)


def gmm(
    lhs: jax.Array,
    rhs: jax.Array | Quantized,
    group_sizes: jax.Array,
    *,
    transpose_rhs: bool = False,
    group_offset: int | jax.Array | None = None,
    preferred_element_type: Any = None,
    tiling: Tiling | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply each group of rows with its own matrix.

        out[i] = lhs[i] @ rhs[g(i) - group_offset],  rows of group g follow those of group g-1

    lhs: [M, K] bf16|f32, rows sorted by group.
    rhs: [E, K, N], same dtype; [E, N, K] with transpose_rhs, without a transposed copy. Or a
      `Quantized` of that shape, which gets no gradient: lhs gets its own as from what rhs stands
      for. One that quantises rows too is not transposed.
    group_sizes: [G] i32, rows of each group; negative counts as 0, rows past M are cut off.
    group_offset: scalar i32, the group that rhs[0] belongs to, for a shard that holds E of the G
      groups; None means 0 and wants E == G.
    preferred_element_type: dtype of the result, lhs's if None. Sums are f32 always.
    tiling: a `Tiling` that overrides the kernel's choice of block sizes ("mosaic" only).
    implementation: "mosaic" (Pallas TPU), "mosaic_gpu", "ragged_dot", "tokamax", "xla", "reference"
      or None (by the platform that is lowered for, see `taskmoe.kernels.platforms`).

    Returns [M, N]; rows past sum(group_sizes) and of groups that rhs does not hold are zero,
    whatever lhs holds there. Gradients of empty groups are zero. Raises ValueError or TypeError
    where an argument does not fit.

    Gale et al. 2022, MegaBlocks (arXiv 2211.15841), section 5.
    """
    lhs = as_floats("lhs", lhs)
    check_shape("lhs", lhs, ("M", "K"))
    depth = lhs.shape[1]
    rhs = as_weights("rhs", rhs, ("lhs", lhs))
    check_shape("rhs", rhs, ("E", "N", depth) if transpose_rhs else ("E", depth, "N"))
    groups = check_groups(group_sizes, group_offset, rhs.shape[0], "rhs.shape[0]")
    width = rhs.shape[1 if transpose_rhs else 2]
    if transpose_rhs and quantises_rows(rhs):
        raise ValueError(
            "rhs.activations must be None with transpose_rhs, got 'int8': scales that lie along "
            "depth multiply the rows"
        )
    check_tiling(tiling, depth, width, 1 if quantises_rows(rhs) else lhs.dtype.itemsize)
    check_implementation(implementation)
    options = ProductOptions(
        out_dtype=_out_dtype(preferred_element_type, lhs),
        num_groups=rhs.shape[0],
        shifted=group_offset is not None,
        implementation=implementation,
        transpose_rhs=bool(transpose_rhs),
        tiling=tiling,
    )
    arrays, tree = jax.tree.flatten((lhs, rhs, groups))
    leaves = match_varying(*arrays)
    if 0 in (*lhs.shape, *rhs.shape):
        return zeros_like_all((lhs.shape[0], width), options.out_dtype, *leaves)
    lhs, rhs, groups = jax.tree.unflatten(tree, leaves)
    if implementation == "reference" and not isinstance(rhs, Quantized):
        return gmm_reference(options, lhs, rhs, groups)
    return grouped_product(lhs, rhs, groups, options)


def tgmm(
    lhs: jax.Array,
    grad: jax.Array,
    group_sizes: jax.Array,
    *,
    num_groups: int | None = None,
    group_offset: int | jax.Array | None = None,
    preferred_element_type: Any = None,
    tiling: Tiling | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Sum the outer products of each group's rows: the gradient of `gmm` for its matrices.

        out[e] = sum over rows i of group e + group_offset of  lhs[i]^T grad[i]

    lhs: [M, K] bf16|f32, rows sorted by group.
    grad: [M, N], same dtype.
    group_sizes: [G] i32, rows of each group; negative counts as 0, rows past M are cut off.
    num_groups: E, groups in the result; None means all G.
    group_offset: scalar i32, the group that out[0] belongs to; None means 0 and wants E == G.
    preferred_element_type: dtype of the result, lhs's if None. Sums are f32 always.
    tiling: a `Tiling` that overrides the kernel's choice of block sizes ("mosaic" only).
    implementation: as in `gmm`.

    Returns [E, K, N]; zero for empty groups. Rows of no group reach no output, whatever they hold.
    Raises ValueError or TypeError where an argument does not fit.
    """
    lhs = as_floats("lhs", lhs)
    check_shape("lhs", lhs, ("M", "K"))
    grad = as_floats("grad", grad, ("lhs", lhs))
    check_shape("grad", grad, (lhs.shape[0], "N"))
    if num_groups is None:
        group_sizes = as_integers("group_sizes", group_sizes)
        check_shape("group_sizes", group_sizes, ("G",))
        num_groups = group_sizes.shape[0]
    else:
        num_groups = as_size("num_groups", num_groups)
    groups = check_groups(group_sizes, group_offset, num_groups, "num_groups")
    check_tiling(tiling, lhs.shape[1], grad.shape[1], lhs.dtype.itemsize)
    check_implementation(implementation)
    options = ProductOptions(
        out_dtype=_out_dtype(preferred_element_type, lhs),
        num_groups=num_groups,
        shifted=group_offset is not None,
        implementation=implementation,
        tiling=tiling,
    )
    lhs, grad, *pair = match_varying(lhs, grad, *groups)
    shape = (num_groups, lhs.shape[1], grad.shape[1])
    if 0 in (*shape, lhs.shape[0]):
        return zeros_like_all(shape, options.out_dtype, lhs, grad)
    if implementation == "reference":
        return tgmm_reference(options, lhs, grad, Groups(*pair))
    return _tgmm(lhs, grad, Groups(*pair), options)


def _out_dtype(preferred: Any, lhs: jax.Array) -> Any:
    if preferred is None:
        return lhs.dtype
    known = jnp.bfloat16, jnp.float32, jnp.float64
    return as_dtype("preferred_element_type", preferred, *known)
