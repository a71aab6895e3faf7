"""What kernels for NVIDIA Hopper share: a ring of buffers, who loads and who multiplies, writing.

A thread block has three warpgroups. One loads pieces of both operands into a ring of buffers, by
the copy engine; two multiply them, each into a part of the block of the result, which stays in
registers until it is written. The loads run ahead, into the next block of the result too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

#: What is summed over at a time: in bfloat16 128 bytes, a swizzled line.
DEPTH = 64
#: Rows of a swizzled tile: where the copy engine may begin.
TILE_ROWS = 8
#: Rows of a warpgroup's part, those of a matrix instruction; columns that it writes at a time.
ROWS = COLUMNS = 64
#: Registers of a thread: the warpgroup that loads needs few, and the others get what it spares.
LOADING_REGISTERS, MULTIPLYING_REGISTERS = 40, 232
TILED = (plgpu.TilingTransform((TILE_ROWS, DEPTH)), plgpu.SwizzleTransform(128))
BY_ROWS = (plgpu.TilingTransform((1, COLUMNS)), plgpu.SwizzleTransform(128))


class Blocks(NamedTuple):
    """The shape of a block of the result: two warpgroups' parts, 64 rows of these columns each.

    beside: the parts lie side by side, instead of one above the other.
    """

    columns: int
    beside: bool = False

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of both."""
        return ROWS * (2 - self.beside), self.columns * (1 + self.beside)

    @property
    def stages(self) -> int:
        """Buffers of the ring: 192 KiB of both operands in bfloat16."""
        return min(8, 192 * 1024 // (2 * DEPTH * sum(self.block)))


class Ring(NamedTuple):
    """Buffers [stages, ...] of both operands, and barriers [stages].

    full: both operands are there. empty: both warpgroups have read them.
    """

    left: Any
    right: Any
    full: Any
    empty: Any


def num_multiprocessors() -> int:
    """Of the default device; of an H100 or H200 where that is no GPU."""
    device: Any = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132


def ring_of(blocks: Blocks, left: tuple[int, int], right: tuple[int, int], dtype: Any) -> Ring:
    """What a kernel asks for; left, right: the shape of a piece of each operand."""
    barriers = [plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages) for _ in range(2)]
    buffers = (
        plgpu.SMEM((blocks.stages, *shape), dtype, transforms=TILED) for shape in (left, right)
    )
    return Ring(*buffers, *barriers)


def kernel(
    body: Callable[..., None], name: str, result: Any, scratch: dict[str, Any]
) -> Callable[..., jax.Array]:
    """A thread block on each multiprocessor; body: of inputs, the result, and scratch by name."""
    return plgpu.kernel(
        body,
        out_type=result,
        scratch_types=scratch,
        grid=(num_multiprocessors(),),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name=f"taskmoe_{name}",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def work(
    ring: Ring,
    blocks: Blocks,
    total: Any,
    operands: Callable[[Any], tuple[Any, Any, Any]],
    multiply: Callable[[Any, Any], Any],
) -> None:
    """What a warpgroup does.

    operands(turn): how many pieces the block of that turn has, and each operand's, by its index.
    multiply(turn, step): the step after, of steps that count pieces.
    """
    turns = pl.cdiv(total - lax.axis_index("block"), lax.axis_size("block"))

    def load() -> None:
        plgpu.set_max_registers(LOADING_REGISTERS, action="decrease")

        def turn(index: Any, step: Any) -> Any:
            count, left, right = operands(index)

            def piece(index: Any, step: Any) -> Any:
                slot = lax.rem(step, blocks.stages)

                @pl.when(step >= blocks.stages)
                def _() -> None:
                    plgpu.barrier_wait(ring.empty.at[slot])

                full = ring.full.at[slot]
                plgpu.copy_gmem_to_smem(left(index), ring.left.at[slot], full)
                plgpu.copy_gmem_to_smem(right(index), ring.right.at[slot], full)
                return step + 1

            return lax.fori_loop(0, count, piece, step)

        steps = lax.fori_loop(0, turns, turn, jnp.int32(0))

        # No warpgroup may arrive after this one has ended.
        def rest(step: Any, _: None) -> None:
            plgpu.barrier_wait(ring.empty.at[lax.rem(step, blocks.stages)])

        lax.fori_loop(jnp.maximum(steps - blocks.stages, 0), steps, rest, None)

    def multiplying() -> None:
        plgpu.set_max_registers(MULTIPLYING_REGISTERS, action="increase")
        lax.fori_loop(0, turns, multiply, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    lax.cond(lax.axis_index("warpgroup") == 2, load, multiplying)


def parts(blocks: Blocks) -> tuple[Any, Any]:
    """Rows above and columns beside this warpgroup's part of the block."""
    warpgroup = lax.axis_index("warpgroup")
    return (0, warpgroup * blocks.columns) if blocks.beside else (warpgroup * ROWS, 0)


def multiplied(
    ring: Ring, blocks: Blocks, count: Any, step: Any, product: Callable[[Any, Any, Any], None]
) -> jax.Array:
    """[64, columns] f32: the sum of `count` products from the ring, beginning at this step."""

    def release(step: Any) -> None:
        plgpu.barrier_arrive(ring.empty.at[lax.rem(step, blocks.stages)])

    def scope(acc: Any) -> jax.Array:
        def piece(index: Any, step: Any) -> Any:
            slot = lax.rem(step, blocks.stages)
            plgpu.barrier_wait(ring.full.at[slot])
            product(acc, slot, index)
            plgpu.wgmma_wait(1)  # the product before this one has been made
            pl.when(index > 0)(lambda: release(step + blocks.stages - 1))
            return step + 1

        end = lax.fori_loop(0, count, piece, step)
        plgpu.wgmma_wait(0)
        pl.when(end > step)(lambda: release(end - 1))
        return acc[...]

    return pl.run_scoped(scope, plgpu.ACC((ROWS, blocks.columns), jnp.float32))


def skip(ring: Ring, count: Any, step: Any) -> None:
    """Release as many pieces as `multiplied` would use."""

    def piece(_: Any, step: Any) -> Any:
        slot = lax.rem(step, ring.full.shape[0])
        plgpu.barrier_wait(ring.full.at[slot])
        plgpu.barrier_arrive(ring.empty.at[slot])
        return step + 1

    lax.fori_loop(0, count, piece, step)


def write(smem: Any, blocks: Blocks, values: jax.Array, copy: Callable[[Any, int], None]) -> None:
    """Write values [64, columns] by way of the two buffers that the warpgroup has.

    copy(buffer, column): begin to copy the piece that begins there.
    """
    pieces = range(0, blocks.columns, COLUMNS)
    for i, column in enumerate(pieces):
        at = smem.at[lax.axis_index("warpgroup"), i % 2]
        # The copy before the last has left this buffer. Where the number of pieces is odd, the
        # last one of the block before is the last one from this buffer too.
        under_way = 0 if i == 0 and len(pieces) % 2 else 1
        plgpu.wait_smem_to_gmem(under_way, wait_read_only=True)
        at[...] = values[:, column : column + COLUMNS]
        plgpu.commit_smem()
        copy(at, column)
        plgpu.commit_smem_to_gmem_group()
