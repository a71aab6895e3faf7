"""Row movement with all tokens in VMEM, as Pallas TPU kernels: each row crosses HBM once.

    take: out[r] = scale[r] * source[token[r]],  dots[r] = <source[token[r]], other[r]>
    add:  out[t] = sum over r with token[r] = t of  scale[r] * rows[r]

`take` is dispatch, and with `other` the gradient of combine; `add` is combine, and the gradient of
dispatch. The many rows [R, D] pass through in blocks, in order. The few tokens [T, D] stay: as rows
of one register after another, so that a row is read or added to by few instructions, where the
blocks' registers hold 8 or 16 rows each. 16-bit values share words, column c with c + D/2.

Grid: slices of width, and in each the blocks of tokens and the blocks of rows, one after another:
`take` lays out its tokens first, `add` writes them last. token is -1 for a row of nobody.

VMEM: the slice of tokens (f32 in add), a block of rows laid out so, and two buffers of each block.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import tiling as tilings
from taskmoe.kernels.checks import result_like
from taskmoe.kernels.exchange_plan import join_words, split_words
from taskmoe.kernels.platforms import chip
from taskmoe.kernels.tiling import LANES

#: Rows of a block, of tokens too.
BLOCK = 256
#: Most columns of a slice: a row's lines are written out.
MOST_COLUMNS = 8192
#: Lines of a row from which on their number wants to be odd.
ODD = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut.

    columns: of a slice; the last may have fewer. block: rows of a block. slices, token_blocks,
    row_blocks: how many.
    """

    columns: int
    block: int
    slices: int
    token_blocks: int
    row_blocks: int

    @property
    def grid(self) -> tuple[int, int]:
        """Slices, and the blocks of each."""
        return self.slices, self.token_blocks + self.row_blocks


def plan(tokens: int, rows: int, width: int, itemsize: int, adds: bool) -> Plan | None:
    """The fewest slices of this width whose tokens fit in VMEM; None where no slices do.

    The cores of a chip share the slices evenly.
    """
    info = chip()
    if info.generation <= 3:  # loads of a register's part want whole registers there
        return None
    per_line = LANES if adds else 4 // itemsize * LANES
    block = min(BLOCK, tilings.round_up(max(tokens, rows), tilings.sublanes(itemsize)))
    token_blocks, row_blocks = pl.cdiv(tokens, block), pl.cdiv(rows, block)
    most = pl.cdiv(width, per_line)
    for slices in range(min(info.num_cores, most), most + 1, info.num_cores):
        columns = width if slices == 1 else tilings.round_up(pl.cdiv(width, slices), per_line)
        needed = vmem_bytes(token_blocks, block, columns, itemsize, adds)
        if columns <= MOST_COLUMNS and needed <= tilings.vmem_budget_bytes(info):
            return Plan(columns, block, pl.cdiv(width, columns), token_blocks, row_blocks)
    return None


def vmem_bytes(token_blocks: int, block: int, columns: int, itemsize: int, adds: bool) -> int:
    """Of the tokens that stay, a block laid out alike, and the pipeline's blocks."""
    step = lines_of(columns, 4 if adds else itemsize)
    held = ((token_blocks + 1) * block + 8) * pitch(step) * LANES * 4
    return held + 6 * block * tilings.round_up(columns, LANES) * itemsize + 64 * block


def cost(rows: int, tokens: int, width: int, itemsize: int, reads: int = 1) -> pl.CostEstimate:
    """FLOPs and bytes: every row once, read and written, or `reads` times."""
    return pl.CostEstimate(
        flops=2 * rows * width,
        bytes_accessed=(tokens + reads * rows) * width * itemsize,
        transcendentals=0,
    )


