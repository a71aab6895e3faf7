"""expert_ffn as one Pallas TPU kernel:  out[i] = act(x[i] W_in[g(i)]) W_out[g(i)], or gated.

Grid: (visits, blocks of hidden units), see `group_visits`. Hidden activations exist only in VMEM,
a chunk at a time. Where a whole expert fits (two buffers of its matrices), its matrices are read
once and only if it has rows: the least bytes that there are. Where it does not, the hidden
dimension is cut, and matrices are read once a visit.

Experts may be `Quantized`: 8 bits are what is copied; a chunk of them at a time is converted.

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
from taskmoe.kernels.block_products import through_expert
from taskmoe.kernels.checks import result_like
from taskmoe.kernels.ffn_tiling import FFNSizes, ffn_tiling, ffn_vmem_bytes
from taskmoe.kernels.group_visits import FFN_PART, Visit, Visits, mixed_rows, visit_blocks
from taskmoe.kernels.groups import Groups
from taskmoe.kernels.options import Activation, Experts, FFNOptions
from taskmoe.kernels.quantized import Quantized, nbytes, with_scales
from taskmoe.kernels.visit_pipeline import Blocks, visits_call


def cost(s: FFNSizes, weight_bytes: int) -> pl.CostEstimate:
    """FLOPs and least bytes when every expert has rows; weight_bytes: of all experts."""
    return pl.CostEstimate(
        flops=2 * s.matrices * s.m * s.d * s.f,
        bytes_accessed=2 * s.m * s.d * s.itemsize + weight_bytes,
        transcendentals=s.m * s.f,
    )


def rows_block(visit: Any, hidden: Any, walk: Visits) -> tuple[Any, ...]:
    """Rows of the visit's block: x and out."""
    return walk.block[visit], 0


def in_block(visit: Any, hidden: Any, walk: Visits) -> tuple[Any, ...]:
    """W_in or W_gate of the visit's expert."""
    return walk.group[visit], 0, hidden


def in_bias_block(visit: Any, hidden: Any, walk: Visits) -> tuple[Any, ...]:
    """b_in or b_gate of the visit's expert."""
    return walk.group[visit], 0, hidden


def out_bias_block(visit: Any, hidden: Any, walk: Visits) -> tuple[Any, ...]:
    """b_out of the visit's expert."""
    return walk.group[visit], 0, 0


def out_block(visit: Any, hidden: Any, walk: Visits) -> tuple[Any, ...]:
    """W_out of the visit's expert."""
    return walk.group[visit], hidden, 0


def in_scales_block(visit: Any, hidden: Any, walk: Visits) -> tuple[Any, ...]:
    """Scales of W_in or W_gate of the visit's expert."""
    return walk.group[visit], 0, 0, hidden


def out_scales_block(visit: Any, hidden: Any, walk: Visits) -> tuple[Any, ...]:
    """Scales of W_out of the visit's expert, of all its blocks."""
    return walk.group[visit], 0, 0, 0


def kernel(
    walk: Visits,
    x_ref: Any,
    expert: Experts,
    out_ref: Any,
    acc_ref: Any,
    *,
    activation: Activation,
    hidden_size: int,
) -> None:
    """One visit and one block of hidden units."""
    visit = Visit(walk, pl.program_id(0), x_ref.shape[0])
    step, steps, block_hidden = pl.program_id(1), pl.num_programs(1), expert.w_in.shape[1]
    left = hidden_size - step * block_hidden if hidden_size % block_hidden else None
    unit = tilings.sublanes(x_ref.dtype.itemsize)
    mixed = mixed_rows(visit.rows, unit, FFN_PART)

    def work(start: Any, size: int) -> None:
        part = pl.ds(start, size)
        value = through_expert(
            x_ref[part, :], expert, activation, left, step * block_hidden, hidden_size
        )

        @pl.when((step > 0) & (step < steps - 1))
        def _accumulate() -> None:
            acc_ref[part, :] += value

        @pl.when((step == 0) & (steps > 1))
        def _init() -> None:
            acc_ref[part, :] = value

        @pl.when(step == steps - 1)
        def _store() -> None:
            total = jnp.where(step > 0, acc_ref[part, :], 0) + value
            if expert.b_out is not None:
                total += expert.b_out[...].astype(jnp.float32)
            visit.write(out_ref, total, part, slice(None), mixed)

    visit.begin(out_ref, step == 0)
    visit.work(work, unit, FFN_PART)
    visit.finish(out_ref, step == steps - 1, unit)


def where_held(experts: Experts, into: Any, out: Any, into_bias: Any, out_bias: Any) -> Any:
    """`Experts` of what stands for each matrix and bias that there is, None for the others."""
    parts: Any = Experts(into, out, into, into_bias, out_bias, into_bias)
    absent = {name: None for name, held in experts._asdict().items() if held is None}
    return parts._replace(**absent)


def with_rows(experts: Experts) -> Experts:
    """The experts with biases [E, 1, N]: a block of one row is all of that axis."""
    b_in, b_out, b_gate = (b if b is None else b[:, None] for b in experts[3:])
    return experts._replace(b_in=b_in, b_out=b_out, b_gate=b_gate)


def expert_blocks(experts: Experts, d: int, hidden: int) -> Experts:
    """How an expert's matrices and biases travel, `hidden` units at a time."""
    blocks = where_held(
        experts,
        pl.BlockSpec((None, d, hidden), in_block),
        pl.BlockSpec((None, hidden, d), out_block),
        pl.BlockSpec((None, 1, hidden), in_bias_block),
        pl.BlockSpec((None, 1, d), out_bias_block),
    )
    for name, (width, index) in {
        "w_in": (hidden, in_scales_block),
        "w_gate": (hidden, in_scales_block),
        "w_out": (d, out_scales_block),
    }.items():
        if isinstance(w := getattr(experts, name), Quantized):
            scales = pl.BlockSpec((None, w.blocks, 1, width), index)
            blocks = blocks._replace(**{name: with_scales(w, getattr(blocks, name), scales)})
    return blocks


def expert_ffn_mosaic(
    options: FFNOptions,
    x: jax.Array,
    experts: Experts,
    groups: Groups,
) -> jax.Array:
    """The kernel call; arguments as in `expert_ffn`, validated."""
    (m, d), (e, _, f) = x.shape, experts.w_in.shape
    sizes = FFNSizes.of(x, experts)
    t = options.tiling or ffn_tiling(sizes)
    walk = visit_blocks(groups, e, m, t.m)
    blocks = Blocks(
        grid=lambda walk: (walk.num[0], pl.cdiv(f, t.n)),
        in_specs=[pl.BlockSpec((t.m, d), rows_block), expert_blocks(experts, d, t.n)],
        out_specs=pl.BlockSpec((t.m, d), rows_block),
    )
    return visits_call(
        functools.partial(kernel, activation=options.activation, hidden_size=f),
        blocks,
        walk,
        x,
        with_rows(experts),
        out_shape=result_like(x, (m, d), x.dtype),
        scratch_shapes=[pltpu.VMEM((t.m, d), jnp.float32)],
        semantics=("arbitrary", "arbitrary"),
        vmem_bytes=ffn_vmem_bytes(t, sizes),
        cost_estimate=cost(sizes, nbytes(experts[:3])),
        name="taskmoe_expert_ffn",
    )
