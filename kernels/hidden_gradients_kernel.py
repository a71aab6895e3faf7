"""What expert_ffn's backward takes first, as one Pallas TPU kernel, where it runs in several.

    u = x W_in,  s = x W_gate,  h = act(u)  or  act(s) * u,     dh = dy W_out^T
    du, ds = d(h) dh

    dx = du W_in^T + ds W_gate^T

It writes h, du and ds, [M, F] each, and dx: where hidden units are cut a part in f32 for each block
of them, [F/f, M, D], summed outside. Where these are many, dx is left to a grouped product of two
pairs. Grouped products take what is left:

    dW_in = x^T du,   dW_gate = x^T ds,   dW_out = h^T dy

Grid: (blocks of hidden units, visits), see `group_visits`. All visits of an expert are consecutive:
its matrices are read once. Rows of no group may hold anything in h, du and ds.

VMEM: two buffers each of x, dy and dx [m, D], the matrices [D, f] and the results [m, f]; of a
piece of the hidden units, what comes before the activation and its gradients in f32.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import tiling as tilings
from taskmoe.kernels.block_products import before_activation, dot, each, keep, passes, pieces
from taskmoe.kernels.checks import result_like
from taskmoe.kernels.ffn_backward_kernel import (
    in_block,
    out_bias_block,
    out_block,
    part_block,
    rows_block,
)
from taskmoe.kernels.ffn_backward_tiling import (
    HIDDEN_PIECE,
    hidden_gradients_tiling,
    hidden_gradients_vmem_bytes,
)
from taskmoe.kernels.ffn_kernel import where_held, with_rows
from taskmoe.kernels.ffn_tiling import FFNSizes
from taskmoe.kernels.gmm_kernel import PIECE_COLUMNS, WRITTEN, sum_of_gmms_mosaic
from taskmoe.kernels.group_visits import (
    FFN_PART,
    Visit,
    Visits,
    mixed_rows,
    part_sizes,
    visit_blocks,
    visit_groups,
)
from taskmoe.kernels.groups import Groups
from taskmoe.kernels.options import (
    Activation,
    Experts,
    FFNOptions,
    ProductOptions,
    hidden_units,
)
from taskmoe.kernels.platforms import chip
from taskmoe.kernels.tgmm_kernel import tgmms_mosaic
from taskmoe.kernels.tiling import Tiling
from taskmoe.kernels.visit_pipeline import Blocks, visits_call


def cost(s: FFNSizes, dx_bytes: int) -> pl.CostEstimate:
    """FLOPs and least bytes when every expert has rows."""
    products = 2 * s.matrices - 1 if dx_bytes else s.matrices
    read_and_written = 2 * s.m * s.d + s.matrices * s.f * (s.e * s.d + s.m)
    return pl.CostEstimate(
        flops=2 * products * s.m * s.d * s.f,
        bytes_accessed=read_and_written * s.itemsize + dx_bytes,
        transcendentals=s.m * s.f,
    )


def units_block(hidden: Any, visit: Any, walk: Visits) -> tuple[Any, ...]:
    """Rows of the visit's block in h, du and ds."""
    return walk.block[visit], hidden


