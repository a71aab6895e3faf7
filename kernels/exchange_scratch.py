"""VMEM and semaphores of `exchange_ffn_kernel`. How much VMEM: `exchange_tiling.vmem_bytes`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels.exchange_tiling import ExchangeTiling
from taskmoe.kernels.exchange_walk import MATRIX_BUFFERS
from taskmoe.kernels.options import Experts


class Scratch(NamedTuple):
    """VMEM: a block of zeros, and what blocks of rows go through.

    experts, rows, results: buffers of matrices, of rows that came and of results that go. x, sums:
    values and sums of the blocks that are held. hidden: units of one block.
    """

    zeros: Any
    experts: Any
    rows: Any
    x: Any
    hidden: Any
    sums: Any
    results: Any


class Semaphores(NamedTuple):
    """DMA semaphores: of each buffer one, of arrivals one a segment."""

    read: Any
    loaded: Any
    stored: Any
    sent: Any
    arrived: Any
    returned: Any
    filled: Any


def scratch_shapes(
    experts: Experts, tiling: ExchangeTiling, words: jax.Array, zeros: int, num_segments: int
) -> list[Any]:
    """`Scratch` and `Semaphores` of a call on words [M, 1, W]. zeros: rows of that block."""
    w_in, hidden, rows = experts.w_in, tiling.hidden, tiling.rows
    (_, d, f), width = w_in.shape, words.shape[2]
    held, padded = tiling.span(f) or 1, width * 4 // w_in.dtype.itemsize

    def buffers(name: str, w: jax.Array | None) -> Any:
        if w is None:
            return None
        shapes = {"w_out": (hidden, d), "b_out": (1, d), "w_in": (d, hidden), "w_gate": (d, hidden)}
        return pltpu.VMEM((MATRIX_BUFFERS, *shapes.get(name, (1, hidden))), w.dtype)

    block, semaphore = pltpu.VMEM((2, rows, 1, width), words.dtype), pltpu.SemaphoreType.DMA
    return [
        Scratch(
            zeros=pltpu.VMEM((zeros, 1, width), words.dtype),
            experts=Experts(**{name: buffers(name, w) for name, w in experts._asdict().items()}),
            rows=block,
            x=pltpu.VMEM((held, rows, padded), w_in.dtype),
            hidden=pltpu.VMEM((rows, hidden), w_in.dtype),
            sums=pltpu.VMEM((held, rows, padded), jnp.float32),
            results=block,
        ),
        Semaphores(
            read=semaphore((MATRIX_BUFFERS,)),
            loaded=semaphore((2,)),
            stored=semaphore((2,)),
            sent=semaphore,
            arrived=semaphore((num_segments,)),
            returned=semaphore((1,)),
            filled=semaphore,
        ),
    ]
