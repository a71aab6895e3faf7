"""The backward of expert_ffn as one Pallas TPU kernel that recomputes the hidden activations.

    u = x W_in,  s = x W_gate,  h = act(u)  or  act(s) * u,     dh = dy W_out^T
    dW_out = h^T dy,   du, ds = d(h) dh,   dW_in = x^T du,   dW_gate = x^T ds
    dx = du W_in^T + ds W_gate^T

Grid: (blocks of hidden units, visits), see `group_visits`. All visits of an expert are consecutive:
its matrices are read once a hidden block, their gradients sum up in f32 in VMEM and are written
once. With one hidden block dx is final; with more each adds one [M, D] f32 part, summed outside.

VMEM: two buffers each of x, dy, dx [m, D], the matrices [D, f] and their gradients; the gradients'
f32 sums; hidden activations and their gradients [m, f] in f32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import tiling as tilings
from taskmoe.kernels.checks import result_like
from taskmoe.kernels.gmm_kernel import SUB_ROWS
from taskmoe.kernels.group_visits import visit_blocks
from taskmoe.kernels.groups import Groups, group_bounds
from taskmoe.kernels.options import ACTIVATIONS, Experts, FFNOptions
from taskmoe.kernels.platforms import chip
from taskmoe.kernels.tiling import Tiling


def cost(m: int, d: int, f: int, e: int, matrices: int, itemsize: int) -> pl.CostEstimate:
    """FLOPs and least bytes when every expert has rows; matrices is 2, or 3 if gated."""
    return pl.CostEstimate(
        flops=2 * (3 * matrices - 1) * m * d * f,
        bytes_accessed=(3 * m * d + 2 * e * matrices * d * f) * itemsize,
        transcendentals=m * f,
    )


def rows_block(hidden: Any, visit: Any, *walk: Any) -> tuple[Any, ...]:
    """Rows of the visit's block: x and dy."""
    return walk[3][visit], 0


def part_block(hidden: Any, visit: Any, *walk: Any) -> tuple[Any, ...]:
    """Rows of the visit's block in this hidden block's part of dx."""
    return hidden, walk[3][visit], 0


def in_block(hidden: Any, visit: Any, *walk: Any) -> tuple[Any, ...]:
    """W_in or W_gate of the visit's expert, and their gradients."""
    return walk[2][visit], 0, hidden


def out_block(hidden: Any, visit: Any, *walk: Any) -> tuple[Any, ...]:
    """W_out of the visit's expert, and its gradient."""
    return walk[2][visit], hidden, 0


