"""HBM bytes that a Pallas kernel moves, counted by walking its grid.

A kernel's operands travel in blocks. The pipeline fetches a block when its index differs from the
previous grid step's, and writes one back when it leaves it; so the bytes follow from the index maps
alone, evaluated at every step of the real grid with the real prefetched scalars (which visits there
are depends on `group_sizes`). Nothing runs but the small kernel that finds the visits: calls of
`pl.pallas_call` are recorded, and return zeros.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.bench.tpu.regions import Trips
from taskmoe.bench.tpu.schedule import VISITS
from taskmoe.kernels import for_chip
from taskmoe.kernels.group_visits import FFN_PART, TALLEST_PART, Visits, part_sizes
from taskmoe.kernels.tiling import sublanes
from taskmoe.kernels.visit_pipeline import pipeline

#: Kernels that start a copy a row, and those whose tokens stay in VMEM.
GATHERS = ("taskmoe_gather_rows", "taskmoe_row_dots")
RESIDENT = ("taskmoe_take_rows", "taskmoe_add_rows")
#: The kernel whose last step writes sums over all.
GATING = "taskmoe_top_k_gating"
#: Kernels that zero a block of results where it has rows that are nobody's.
ZEROING = ("taskmoe_gmm", "taskmoe_expert_ffn", "taskmoe_expert_ffn_hidden_gradients")


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """One recorded call: its name, what it declares to cost, and HBM bytes of its operands.

    steps: of its grid
    walked_bytes: bytes of all operands that travel in blocks
    copies_by_hand: whether it also has operands in HBM that it copies from itself
    trips: how often its regions run
    rows_share: rows that its products have, over rows that it declares: above 1 where blocks
      straddle groups
    """

    name: str
    cost: pl.CostEstimate | None
    steps: int
    walked_bytes: int
    copies_by_hand: bool
    trips: Trips | None = None
    rows_share: float = 1.0

    @property
    def moved_bytes(self) -> int:
        """Counted, or what the kernel declares where it copies by hand."""
        if not self.copies_by_hand:
            return self.walked_bytes
        if self.cost is None:
            raise ValueError(f"{self.name} copies by hand and declares no bytes")
        return int(self.cost.bytes_accessed)


@contextlib.contextmanager
def recording(chip: str) -> Iterator[list[KernelCall]]:
    """Record kernel calls made in the block, with block sizes as for this chip ("v5e", ...).

    Functions must be called outside of `jax.jit`, with arrays: index maps need real group sizes.
    """
    calls: list[KernelCall] = []
    real_call = pl.pallas_call

    def pallas_call(kernel: Callable[..., None], out_shape: Any = None, **options: Any) -> Any:
        def call(*operands: Any) -> Any:
            if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(operands)):
                return real_call(kernel, out_shape=out_shape, **options)(*operands)
            if options.get("name") == VISITS:  # the grids of others depend on it
                walk = real_call(kernel, out_shape=out_shape, interpret=True, **options)
                with jax.disable_jit(False), pltpu.force_tpu_interpret_mode():
                    found = jax.jit(walk)(*operands)
                calls.append(_record_walk(Visits(*found)))
                return found
            calls.append(_record(kernel, out_shape, options, operands))
            return jax.tree.map(lambda s: unwritten_zeros(s.shape, s.dtype), out_shape)

        return call

    # It is looked up as an attribute of its module at each call. Interpret mode is what lets
    # "mosaic" be chosen on a machine without TPU.
    pl.pallas_call = pallas_call
    try:
        with for_chip(chip), pltpu.force_tpu_interpret_mode(), jax.disable_jit():
            yield calls
    finally:
        pl.pallas_call = real_call


def unwritten_zeros(shape: Sequence[int], dtype: Any) -> jax.Array:
    """Zeros in pages that nobody has written, which take no memory however many they are."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    pages = mmap.mmap(-1, max(size, 1))
    # `device_put` reads them in place, `asarray` would copy them.
    return jax.device_put(np.frombuffer(pages, dtype, math.prod(shape)).reshape(shape))


def _record(
    kernel: Callable[..., None], out_shape: Any, options: dict[str, Any], operands: Any
) -> KernelCall:
    spec = options.get("grid_spec") or types.SimpleNamespace(**options)
    prefetched = getattr(spec, "num_scalar_prefetch", 0)
    scalars = jax.tree.map(np.asarray, operands[:prefetched])
    keywords = getattr(kernel, "keywords", {})
    if getattr(kernel, "func", None) is pipeline:
        blocks = keywords["blocks"]
        spec = types.SimpleNamespace(**vars(blocks) | {"grid": blocks.grid(scalars[0])})
        keywords = getattr(keywords["kernel"], "keywords", {})
    grid = [int(size) for size in spec.grid]
    is_spec: Any = lambda x: isinstance(x, pl.BlockSpec) or x is None  # noqa: E731
    specs = jax.tree.leaves([*spec.in_specs, spec.out_specs], is_leaf=is_spec)
    arrays = jax.tree.leaves([*operands[prefetched:], out_shape], is_leaf=lambda x: x is None)
    pairs = [pair for pair in zip(specs, arrays, strict=True) if pair[1] is not None]
    by_hand = [block.memory_space in (pltpu.HBM, pl.ANY) for block, _ in pairs]
    walked = [
        walk_bytes(block, array, grid, scalars)
        for (block, array), skip in zip(pairs, by_hand, strict=True)
        if not skip
    ]
    # The compiler names a kernel without a name after the function that it was called in.
    name = options.get("name") or getattr(kernel, "__qualname__", "kernel").split(".")[0]
    steps = math.prod(grid)
    longest, others = _loops(name, grid, specs, arrays)
    trips = Trips(steps, others, [longest or steps], [1])
    call = KernelCall(name, options.get("cost_estimate"), steps, sum(walked), any(by_hand), trips)
    if not scalars or not isinstance(scalars[0], Visits):
        return call
    (first, array), (last, _) = pairs[0], pairs[-1]
    rows = first.block_shape[-2]
    ffn = name.startswith("taskmoe_expert_ffn")
    passes = keywords.get("passes", {})
    sizes = list(passes) or part_sizes(rows, FFN_PART if ffn else TALLEST_PART)
    parts = own_parts(scalars[0], rows, sizes, sublanes(array.dtype.itemsize))
    sweeps = steps // max(int(scalars[0].num[0]), 1)
    trips = Trips(
        steps,
        _results(name, last, grid, scalars, rows),
        [n * sweeps for n in parts],
        [passes.get(size, 1) for size in sizes],
    )
    worked = sum(math.prod(pair) for pair in zip(parts, sizes, strict=True))
    return dataclasses.replace(call, trips=trips, rows_share=worked / array.shape[-2])


