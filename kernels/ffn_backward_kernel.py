"""The backward of expert_ffn as one Pallas TPU kernel that recomputes the hidden activations.

    u = x W_in,  s = x W_gate,  h = act(u)  or  act(s) * u,     dh = dy W_out^T
    dW_out = h^T dy,   du, ds = d(h) dh,   dW_in = x^T du,   dW_gate = x^T ds
    dx = du W_in^T + ds W_gate^T

Grid: (blocks of hidden units, visits), see `group_visits`. All visits of an expert are consecutive:
its matrices are read once a hidden block, their gradients sum up in f32 in VMEM and are written
once. With one hidden block dx is final. With more, every one but the last adds to a sum in HBM, in
f32, whose blocks come back as operands, aliased to the result; the last one writes dx. The sum's
memory is not set to anything before. A block of it must have been written before it is fetched
again, in the next sweep over the rows; where fewer than `BLOCKS_APART` blocks lie between, or cores
share the hidden blocks, each hidden block writes a part of its own, [F/f, M, D], summed outside.

VMEM: two buffers each of x, dy, dx [m, D] (and of its sum, before and after), the matrices [D, f]
and their gradients; the gradients' f32 sums; of a part of the rows, hidden activations and their
gradients in f32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import tiling as tilings
from taskmoe.kernels.block_products import dot, keep
from taskmoe.kernels.checks import result_like, vary_over, varying_axes
from taskmoe.kernels.ffn_backward_tiling import ffn_backward_tiling, ffn_backward_vmem_bytes
from taskmoe.kernels.ffn_kernel import where_held, with_rows
from taskmoe.kernels.ffn_tiling import FFNSizes
from taskmoe.kernels.group_visits import FFN_PART, Visit, Visits, visit_blocks
from taskmoe.kernels.groups import Groups
from taskmoe.kernels.options import Activation, Experts, FFNOptions, hidden_units
from taskmoe.kernels.platforms import chip
from taskmoe.kernels.tiling import Tiling

#: Blocks of rows from which on dx is summed in place. The pipeline fetches one step ahead, and
#: awaits a write one step after it began, whether or not its buffer is needed again.
BLOCKS_APART = 4


def cost(s: FFNSizes) -> pl.CostEstimate:
    """FLOPs and least bytes when every expert has rows."""
    return pl.CostEstimate(
        flops=2 * (3 * s.matrices - 1) * s.m * s.d * s.f,
        bytes_accessed=(3 * s.m * s.d + 2 * s.e * s.matrices * s.d * s.f) * s.itemsize,
        transcendentals=s.m * s.f,
    )


def rows_block(hidden: Any, visit: Any, walk: Visits) -> tuple[Any, ...]:
    """Rows of the visit's block: x and dy."""
    return walk.block[visit], 0


def part_block(hidden: Any, visit: Any, walk: Visits) -> tuple[Any, ...]:
    """Rows of the visit's block in this hidden block's part of dx."""
    return hidden, walk.block[visit], 0


def dx_block(hidden: Any, visit: Any, walk: Visits, last: int) -> tuple[Any, ...]:
    """Rows of the visit's block of dx, which the last hidden block writes."""
    return jnp.where(hidden == last, walk.block[visit], walk.block[0]), 0


def before_block(hidden: Any, visit: Any, walk: Visits) -> tuple[Any, ...]:
    """Rows of the visit's block in the sum so far.

    The first hidden block has none. It stays at the last rows: the next one begins elsewhere, and
    so fetches what it begins with.
    """
    visit = jnp.where(hidden == 0, walk.num[0] - 1, visit)
    return walk.block[visit], 0


def sum_block(hidden: Any, visit: Any, walk: Visits, last: int) -> tuple[Any, ...]:
    """Rows of the visit's block in the sum.

    The last hidden block stays at the first rows, so that it writes back no others.
    """
    return jnp.where(hidden == last, walk.block[0], walk.block[visit]), 0


def in_block(hidden: Any, visit: Any, walk: Visits) -> tuple[Any, ...]:
    """W_in or W_gate of the visit's expert, and their gradients."""
    return walk.group[visit], 0, hidden


