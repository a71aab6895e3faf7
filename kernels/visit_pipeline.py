"""Calls of the kernels that walk visits (see `group_visits`): how their blocks come and go.

A kernel has a grid, one axis of which is the walk's, and operands in blocks that grid and walk
name. The grid is Pallas' own, or a pipeline inside of a kernel, with the same blocks. The compiler
lays the buffers of its own grid out in tiles of 8 rows, those that a kernel allocates in tiles as
high as a register of their dtype: operands of 2 bytes then need no new layout on their way to the
MXU. On TPU v7x that is a tenth to a quarter of a product's bundles, on v6e some percent, on v5e
nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import tiling as tilings
from taskmoe.kernels.group_visits import Visits
from taskmoe.kernels.platforms import chip, lowering_a_batch

#: The first TPU whose kernels have a pipeline inside. Of those before it some share a kernel's grid
#: between two cores.
PIPELINES = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """What a kernel's grid steps see.

    grid: by the walk. in_specs, out_specs: trees of blocks, whose index maps take grid indices and
    the walk
    """

    grid: Callable[[Visits], tuple[Any, ...]]
    in_specs: Sequence[Any]
    out_specs: Any


def visits_call(
    kernel: Callable[..., None],
    blocks: Blocks,
    walk: Visits,
    *operands: Any,
    out_shape: Any,
    scratch_shapes: Sequence[Any],
    semantics: Sequence[Any],
    vmem_bytes: int,
    **options: Any,
) -> Any:
    """Call kernel(walk, *blocks of operands, *blocks of results, *scratch) for every grid step.

    out_shape: of the result, or a tuple of trees of several. semantics: of the grid's axes.
    options: of `pl.pallas_call`.
    """
    if not _wants_pipeline(blocks, operands, out_shape):
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=blocks.grid(walk),
                in_specs=blocks.in_specs,
                out_specs=blocks.out_specs,
                scratch_shapes=scratch_shapes,
            ),
            out_shape=out_shape,
            compiler_params=tilings.compiler_params(semantics, vmem_bytes),
            **options,
        )(walk, *operands)
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    operands = jax.tree.map(_stay_in_hbm, operands)
    return pl.pallas_call(
        functools.partial(pipeline, kernel=kernel, blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=jax.tree.map(lambda _: in_hbm, list(operands)),
            out_specs=jax.tree.map(lambda _: in_hbm, out_shape),
            scratch_shapes=scratch_shapes,
        ),
        out_shape=out_shape,
        compiler_params=tilings.compiler_params(("arbitrary",), vmem_bytes),
        **options,
    )(walk, *operands)


def pipeline(walk: Visits, *refs: Any, kernel: Callable[..., None], blocks: Blocks) -> None:
    """The kernel's grid inside of a kernel. refs: operands and results in HBM, and scratch."""
    several = isinstance(blocks.out_specs, tuple)
    count = len(blocks.in_specs) + (len(blocks.out_specs) if several else 1)
    arrays, scratch = refs[:count], refs[count:]
    leaves, tree = jax.tree.flatten(arrays)

    def step(*held: Any) -> None:
        kernel(walk, *jax.tree.unflatten(tree, held), *scratch)

    def bound(specs: Any) -> list[pl.BlockSpec]:
        return [_with_walk(spec, walk) for spec in jax.tree.leaves(specs)]

    pipelined = pltpu.emit_pipeline(
        step,
        grid=blocks.grid(walk),
        in_specs=bound(list(blocks.in_specs)),
        out_specs=bound(blocks.out_specs),
    )
    with jax.disable_jit(False):  # its loop carries buffers, as a traced one alone can
        pipelined(*leaves)


def _stay_in_hbm(x: jax.Array) -> jax.Array:
    """The array, which XLA must not copy to VMEM first: buffers there have other tiles.

    What runs eagerly lies in HBM.
    """
    return pltpu.with_memory_space_constraint(x, pltpu.HBM) if isinstance(x, jax.core.Tracer) else x


def _with_walk(spec: pl.BlockSpec, walk: Visits) -> pl.BlockSpec:
    index_map: Any = spec.index_map
    return pl.BlockSpec(spec.block_shape, lambda *indices: index_map(*indices, walk))


def _wants_pipeline(blocks: Blocks, operands: Sequence[Any], result: Any) -> bool:
    """Whether this chip wants the pipeline inside, and the pipeline takes these blocks.

    It copies whole tiles: what overhangs an array must leave a multiple of them. A batch is one
    more axis of the grid.
    """
    info = chip()
    if info.generation < PIPELINES or info.num_cores > 1 or lowering_a_batch.get():
        return False
    specs = jax.tree.leaves([*blocks.in_specs, blocks.out_specs])
    arrays = jax.tree.leaves([*operands, result])
    return all(map(_is_in_tiles, specs, arrays))


def _is_in_tiles(spec: pl.BlockSpec, array: Any) -> bool:
    units = tilings.sublanes(array.dtype.itemsize), tilings.LANES
    block_shape: Any = spec.block_shape
    sizes = zip(block_shape[-2:], array.shape[-2:], units, strict=True)
    return all(size % block % unit == 0 for block, size, unit in sizes)