def _results(name: str, out: Any, grid: list[int], scalars: Any, rows: int) -> int:
    """How often what runs once a block of results does: most kernels zero few, or none.

    rows: of a block of rows.
    """
    results = changes(out, grid, scalars)[1]
    walk = scalars[0]
    if name.startswith("taskmoe_tgmm"):
        empty = int((walk.ends <= walk.starts).sum())
        return int(results.sum()) * empty // walk.starts.size
    if name not in ZEROING:
        return int(results.sum())
    low, high = _own_rows(walk, rows)
    block = walk.block[: low.size]
    changed = block[1:] != block[:-1]
    arrives, leaves = np.append(True, changed), np.append(changed, True)
    zeroed = arrives & ((low > 0) | (high <= low))
    cleared = leaves & ((high > low) | ~arrives) & (high < rows)
    return int(zeroed.sum() + cleared.sum()) * (math.prod(grid) // max(low.size, 1))


def _loops(name: str, grid: list[int], blocks: list[Any], arrays: list[Any]) -> tuple[int, int]:
    """How often the inner loops of a kernel that moves rows run: the longest one, and others.

    Each run is a register's height of rows. Loops over tokens are the others; those that gather one
    by one start the first block's copies so. Gating has no loops, but a last step.
    """
    height = sublanes(min(array.dtype.itemsize for array in arrays if array is not None))
    if name in GATHERS:
        rows = blocks[-1].block_shape[0]
        return math.prod(grid) * rows // height, rows
    if name in RESIDENT:
        rows, block = arrays[0].shape[0], blocks[0].block_shape[-1]
        return grid[0] * rows * block // height, grid[0] * (grid[1] - rows) * block // height
    return 0, 1 if name == GATING else 0


def _record_walk(found: Visits) -> KernelCall:
    # A group's first visit is noted with its bounds, others in a loop.
    visits = np.asarray(found.group[: int(found.num[0])])
    further = visits.size - np.unique(visits).size
    trips = Trips(step=1, result=found.starts.size, parts=[further], passes=[1])
    return KernelCall(VISITS, None, 1, sum(x.nbytes for x in found), False, trips)


def own_parts(walk: Visits, rows: int, sizes: Sequence[int], unit: int) -> list[int]:
    """Parts of each of these sizes in which visits work on blocks of so many rows.

    sizes: as `part_sizes` has them.
    """
    low, high = _own_rows(walk, rows)
    least = min(sizes)
    left = -(-(high - low // unit * unit) // least) * least if least < rows else rows
    left = np.where(high > low, left, 0)
    repeated = left // sizes[0]
    taller = max(sizes) > sizes[0]
    repeated -= taller & (repeated > 0) & (left - repeated * sizes[0] == max(sizes) - sizes[0])
    left -= repeated * sizes[0]
    return [int(repeated.sum()), *(int((left == size).sum()) for size in sizes[1:])]


def _own_rows(walk: Visits, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last row of each visit's own, in its block of so many: [visits]."""
    count = int(walk.num[0])
    group, first = walk.group[:count], walk.block[:count] * rows
    low = np.maximum(walk.starts[group] - first, 0)
    return low, np.minimum(walk.ends[group] - first, rows)


def walk_bytes(block: pl.BlockSpec, array: Any, grid: Sequence[int], scalars: Sequence[Any]) -> int:
    """Bytes of one operand: of each block whose index differs from the previous step's.

    array: anything with shape and dtype. Parts of a block beyond the array's edge do not travel.
    """
    itemsize = jnp.dtype(array.dtype).itemsize
    if block.index_map is None or block.block_shape is None:
        return math.prod(array.shape) * itemsize
    if math.prod(grid) == 0:
        return 0
    index, changed = changes(block, grid, scalars)
    extent = np.ones(changed.size, np.int64)
    for size, part, at in zip(array.shape, block.block_shape, index, strict=True):
        length = part if isinstance(part, int) else 1
        extent = extent * np.clip(size - at * length, 0, length)
    return int(extent[changed].sum()) * itemsize


def changes(
    block: pl.BlockSpec, grid: Sequence[int], scalars: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Index of an operand's block at each step, [axes, steps], and where it is another, [steps]."""
    steps = math.prod(grid)
    coordinates = [axis.reshape(-1) for axis in np.indices(tuple(grid))]
    index_map: Any = block.index_map
    index = index_map(*coordinates, *scalars)
    index = np.stack([np.broadcast_to(np.asarray(i), (steps,)) for i in index])
    changed = np.ones(steps, bool)
    changed[1:] = (index[:, 1:] != index[:, :-1]).any(axis=0)
    return index, changed
