"""tgmm as a Pallas TPU kernel:  out[e] = sum over rows i of group e of lhs[i]^T grad[i].

Several grads of one lhs make a result each: rows of lhs are read, and transposed, once for all.

Grid: (blocks of width, blocks of depth, visits), see `group_visits`. All visits of a group are
consecutive and sum up in f32 in VMEM. The first part of a group's rows finds the sum at zero, the
last one writes the group's block. Groups without rows are visited once, to write zeros. Rows that
are not the visit's own are zeroed on both sides: they may hold NaN.

VMEM: two buffers each of lhs [m, k], grad [m, n] and out [k, n], and the sum in f32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import tiling as tilings
from taskmoe.kernels.block_products import dot, each, passes, pieces
from taskmoe.kernels.checks import result_like
from taskmoe.kernels.group_visits import TALLEST_PART, Visit, Visits, part_sizes, visit_groups
from taskmoe.kernels.groups import Groups
from taskmoe.kernels.options import ProductOptions
from taskmoe.kernels.platforms import chip
from taskmoe.kernels.product_tiling import ProductSizes, tgmm_tiling, tgmm_vmem_bytes
from taskmoe.kernels.visit_pipeline import Blocks, visits_call

#: Rows of one piece of the result.
PIECE_ROWS = 256
#: MXU-sized products of bfloat16 that are written out side by side; of float32 half as many.
WRITTEN = 160


def cost(s: ProductSizes) -> pl.CostEstimate:
    """FLOPs and least bytes of tgmm when all rows belong to groups."""
    results = s.count * s.e * s.k * s.n * s.out_itemsize
    moved = s.m * (s.k + s.count * s.n) * s.itemsize + results
    flops = 2 * s.count * s.m * s.k * s.n
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)


def lhs_block(width: Any, depth: Any, visit: Any, walk: Visits) -> tuple[Any, ...]:
    """Rows of the visit's block, at this depth."""
    return walk.block[visit], depth


def grad_block(width: Any, depth: Any, visit: Any, walk: Visits) -> tuple[Any, ...]:
    """Rows of the visit's block, at this width."""
    return walk.block[visit], width


def out_block(width: Any, depth: Any, visit: Any, walk: Visits) -> tuple[Any, ...]:
    """The matrix of the visit's group."""
    return walk.group[visit], depth, width


def kernel(
    walk: Visits,
    lhs_ref: Any,
    grad_refs: Sequence[Any],
    out_refs: Sequence[Any],
    acc_refs: Sequence[Any],
    *,
    depth_pieces: Sequence[pl.Slice],
    passes: Mapping[int, int],
) -> None:
    """One visit. Parts of a block fill the depth of the MXU, which sums over their rows.

    depth_pieces: of a block of the result. passes: over them, for each of `part_sizes`, see `each`.
    """
    visit = Visit(walk, pl.program_id(2), lhs_ref.shape[0])
    arrives, leaves = visit.group_arrives(), visit.group_leaves()

    def work(start: Any, size: int) -> None:
        rows = pl.ds(start, size)
        begins, ends = arrives & (start <= visit.low), leaves & (start + size >= visit.high)

        def totals(depth: Any) -> Iterator[jax.Array]:
            before = [jnp.where(begins, 0, acc_ref[depth, :]) for acc_ref in acc_refs]
            lhs = visit.only_own(lhs_ref[rows, depth], start)
            for total, grad_ref in zip(before, grad_refs, strict=True):
                yield total + dot(lhs, visit.only_own(grad_ref[rows, :], start), 0, 0)

        def store(depth: Any) -> None:
            for out_ref, total in zip(out_refs, totals(depth), strict=True):
                out_ref[depth, :] = total.astype(out_ref.dtype)

        def keep(depth: Any) -> None:
            for acc_ref, total in zip(acc_refs, totals(depth), strict=True):
                acc_ref[depth, :] = total

        pl.when(ends)(lambda: each(depth_pieces, passes[size], store))
        pl.when(~ends)(lambda: each(depth_pieces, passes[size], keep))

    often = next(iter(passes))
    visit.work(work, tilings.sublanes(lhs_ref.dtype.itemsize), often=often)

    @pl.when(visit.high <= visit.low)
    def _zero() -> None:
        for out_ref in out_refs:
            out_ref[...] = jnp.zeros_like(out_ref)


def tgmm_mosaic(
    options: ProductOptions, lhs: jax.Array, grad: jax.Array, groups: Groups
) -> jax.Array:
    """The kernel call; arguments as in `tgmm`, validated."""
    return tgmms_mosaic(options, lhs, [grad], groups)[0]


def tgmms_mosaic(
    options: ProductOptions,
    lhs: jax.Array,
    grads: Sequence[jax.Array],
    groups: Groups,
    name: str = "taskmoe_tgmm",
) -> list[jax.Array]:
    """`tgmm` of lhs and each of these grads, which are alike. name: of the kernel."""
    (m, k), n, e, count = lhs.shape, grads[0].shape[1], options.num_groups, len(grads)
    itemsize, out_itemsize = lhs.dtype.itemsize, jnp.dtype(options.out_dtype).itemsize
    sizes = ProductSizes(m, k, n, e, itemsize, out_itemsize, chip(), count=count)
    t = options.tiling or tgmm_tiling(sizes)
    walk = visit_groups(groups, e, m, t.m)
    blocks = Blocks(
        grid=lambda walk: (pl.cdiv(n, t.n), pl.cdiv(k, t.k), walk.num[0]),
        in_specs=[
            pl.BlockSpec((t.m, t.k), lhs_block),
            [pl.BlockSpec((t.m, t.n), grad_block)] * count,
        ],
        out_specs=([pl.BlockSpec((None, t.k, t.n), out_block)] * count,),
    )
    depth_pieces = pieces(t.k, PIECE_ROWS)
    mxu = chip().mxu_column_size
    often = TALLEST_PART // mxu * mxu  # parts that are repeated leave no depth of the MXU empty
    written = WRITTEN * 2 // max(itemsize, 2) * mxu**3 // (PIECE_ROWS * t.n * count)
    (found,) = visits_call(
        functools.partial(
            kernel,
            depth_pieces=depth_pieces,
            passes={
                size: passes(depth_pieces, written // max(size, mxu))
                for size in part_sizes(t.m, often=often)
            },
        ),
        blocks,
        walk,
        lhs,
        list(grads),
        out_shape=([result_like(lhs, (e, k, n), options.out_dtype)] * count,),
        scratch_shapes=[[pltpu.VMEM((t.k, t.n), jnp.float32)] * count],
        semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_bytes=tgmm_vmem_bytes(t, sizes),
        cost_estimate=cost(sizes),
        name=name,
    )
    return found