def out_bias_block(hidden: Any, visit: Any, walk: Visits) -> tuple[Any, ...]:
    """b_out of the visit's expert, and its gradient."""
    return walk.group[visit], 0, 0


def out_block(hidden: Any, visit: Any, walk: Visits) -> tuple[Any, ...]:
    """W_out of the visit's expert, and its gradient."""
    return walk.group[visit], hidden, 0


def kernel(
    walk: Visits,
    x_ref: Any,
    dy_ref: Any,
    experts: Experts,
    before_ref: Any,
    dx_ref: Any,
    sum_ref: Any,
    grads: Experts,
    sums: Any,
    *,
    activation: Activation,
    hidden_size: int,
) -> None:
    """One visit at one block of hidden units.

    before_ref, sum_ref: the sum of dx in f32, as earlier blocks of hidden units left it and with
    this one, or None where dx_ref takes all. sums: `Experts`, of their gradients, in f32.
    """
    total_ref = dx_ref if sum_ref is None else sum_ref
    visit = Visit(walk, pl.program_id(1), x_ref.shape[0])
    w_in_ref, w_out_ref, w_gate_ref = experts[:3]
    block_hidden, act = w_in_ref.shape[1], functools.partial(hidden_units, activation)
    left = hidden_size - pl.program_id(0) * block_hidden

    def units_kept(x: jax.Array, axis: int) -> jax.Array:
        """The last block of hidden units overhangs: what lies past the last unit may be NaN."""
        return keep(x, left, axis) if hidden_size % block_hidden else x

    def biased(product: jax.Array, bias_ref: Any) -> jax.Array:
        if bias_ref is None:
            return product
        return product + units_kept(bias_ref[...], 1).astype(jnp.float32)

    def add_rows(sum_ref: Any, rows: jax.Array) -> None:
        if sum_ref is not None:
            sum_ref[...] += jnp.sum(rows.astype(jnp.float32), axis=0, keepdims=True)

    def before(part: Any) -> Any:
        """What earlier blocks of hidden units found; before the first there may be NaN."""
        return jnp.where(pl.program_id(0) == 0, 0.0, before_ref[part, :])

    def work(start: Any, size: int) -> None:
        part = pl.ds(start, size)
        owned = visit.owned(start, (size, x_ref.shape[1]))
        # Rows of others may be NaN; as zeros they add nothing.
        x, dy = visit.only_own(x_ref[part, :], start), visit.only_own(dy_ref[part, :], start)
        w_in, w_out = units_kept(w_in_ref[...], 1), units_kept(w_out_ref[...], 0)
        up, d_hidden = biased(dot(x, w_in), experts.b_in), dot(dy, w_out, 1, 1)
        if w_gate_ref is None:
            hidden, pull = jax.vjp(act, up)
            (d_up,) = pull(d_hidden)
            dx = jnp.zeros(x.shape, jnp.float32)
        else:
            w_gate = units_kept(w_gate_ref[...], 1)
            hidden, pull = jax.vjp(act, up, biased(dot(x, w_gate), experts.b_gate))
            d_up, d_gate = pull(d_hidden)
            d_gate = d_gate.astype(x.dtype)
            sums.w_gate[...] += dot(x, d_gate, 0, 0)
            add_rows(sums.b_gate, d_gate)
            dx = dot(d_gate, w_gate, 1, 1)
        d_up = d_up.astype(x.dtype)
        sums.w_out[...] += dot(hidden.astype(x.dtype), dy, 0, 0)
        sums.w_in[...] += dot(x, d_up, 0, 0)
        add_rows(sums.b_in, d_up)
        add_rows(sums.b_out, dy)
        dx += dot(d_up, w_in, 1, 1)
        if before_ref is not None:
            dx += before(part)
        dx = jnp.where(owned, dx, total_ref[part, :].astype(jnp.float32))
        total_ref[part, :] = dx.astype(total_ref.dtype)

    @pl.when(visit.block_arrives() & ~visit.owns_all)
    def _zero() -> None:
        total_ref[...] = jnp.zeros_like(total_ref) if before_ref is None else before(slice(None))

    @pl.when(visit.group_arrives())
    def _init() -> None:
        for sum_ref in jax.tree.leaves(sums):
            sum_ref[...] = jnp.zeros_like(sum_ref)

    visit.work(work, tilings.sublanes(x_ref.dtype.itemsize), FFN_PART)

    @pl.when(visit.group_leaves())
    def _store() -> None:
        for sum_ref, grad_ref in zip(jax.tree.leaves(sums), jax.tree.leaves(grads), strict=True):
            grad_ref[...] = sum_ref[...].astype(grad_ref.dtype)

    if sum_ref is not None:

        @pl.when(visit.block_leaves() & (pl.program_id(0) == pl.num_programs(0) - 1))
        def _finish() -> None:
            dx_ref[...] = sum_ref[...].astype(dx_ref.dtype)