def kernel(
    walk: Visits,
    x_ref: Any,
    dy_ref: Any,
    expert: Experts,
    dx_ref: Any,
    units_refs: Sequence[Any],
    bias_grads: Experts,
    sums: Experts,
    *,
    activation: Activation,
    unit_pieces: Sequence[pl.Slice],
    depth_pieces: Sequence[pl.Slice],
    column_pieces: Sequence[pl.Slice],
    passes: Mapping[int, int],
    hidden_size: int,
) -> None:
    """One visit at one block of hidden units, whose overhang is dropped.

    dx_ref: of all, or this block's part, or None. units_refs: h, du and, where gated, ds.
    bias_grads, sums: the gradients of those biases that there are, and their sums in f32.
    unit_pieces: of the block. depth_pieces, column_pieces: of the products that make dx. passes:
    over unit_pieces, and as many over column_pieces, for each size of a part, see `each`.
    """
    left = hidden_size - pl.program_id(0) * units_refs[0].shape[1]
    visit = Visit(walk, pl.program_id(1), x_ref.shape[0])
    unit = tilings.sublanes(x_ref.dtype.itemsize)
    mixed = mixed_rows(visit.rows, unit, FFN_PART)

    @pl.when(visit.group_arrives())
    def _init() -> None:
        for sum_ref in jax.tree.leaves(sums):
            sum_ref[...] = jnp.zeros_like(sum_ref)

    def add_rows(sum_ref: Any, rows: jax.Array, start: Any, columns: Any) -> None:
        if sum_ref is not None:
            own = jnp.where(visit.owned(start, rows.shape), rows.astype(jnp.float32), 0)
            sum_ref[:, columns] += jnp.sum(own, axis=0, keepdims=True)

    def work(start: Any, size: int) -> None:
        part = pl.ds(start, size)
        add_rows(sums.b_out, dy_ref[part, :], start, slice(None))

        def one(units: Any) -> None:
            before = before_activation(x_ref[part, :], expert, units)
            d_hidden = dot(dy_ref[part, :], expert.w_out[units, :], 1, 1)
            hidden, pull = jax.vjp(functools.partial(hidden_units, activation), *before)
            found = [z.astype(x_ref.dtype) for z in (hidden, *pull(d_hidden))]
            for ref, value in zip(units_refs, found, strict=True):
                visit.write(ref, value, part, units, mixed)
            add_rows(sums.b_in, found[1], start, units)
            add_rows(sums.b_gate, found[-1], start, units)

        each(unit_pieces, passes[size], one)
        if dx_ref is None:
            return
        pairs = list(zip(units_refs[1:], (w for w, _ in expert.into()), strict=True))

        def there(x: jax.Array, units: Any) -> jax.Array:
            """The last block of hidden units overhangs: what lies past the last unit may be NaN."""
            return keep(x, left - units.start, 1) if hidden_size % units_refs[0].shape[1] else x

        def dx_of(columns: Any) -> None:
            products = (
                dot(there(d_ref[part, units], units), there(w_ref[columns, units], units), 1, 1)
                for d_ref, w_ref in pairs
                for units in depth_pieces
            )
            visit.write(dx_ref, functools.reduce(jnp.add, products), part, columns, mixed)

        each(column_pieces, passes[size], dx_of)

    if dx_ref is not None:
        visit.begin(dx_ref, True)
    visit.work(work, unit, FFN_PART)
    if dx_ref is not None:
        visit.finish(dx_ref, True, tilings.sublanes(dx_ref.dtype.itemsize), every_group=True)

    @pl.when(visit.group_leaves())
    def _store() -> None:
        for sum_ref, ref in zip(jax.tree.leaves(sums), jax.tree.leaves(bias_grads), strict=True):
            ref[...] = sum_ref[...].astype(ref.dtype)