def kernel(
    starts_ref: Any,
    ends_ref: Any,
    group_ref: Any,
    block_ref: Any,
    num_ref: Any,
    x_ref: Any,
    dy_ref: Any,
    w_in_ref: Any,
    w_gate_ref: Any,
    w_out_ref: Any,
    dx_ref: Any,
    d_in_ref: Any,
    d_gate_ref: Any,
    d_out_ref: Any,
    acc_in_ref: Any,
    acc_gate_ref: Any,
    acc_out_ref: Any,
    *,
    activation: str,
    hidden_size: int,
) -> None:
    """One visit at one block of hidden units. What belongs to the gate may be None."""
    hidden_block, visit = pl.program_id(0), pl.program_id(1)
    rows, block_hidden = x_ref.shape[0], w_in_ref.shape[1]
    block, group = block_ref[visit], group_ref[visit]
    low = jnp.maximum(starts_ref[group] - block * rows, 0)
    high = jnp.minimum(ends_ref[group] - block * rows, rows)
    owns_all = (low == 0) & (high == rows)
    last_visit = num_ref[0] - 1
    before, behind = jnp.maximum(visit - 1, 0), jnp.minimum(visit + 1, last_visit)
    block_arrives = (visit == 0) | (block_ref[before] != block)
    group_arrives = (visit == 0) | (group_ref[before] != group)
    group_leaves = (visit == last_visit) | (group_ref[behind] != group)
    sums = [
        (acc_in_ref, d_in_ref),
        (acc_out_ref, d_out_ref),
        *([] if w_gate_ref is None else [(acc_gate_ref, d_gate_ref)]),
    ]
    act = ACTIVATIONS[activation]

    def dot(a: jax.Array, b: jax.Array, left: int = 1, right: int = 0) -> jax.Array:
        dims: Any = (((left,), (right,)), ((), ()))
        return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)

    def units_kept(x: jax.Array, axis: int) -> jax.Array:
        """The last block of hidden units overhangs: what lies past the last unit may be NaN."""
        if hidden_size % block_hidden == 0:
            return x
        unit = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) + hidden_block * block_hidden
        return jnp.where(unit < hidden_size, x.astype(jnp.float32), 0).astype(x.dtype)

    def work(start: Any, size: int, masked: bool) -> None:
        part = pl.ds(start, size)
        x, dy = x_ref[part, :], dy_ref[part, :]
        row = start + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
        mine = (row >= low) & (row < high)
        if masked:  # rows of others may be NaN; as zeros they add nothing
            x = jnp.where(mine, x.astype(jnp.float32), 0).astype(x.dtype)
            dy = jnp.where(mine, dy.astype(jnp.float32), 0).astype(dy.dtype)
        w_in, w_out = units_kept(w_in_ref[...], 1), units_kept(w_out_ref[...], 0)
        up, d_hidden = dot(x, w_in), dot(dy, w_out, 1, 1)
        if w_gate_ref is None:
            hidden, pull = jax.vjp(act, up)
            (d_up,) = pull(d_hidden)
            dx = jnp.zeros(x.shape, jnp.float32)
        else:
            w_gate = units_kept(w_gate_ref[...], 1)
            hidden, pull = jax.vjp(lambda s, u: act(s) * u, dot(x, w_gate), up)
            d_gate, d_up = pull(d_hidden)
            d_gate = d_gate.astype(x.dtype)
            acc_gate_ref[...] += dot(x, d_gate, 0, 0)
            dx = dot(d_gate, w_gate, 1, 1)
        d_up = d_up.astype(x.dtype)
        acc_out_ref[...] += dot(hidden.astype(x.dtype), dy, 0, 0)
        acc_in_ref[...] += dot(x, d_up, 0, 0)
        dx += dot(d_up, w_in, 1, 1)
        if masked:
            dx = jnp.where(mine, dx, dx_ref[part, :].astype(jnp.float32))
        dx_ref[part, :] = dx.astype(dx_ref.dtype)

    @pl.when(block_arrives & ~owns_all)
    def _zero() -> None:
        dx_ref[...] = jnp.zeros_like(dx_ref)

    @pl.when(group_arrives)
    def _init() -> None:
        for acc_ref, _ in sums:
            acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(owns_all)
    def _whole() -> None:
        work(0, rows, masked=False)

    @pl.when(~owns_all & (high > low))
    def _parts() -> None:
        sub = SUB_ROWS if rows % SUB_ROWS == 0 else rows

        def one(i: jax.Array, carry: None) -> None:
            work(pl.multiple_of(i * sub, sub), sub, masked=True)

        jax.lax.fori_loop(low // sub, pl.cdiv(high, sub), one, None)

    @pl.when(group_leaves)
    def _store() -> None:
        for acc_ref, out_ref in sums:
            out_ref[...] = acc_ref[...].astype(out_ref.dtype)


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
    w_in, w_out, w_gate = experts
    (m, d), (e, _, f) = x.shape, w_in.shape
    itemsize, matrices = x.dtype.itemsize, 2 if w_gate is None else 3
    t = tiling or tilings.ffn_backward_tiling(m, d, f, e, matrices, itemsize, chip())
    walk = visit_blocks(group_bounds(groups, e, m), m, t.m, every_group=True)
    cuts = pl.cdiv(f, t.n)
    rows, into = pl.BlockSpec((t.m, d), rows_block), pl.BlockSpec((None, d, t.n), in_block)
    out = pl.BlockSpec((None, t.n, d), out_block)
    gated = w_gate is not None
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(cuts, walk.num),
        in_specs=[rows, rows, into, into if gated else None, out],
        out_specs=[pl.BlockSpec((None, t.m, d), part_block), into, into if gated else None, out],
        scratch_shapes=[
            pltpu.VMEM((d, t.n), jnp.float32),
            pltpu.VMEM((d, t.n) if gated else (8, 128), jnp.float32),
            pltpu.VMEM((t.n, d), jnp.float32),
        ],
    )
    call = pl.pallas_call(
        functools.partial(kernel, activation=options.activation, hidden_size=f),
        grid_spec=grid_spec,
        out_shape=[
            result_like(x, (cuts, m, d), x.dtype if cuts == 1 else jnp.float32),
            result_like(x, w_in.shape, w_in.dtype),
            result_like(x, w_in.shape, w_in.dtype) if gated else None,
            result_like(x, w_out.shape, w_out.dtype),
        ],
        compiler_params=tilings.compiler_params(
            ("parallel", "arbitrary"), tilings.ffn_backward_vmem_bytes(t, matrices, itemsize)
        ),
        cost_estimate=cost(m, d, f, e, matrices, itemsize),
        name="taskmoe_expert_ffn_backward",
    )
    walked = (walk.starts, walk.ends, walk.group, walk.block, walk.num[None])
    dx, d_in, d_gate, d_out = call(*walked, x, dy, w_in, w_gate, w_out)
    dx = dx[0] if cuts == 1 else jnp.sum(dx, axis=0).astype(x.dtype)
    return dx, Experts(d_in, d_out, d_gate)