def expert_ffn_backward_mosaic(
    options: FFNOptions,
    x: jax.Array,
    experts: Experts,
    groups: Groups,
    dy: jax.Array,
    tiling: Tiling | None = None,
) -> tuple[jax.Array, Experts]:
    """The kernel call.

    dy: [M, D], gradient of the result of `expert_ffn`, whose arguments the others are. Returns the
    gradients of x and of the experts.
    """
    (m, d), (e, _, f) = x.shape, experts.w_in.shape
    sizes = FFNSizes.of(x, experts)
    t = tiling or ffn_backward_tiling(sizes)
    walk = visit_blocks(groups, e, m, t.m, every_group=True)
    cuts = pl.cdiv(f, t.n)
    adds = cuts > 1 and chip().num_cores == 1 and pl.cdiv(m, t.m) >= BLOCKS_APART
    in_parts = cuts > 1 and not adds

    def rows_at(index_map: Any) -> pl.BlockSpec:
        return pl.BlockSpec((t.m, d), index_map)

    rows, dx_rows = rows_at(rows_block), rows_at(functools.partial(dx_block, last=cuts - 1))
    dx, before, total, sum_rows = result_like(x, x.shape, x.dtype), None, None, None
    if in_parts:
        dx_rows = pl.BlockSpec((None, t.m, d), part_block)
        dx = result_like(x, (cuts, m, d), jnp.float32)
    if adds:
        before, sum_rows = (
            rows_at(before_block),
            rows_at(functools.partial(sum_block, last=cuts - 1)),
        )
        # The interpreter wants whole blocks of what is aliased.
        total = jax.lax.empty((tilings.round_up(m, t.m), d), jnp.float32)
        total = vary_over(total, varying_axes(x))
    blocks = where_held(
        experts,
        pl.BlockSpec((None, d, t.n), in_block),
        pl.BlockSpec((None, t.n, d), out_block),
        pl.BlockSpec((None, 1, t.n), in_block),
        pl.BlockSpec((None, 1, d), out_bias_block),
    )
    shapes = (d, t.n), (t.n, d), (1, t.n), (1, d)
    cut = with_rows(experts)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(cuts, walk.num[0]),
        in_specs=[rows, rows, blocks, before],
        out_specs=(dx_rows, sum_rows, blocks),
        scratch_shapes=[where_held(experts, *(pltpu.VMEM(s, jnp.float32) for s in shapes))],
    )
    call = pl.pallas_call(
        functools.partial(kernel, activation=options.activation, hidden_size=f),
        grid_spec=grid_spec,
        out_shape=(
            dx,
            None if total is None else result_like(x, total.shape, total.dtype),
            jax.tree.map(lambda w: result_like(x, w.shape, w.dtype), cut),
        ),
        compiler_params=tilings.compiler_params(
            ("arbitrary" if adds else "parallel", "arbitrary"),
            ffn_backward_vmem_bytes(t, sizes),
        ),
        cost_estimate=cost(sizes),
        name="taskmoe_expert_ffn_backward",
        input_output_aliases={len(jax.tree.leaves((walk, x, dy, cut))): 1} if adds else {},
    )
    dx, _, grads = call(walk, x, dy, cut, total)
    grads = jax.tree.map(lambda grad, w: grad.reshape(w.shape), grads, experts)
    return jnp.sum(dx, axis=0).astype(x.dtype) if in_parts else dx, grads
