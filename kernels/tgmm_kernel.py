"""tgmm as a Pallas TPU kernel:  out[e] = sum over rows i of group e of lhs[i]^T grad[i].

Grid: (blocks of width, blocks of depth, visits), see `group_visits`. All visits of a group are
consecutive and sum up in f32 in VMEM; the last one writes the group's block. Groups without rows
are visited once, to write zeros. A visit that owns a part of its block works in sub-blocks, skips
those that it has no row in and zeroes rows that are not its own on both sides: they may hold NaN.

VMEM: two buffers each of lhs [m, k], grad [m, n] and out [k, n], the sum and the product in f32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import tiling as tilings
from taskmoe.kernels.checks import result_like
from taskmoe.kernels.gmm_kernel import SUB_ROWS
from taskmoe.kernels.group_visits import visit_groups
from taskmoe.kernels.groups import Groups, group_bounds
from taskmoe.kernels.options import ProductOptions
from taskmoe.kernels.platforms import chip


def cost(m: int, k: int, n: int, e: int, itemsize: int, out_itemsize: int) -> pl.CostEstimate:
    """FLOPs and least bytes of tgmm when all rows belong to groups."""
    moved = m * (k + n) * itemsize + e * k * n * out_itemsize
    return pl.CostEstimate(flops=2 * m * k * n, bytes_accessed=moved, transcendentals=0)


def lhs_block(width: Any, depth: Any, visit: Any, *walk: Any) -> tuple[Any, ...]:
    """Rows of the visit's block, at this depth."""
    return walk[3][visit], depth


def grad_block(width: Any, depth: Any, visit: Any, *walk: Any) -> tuple[Any, ...]:
    """Rows of the visit's block, at this width."""
    return walk[3][visit], width


def out_block(width: Any, depth: Any, visit: Any, *walk: Any) -> tuple[Any, ...]:
    """The matrix of the visit's group."""
    return walk[2][visit], depth, width


def kernel(
    starts_ref: Any,
    ends_ref: Any,
    group_ref: Any,
    block_ref: Any,
    num_ref: Any,
    lhs_ref: Any,
    grad_ref: Any,
    out_ref: Any,
    acc_ref: Any,
) -> None:
    """One visit."""
    visit = pl.program_id(2)
    rows = lhs_ref.shape[0]
    block, group = block_ref[visit], group_ref[visit]
    low = jnp.maximum(starts_ref[group] - block * rows, 0)
    high = jnp.minimum(ends_ref[group] - block * rows, rows)
    last_visit = num_ref[0] - 1
    arrives = (visit == 0) | (group_ref[jnp.maximum(visit - 1, 0)] != group)
    leaves = (visit == last_visit) | (group_ref[jnp.minimum(visit + 1, last_visit)] != group)
    owns_all = (low == 0) & (high == rows)

    def own(ref: Any, start: Any, size: int) -> jax.Array:
        x = ref[pl.ds(start, size), :]
        row = start + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
        mine = (row >= low) & (row < high)
        return jnp.where(mine, x.astype(jnp.float32), 0).astype(x.dtype)

    def product(lhs: jax.Array, grad: jax.Array) -> jax.Array:
        dims: Any = (((0,), (0,)), ((), ()))
        return jax.lax.dot_general(lhs, grad, dims, preferred_element_type=jnp.float32)

    @pl.when(arrives)
    def _init() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(owns_all)
    def _whole() -> None:
        acc_ref[...] += product(lhs_ref[...], grad_ref[...])

    @pl.when(~owns_all & (high > low))
    def _parts() -> None:
        sub = SUB_ROWS if rows % SUB_ROWS == 0 else rows

        def one(i: jax.Array, carry: None) -> None:
            start = pl.multiple_of(i * sub, sub)
            acc_ref[...] += product(own(lhs_ref, start, sub), own(grad_ref, start, sub))

        jax.lax.fori_loop(low // sub, pl.cdiv(high, sub), one, None)

    @pl.when(leaves)
    def _store() -> None:
        out_ref[...] = acc_ref[...].astype(out_ref.dtype)


def tgmm_mosaic(
    options: ProductOptions, lhs: jax.Array, grad: jax.Array, groups: Groups
) -> jax.Array:
    """The kernel call; arguments as in `tgmm`, validated."""
    (m, k), n, e = lhs.shape, grad.shape[1], options.num_groups
    itemsize, out_itemsize = lhs.dtype.itemsize, jnp.dtype(options.out_dtype).itemsize
    t = options.tiling or tilings.tgmm_tiling(m, k, n, e, itemsize, out_itemsize, chip())
    walk = visit_groups(group_bounds(groups, e, m), m, t.m)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(pl.cdiv(n, t.n), pl.cdiv(k, t.k), walk.num),
        in_specs=[pl.BlockSpec((t.m, t.k), lhs_block), pl.BlockSpec((t.m, t.n), grad_block)],
        out_specs=pl.BlockSpec((None, t.k, t.n), out_block),
        scratch_shapes=[pltpu.VMEM((t.k, t.n), jnp.float32)],
    )
    vmem = tilings.tgmm_vmem_bytes(t, itemsize, out_itemsize)
    call = pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=result_like(lhs, (e, k, n), options.out_dtype),
        compiler_params=tilings.compiler_params(("parallel", "arbitrary", "arbitrary"), vmem),
        cost_estimate=cost(m, k, n, e, itemsize, out_itemsize),
        name="taskmoe_tgmm",
    )
    return call(walk.starts, walk.ends, walk.group, walk.block, walk.num[None], lhs, grad)