def lines_of(width: int, itemsize: int) -> int:
    """Lines of 128 words that a row takes."""
    return tilings.round_up(width, 4 // itemsize * LANES) * itemsize // 4 // LANES


def pitch(step: int) -> int:
    """Lines from one row to the next: strides of 8 and more lines want to be odd, for the banks."""
    return step + 1 - step % 2 if step >= ODD else step


def lines(row: Any, step: int) -> Any:
    """The lines of a row, one behind the other."""
    return pl.ds(row * pitch(step), step)


def column(first: Any, chunk: int, rows: int, step: int) -> Any:
    """One line of each of so many rows: 128 columns of eight rows share a register so."""
    return pl.ds(first * pitch(step) + chunk, rows, stride=pitch(step))


def read(ref: Any, rows: Any, first: int, edge_ref: Any) -> jax.Array:
    """128 columns of a block's rows in f32, zeros behind its width. edge_ref: scratch for those."""
    left = min(ref.shape[1] - first, LANES)
    if left == LANES:
        return ref[rows, pl.ds(first, LANES)].astype(jnp.float32)
    edge_ref[...] = jnp.zeros_like(edge_ref)
    if left > 0:
        edge_ref[:, pl.ds(0, left)] = ref[rows, pl.ds(first, left)].astype(jnp.float32)
    return edge_ref[...]


def write(ref: Any, rows: Any, first: int, value: jax.Array) -> None:
    """128 columns of a block's rows, as many as there are."""
    left = min(ref.shape[1] - first, LANES)
    if left > 0:
        ref[rows, pl.ds(first, left)] = value[:, :left].astype(ref.dtype)


def take_kernel(
    token_ref: Any,
    source_ref: Any,
    scale_ref: Any,
    other_ref: Any,
    out_ref: Any,
    dots_ref: Any,
    held_ref: Any,
    taken_ref: Any,
    edge_ref: Any,
    *,
    token_blocks: int,
    all_columns: int,
) -> None:
    """A block of tokens, laid out, or one of rows. scale_ref, or other_ref and dots_ref, if any."""
    slice_id, i, dtype = pl.program_id(0), pl.program_id(1), source_ref.dtype
    block, width = source_ref.shape
    group = tilings.sublanes(dtype.itemsize)
    step = lines_of(width, dtype.itemsize)
    parts = range(0, step * LANES * 4 // dtype.itemsize, step * LANES)

    @pl.when(i == 0)
    def _nobody() -> None:
        held_ref[lines(token_blocks * block, step)] = jnp.zeros((step, LANES), held_ref.dtype)

    @pl.when(i < token_blocks)
    def _lay_out() -> None:
        def some(at: Any, carry: None) -> None:
            first = pl.multiple_of(at * group, group)
            for chunk in range(step):
                columns = [part + chunk * LANES for part in parts]
                values = [read(source_ref, pl.ds(first, group), c, edge_ref) for c in columns]
                to = column(i * block + first, chunk, group, step)
                held_ref[to] = join_words(values, dtype)

        jax.lax.fori_loop(0, block // group, some, None)

    def some_rows(at: Any, carry: None) -> None:
        first = pl.multiple_of(at * group, group)
        for row in range(group):
            token = token_ref[0, first + row]
            taken_ref[lines(first + row, step)] = held_ref[lines(token, step)]
        own = pl.ds(first, group)
        lane = jax.lax.broadcasted_iota(jnp.int32, (group, block), 1)
        place = lane == first + jax.lax.broadcasted_iota(jnp.int32, (group, block), 0)
        scale = None
        if scale_ref is not None:  # from lanes to sublanes
            scale = jnp.sum(jnp.where(place, scale_ref[...], 0), axis=1, keepdims=True)
        dots = jnp.zeros((group, LANES), jnp.float32)
        for chunk in range(step):
            values = split_words(taken_ref[column(first, chunk, group, step)], dtype)
            for part, value in zip(parts, values, strict=True):
                columns = part + chunk * LANES
                if other_ref is not None:
                    product = value.astype(jnp.float32) * read(other_ref, own, columns, edge_ref)
                    if all_columns % width:  # behind the last slice is anything
                        left = all_columns - slice_id * width - columns
                        lanes = jax.lax.broadcasted_iota(jnp.int32, product.shape, 1)
                        product = jnp.where(lanes < left, product, 0)
                    dots += product
                if scale is not None:
                    value = value.astype(jnp.float32) * scale
                write(out_ref, own, columns, value)
        if dots_ref is not None:  # and back
            sums = jnp.where(place, jnp.sum(dots, axis=1, keepdims=True), 0)
            dots_ref[...] += jnp.sum(sums, axis=0, keepdims=True)

    @pl.when(i >= token_blocks)
    def _take() -> None:
        if dots_ref is not None:
            dots_ref[...] = jnp.zeros_like(dots_ref)
        jax.lax.fori_loop(0, block // group, some_rows, None)


def add_kernel(
    token_ref: Any,
    scale_ref: Any,
    rows_ref: Any,
    out_ref: Any,
    sums_ref: Any,
    laid_ref: Any,
    edge_ref: Any,
    *,
    row_blocks: int,
    num_tokens: int,
) -> None:
    """A block of rows, added to their tokens, or one of tokens, written. scale_ref may be None."""
    i = pl.program_id(1)
    block, width = rows_ref.shape
    group = tilings.sublanes(rows_ref.dtype.itemsize)
    step = lines_of(width, 4)

    @pl.when(i == 0)
    def _zero() -> None:
        def some(at: Any, carry: None) -> None:
            own = pl.ds(at * group * pitch(step), group * pitch(step))
            sums_ref[own] = jnp.zeros((group * pitch(step), LANES), jnp.float32)

        jax.lax.fori_loop(0, num_tokens // group, some, None)

    def some_rows(at: Any, carry: None) -> None:
        first = pl.multiple_of(at * group, group)
        for chunk in range(step):
            value = read(rows_ref, pl.ds(first, group), chunk * LANES, edge_ref)
            laid_ref[column(first, chunk, group, step)] = value
        for row in range(group):
            to = lines(token_ref[0, first + row], step)
            value = laid_ref[lines(first + row, step)]
            if scale_ref is not None:
                value = value * scale_ref[0, first + row]
            sums_ref[to] += value

    @pl.when(i < row_blocks)
    def _add() -> None:
        jax.lax.fori_loop(0, block // group, some_rows, None)

    @pl.when(i >= row_blocks)
    def _write() -> None:
        def some(at: Any, carry: None) -> None:
            first = pl.multiple_of(at * group, group)
            for chunk in range(step):
                sums = sums_ref[column((i - row_blocks) * block + first, chunk, group, step)]
                write(out_ref, pl.ds(first, group), chunk * LANES, sums)

        jax.lax.fori_loop(0, block // group, some, None)


def _scalars(x: jax.Array, p: Plan, nothing: Any) -> jax.Array:
    """[R] in blocks along lanes, [row_blocks, 1, block], with `nothing` behind the last."""
    x = jnp.pad(x, (0, p.row_blocks * p.block - x.size), constant_values=nothing)
    return x.reshape(p.row_blocks, 1, p.block)


def take(
    source: jax.Array, token: jax.Array, scale: jax.Array | None, other: jax.Array | None
) -> tuple[jax.Array, jax.Array | None] | None:
    """The call; None where the tokens do not fit in VMEM.

    source: [T, D] bf16|f32; token: [R] i32, below 0 for none; scale: [R] f32; other: [R, D].
    Returns out [R, D] in source's dtype, and with other dots [R] f32.
    """
    (tokens, width), rows, itemsize = source.shape, token.size, source.dtype.itemsize
    p = plan(tokens, rows, width, itemsize, adds=False)
    if p is None:
        return None
    first, step = p.token_blocks, lines_of(p.columns, itemsize)
    nobody = first * p.block
    token = _scalars(jnp.where(token >= 0, token, nobody), p, nobody)
    behind = lambda i: jnp.maximum(i - first, 0)  # noqa: E731
    few = pl.BlockSpec((p.block, p.columns), lambda s, i: (jnp.minimum(i, first - 1), s))
    many = pl.BlockSpec((p.block, p.columns), lambda s, i: (behind(i), s))
    vector = pl.BlockSpec((None, 1, p.block), lambda s, i: (behind(i), 0, 0))
    dots = pl.BlockSpec((None, None, 1, p.block), lambda s, i: (s, behind(i), 0, 0))
    dots_shape = (p.slices, p.row_blocks, 1, p.block)
    held = jnp.int32 if itemsize < 4 else source.dtype
    call = pl.pallas_call(
        functools.partial(take_kernel, token_blocks=first, all_columns=width),
        grid=p.grid,
        in_specs=[
            pl.BlockSpec(
                (None, 1, p.block), lambda s, i: (behind(i), 0, 0), memory_space=pltpu.SMEM
            ),
            few,
            None if scale is None else vector,
            None if other is None else many,
        ],
        out_specs=(many, None if other is None else dots),
        out_shape=(
            result_like(source, (rows, width), source.dtype),
            None if other is None else result_like(source, dots_shape, jnp.float32),
        ),
        scratch_shapes=[
            pltpu.VMEM(((nobody + 8) * pitch(step), LANES), held),
            pltpu.VMEM((p.block * pitch(step), LANES), held),
            pltpu.VMEM((tilings.sublanes(itemsize), LANES), jnp.float32),
        ],
        compiler_params=tilings.compiler_params(
            ("parallel", "arbitrary"), vmem_bytes(first, p.block, p.columns, itemsize, adds=False)
        ),
        cost_estimate=cost(rows, tokens, width, itemsize, 1 if other is None else 2),
        name="taskmoe_take_rows",
    )
    out, dots = call(
        token,
        source,
        None if scale is None else _scalars(scale.astype(jnp.float32), p, 0.0),
        other,
    )
    return out, None if other is None else jnp.sum(dots, axis=0).reshape(-1)[:rows]


def add(
    rows: jax.Array, token: jax.Array, scale: jax.Array | None, num_tokens: int
) -> jax.Array | None:
    """The call; None where the tokens do not fit in VMEM.

    rows: [R, D] bf16|f32; token: [R] i32, below 0 for none; scale: [R] f32. Returns [num_tokens, D]
    in rows' dtype, summed in f32.
    """
    (count, width), itemsize = rows.shape, rows.dtype.itemsize
    p = plan(num_tokens, count, width, itemsize, adds=True)
    if p is None:
        return None
    last, step = p.row_blocks - 1, lines_of(p.columns, 4)
    nobody = p.token_blocks * p.block
    smem = pl.BlockSpec(
        (None, 1, p.block), lambda s, i: (jnp.minimum(i, last), 0, 0), memory_space=pltpu.SMEM
    )
    call = pl.pallas_call(
        functools.partial(add_kernel, row_blocks=p.row_blocks, num_tokens=nobody),
        grid=p.grid,
        in_specs=[
            smem,
            None if scale is None else smem,
            pl.BlockSpec((p.block, p.columns), lambda s, i: (jnp.minimum(i, last), s)),
        ],
        out_specs=pl.BlockSpec(
            (p.block, p.columns), lambda s, i: (jnp.maximum(i - last - 1, 0), s)
        ),
        out_shape=result_like(rows, (num_tokens, width), rows.dtype),
        scratch_shapes=[
            pltpu.VMEM(((nobody + 8) * pitch(step), LANES), jnp.float32),
            pltpu.VMEM((p.block * pitch(step), LANES), jnp.float32),
            pltpu.VMEM((tilings.sublanes(itemsize), LANES), jnp.float32),
        ],
        compiler_params=tilings.compiler_params(
            ("parallel", "arbitrary"),
            vmem_bytes(p.token_blocks, p.block, p.columns, itemsize, adds=True),
        ),
        cost_estimate=cost(count, num_tokens, width, itemsize),
        name="taskmoe_add_rows",
    )
    return call(
        _scalars(jnp.where(token >= 0, token, nobody), p, nobody),
        None if scale is None else _scalars(scale.astype(jnp.float32), p, 0.0),
        rows,
    )