def hidden_gradients(
    options: FFNOptions,
    x: jax.Array,
    experts: Experts,
    groups: Groups,
    dy: jax.Array,
    how: tuple[Tiling, bool] | None = None,
) -> tuple[jax.Array | None, list[jax.Array], Experts]:
    """The kernel call: dx or None; h, du and, where gated, ds; gradients of the biases alone.

    dy: [M, D], gradient of the result of `expert_ffn`, whose arguments the others are. how: block
    sizes, and whether it finds dx; None chooses.
    """
    (m, d), (e, _, f) = x.shape, experts.w_in.shape
    sizes = FFNSizes.of(x, experts)
    itemsize, matrices = sizes.itemsize, sizes.matrices
    t, with_dx = how or hidden_gradients_tiling(sizes)
    cuts, of_dx, dx_rows = pl.cdiv(f, t.n), None, None
    if with_dx and cuts == 1:
        of_dx, dx_rows = result_like(x, (m, d), x.dtype), pl.BlockSpec((t.m, d), rows_block)
    elif with_dx:
        of_dx = result_like(x, (cuts, m, d), jnp.float32)
        dx_rows = pl.BlockSpec((None, t.m, d), part_block)
    rows = pl.BlockSpec((t.m, d), rows_block)
    into, out = pl.BlockSpec((None, d, t.n), in_block), pl.BlockSpec((None, t.n, d), out_block)
    of_units = pl.BlockSpec((None, 1, t.n), in_block)
    of_rows = pl.BlockSpec((None, 1, d), out_bias_block)
    cut = with_rows(experts)
    biases = cut._replace(w_in=None, w_out=None, w_gate=None)
    in_vmem = (pltpu.VMEM((1, size), jnp.float32) for size in (t.n, d))
    unit_pieces, mxu = pieces(t.n, HIDDEN_PIECE), chip().mxu_column_size
    written = WRITTEN * 2 // max(itemsize, 2) * mxu // (matrices * pl.cdiv(d, mxu))
    if with_dx:  # every block of it is written
        walk = visit_blocks(groups, e, m, t.m, every_group=True)
    else:
        walk = visit_groups(groups, e, m, t.m)
    dx_bytes = 0 if of_dx is None else of_dx.size * of_dx.dtype.itemsize
    dx, units, grads = visits_call(
        functools.partial(
            kernel,
            activation=options.activation,
            unit_pieces=unit_pieces,
            depth_pieces=pieces(t.n, mxu),
            column_pieces=pieces(d, PIECE_COLUMNS),
            passes={
                size: passes(unit_pieces, written // max(size, mxu))
                for size in part_sizes(t.m, FFN_PART)
            },
            hidden_size=f,
        ),
        Blocks(
            grid=lambda walk: (pl.cdiv(f, t.n), walk.num[0]),
            in_specs=[rows, rows, where_held(experts, into, out, of_units, of_rows)],
            out_specs=(
                dx_rows,
                [pl.BlockSpec((t.m, t.n), units_block)] * matrices,
                where_held(biases, None, None, of_units, of_rows),
            ),
        ),
        walk,
        x,
        dy,
        cut,
        out_shape=(
            of_dx,
            [result_like(x, (m, f), x.dtype)] * matrices,
            jax.tree.map(lambda b: result_like(x, b.shape, b.dtype), biases),
        ),
        scratch_shapes=[where_held(biases, None, None, *in_vmem)],
        semantics=("parallel", "arbitrary"),
        vmem_bytes=hidden_gradients_vmem_bytes(t, sizes, with_dx),
        cost_estimate=cost(sizes, dx_bytes),
        name="taskmoe_expert_ffn_hidden_gradients",
    )
    if with_dx and cuts > 1:
        # By the compiler's estimate a sum over the axis takes ten times as long.
        dx = functools.reduce(jnp.add, [dx[i] for i in range(cuts)]).astype(x.dtype)
    return dx, units, jax.tree.map(lambda grad: grad[:, 0], grads)


def expert_ffn_backward_split(
    options: FFNOptions,
    x: jax.Array,
    experts: Experts,
    groups: Groups,
    dy: jax.Array,
    how: tuple[Tiling, bool] | None = None,
) -> tuple[jax.Array, Experts]:
    """The backward in several kernels; arguments as in `hidden_gradients`.

    Returns the gradients of x and of the experts.
    """
    dx, (hidden, *d_units), grads = hidden_gradients(options, x, experts, groups, dy, how)
    into = [w for w, _ in experts.into()]
    product = ProductOptions(x.dtype, experts.w_in.shape[0], options.shifted, None)
    back = ProductOptions(x.dtype, product.num_groups, options.shifted, None, transpose_rhs=True)
    if dx is None:
        dx = sum_of_gmms_mosaic(back, list(zip(d_units, into, strict=True)), groups)
    d_in, *d_gate = tgmms_mosaic(product, x, d_units, groups, "taskmoe_tgmm_into_hidden")
    (d_out,) = tgmms_mosaic(product, hidden, [dy], groups, "taskmoe_tgmm_out_of_hidden")
    return dx, grads._replace(w_in=d_in, w_out=d_out, w_gate=next(iter(d_gate), None))
