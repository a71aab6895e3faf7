"""expert_ffn as one Pallas TPU kernel:  out[i] = act(x[i] W_in[g(i)]) W_out[g(i)], or gated.

Grid: (visits, blocks of hidden units), see `group_visits`. Hidden activations exist only in VMEM,
a chunk at a time. Where a whole expert fits (two buffers of its matrices), its matrices are read
once and only if it has rows: the least bytes that there are. Where it does not, the hidden
dimension is cut, and matrices are read once a visit.

VMEM: two buffers each of x [m, D], W_in [D, f], W_gate [D, f], W_out [f, D] and out [m, D]; the
sum [m, D] in f32; a chunk's hidden activations.
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
from taskmoe.kernels.gmm_kernel import SUB_ROWS, keep
from taskmoe.kernels.group_visits import visit_blocks
from taskmoe.kernels.groups import Groups, group_bounds
from taskmoe.kernels.options import ACTIVATIONS, Experts, FFNOptions
from taskmoe.kernels.platforms import chip
from taskmoe.kernels.tiling import HIDDEN_CHUNK


def cost(m: int, d: int, f: int, e: int, matrices: int, itemsize: int) -> pl.CostEstimate:
    """FLOPs and least bytes when every expert has rows; matrices is 2, or 3 if gated."""
    return pl.CostEstimate(
        flops=2 * matrices * m * d * f,
        bytes_accessed=(2 * m * d + e * matrices * d * f) * itemsize,
        transcendentals=m * f,
    )


def rows_block(visit: Any, hidden: Any, *walk: Any) -> tuple[Any, ...]:
    """Rows of the visit's block: x and out."""
    return walk[3][visit], 0


def in_block(visit: Any, hidden: Any, *walk: Any) -> tuple[Any, ...]:
    """W_in or W_gate of the visit's expert."""
    return walk[2][visit], 0, hidden


def out_block(visit: Any, hidden: Any, *walk: Any) -> tuple[Any, ...]:
    """W_out of the visit's expert."""
    return walk[2][visit], hidden, 0


def kernel(
    starts_ref: Any,
    ends_ref: Any,
    group_ref: Any,
    block_ref: Any,
    x_ref: Any,
    w_in_ref: Any,
    w_gate_ref: Any,
    w_out_ref: Any,
    out_ref: Any,
    acc_ref: Any,
    *,
    activation: str,
    hidden_size: int,
) -> None:
    """One visit and one block of hidden units. w_gate_ref may be None."""
    visit, step, steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    rows, block_hidden = x_ref.shape[0], w_in_ref.shape[1]
    block, group = block_ref[visit], group_ref[visit]
    low = jnp.maximum(starts_ref[group] - block * rows, 0)
    high = jnp.minimum(ends_ref[group] - block * rows, rows)
    owns_all = (low == 0) & (high == rows)
    arrives = (visit == 0) | (block_ref[jnp.maximum(visit - 1, 0)] != block)
    chunk = HIDDEN_CHUNK if block_hidden % HIDDEN_CHUNK == 0 else block_hidden
    overhangs = hidden_size % block_hidden != 0
    act = ACTIVATIONS[activation]

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.dot(a, b, preferred_element_type=jnp.float32)

    def product(x: jax.Array) -> jax.Array:
        total = jnp.zeros((x.shape[0], w_out_ref.shape[1]), jnp.float32)
        for first in range(0, block_hidden, chunk):
            units = pl.ds(first, chunk)
            hidden = dot(x, w_in_ref[:, units])
            if w_gate_ref is None:
                hidden = act(hidden)
            else:
                hidden = act(dot(x, w_gate_ref[:, units])) * hidden
            hidden = hidden.astype(x.dtype)
            w_out = w_out_ref[units, :]
            if overhangs:  # the last block of hidden units: both sides may hold NaN
                left = hidden_size - step * block_hidden - first
                hidden, w_out = keep(hidden, left, axis=1), keep(w_out, left, axis=0)
            total += dot(hidden, w_out)
        return total

    def work(start: Any, size: int, masked: bool) -> None:
        part = pl.ds(start, size)
        value = product(x_ref[part, :])

        @pl.when((step > 0) & (step < steps - 1))
        def _accumulate() -> None:
            acc_ref[part, :] += value

        @pl.when((step == 0) & (steps > 1))
        def _init() -> None:
            acc_ref[part, :] = value

        @pl.when(step == steps - 1)
        def _store() -> None:
            total = jnp.where(step > 0, acc_ref[part, :], 0) + value
            if masked:
                row = start + jax.lax.broadcasted_iota(jnp.int32, total.shape, 0)
                old = out_ref[part, :].astype(jnp.float32)
                total = jnp.where((row >= low) & (row < high), total, old)
            out_ref[part, :] = total.astype(out_ref.dtype)

    @pl.when(arrives & (step == 0) & ~owns_all)
    def _zero() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(owns_all)
    def _whole() -> None:
        work(0, rows, masked=False)

    @pl.when(~owns_all & (high > low))
    def _parts() -> None:
        sub = SUB_ROWS if rows % SUB_ROWS == 0 else rows

        def one(i: jax.Array, carry: None) -> None:
            work(pl.multiple_of(i * sub, sub), sub, masked=True)

        jax.lax.fori_loop(low // sub, pl.cdiv(high, sub), one, None)


def expert_ffn_mosaic(
    options: FFNOptions,
    x: jax.Array,
    experts: Experts,
    groups: Groups,
) -> jax.Array:
    """The kernel call; arguments as in `expert_ffn`, validated."""
    w_in, w_out, w_gate = experts
    (m, d), (e, _, f) = x.shape, w_in.shape
    itemsize, matrices = x.dtype.itemsize, 2 if w_gate is None else 3
    t = options.tiling or tilings.ffn_tiling(m, d, f, e, matrices, itemsize, chip())
    walk = visit_blocks(group_bounds(groups, e, m), m, t.m)
    into = pl.BlockSpec((None, d, t.n), in_block)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(walk.num, pl.cdiv(f, t.n)),
        in_specs=[
            pl.BlockSpec((t.m, d), rows_block),
            into,
            None if w_gate is None else into,
            pl.BlockSpec((None, t.n, d), out_block),
        ],
        out_specs=pl.BlockSpec((t.m, d), rows_block),
        scratch_shapes=[pltpu.VMEM((t.m, d), jnp.float32)],
    )
    call = pl.pallas_call(
        functools.partial(kernel, activation=options.activation, hidden_size=f),
        grid_spec=grid_spec,
        out_shape=result_like(x, (m, d), x.dtype),
        compiler_params=tilings.compiler_params(
            ("arbitrary", "arbitrary"), tilings.ffn_vmem_bytes(t, matrices, itemsize)
        ),
        cost_estimate=cost(m, d, f, e, matrices, itemsize),
        name="taskmoe_expert_ffn",
    )
    return call(walk.starts, walk.ends, walk.group, walk.block, x, w_in, w_gate, w_out)
