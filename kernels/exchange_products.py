"""Inside `exchange_ffn_kernel`: a block of rows times a block of an expert's hidden units.

Values go through VMEM in pieces of the matrix unit's size: larger ones are spilled.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from taskmoe.kernels.block_products import dot, pieces
from taskmoe.kernels.options import Activation, Experts, hidden_units


def begin_sums(sums_ref: Any, bias_ref: Any, piece: int) -> None:
    """Sums of nothing yet: zeros, or the bias [1, D]; what pads them is zero."""
    rows, width = sums_ref.shape
    for columns in pieces(width, piece):
        sums_ref[:, columns] = jnp.zeros((rows, columns.size), jnp.float32)
    if bias_ref is not None:
        for columns in pieces(bias_ref.shape[1], piece):
            bias = bias_ref[:, columns].astype(jnp.float32)
            sums_ref[:, columns] = jnp.broadcast_to(bias, (rows, columns.size))


def multiply_block(
    x_ref: Any,
    expert: Experts,
    hidden_ref: Any,
    sums_ref: Any,
    activation: Activation,
    num_units: int,
    piece: int,
) -> None:
    """Add products of rows with the first hidden units of an expert's block to the sums.

    x_ref: [m, >= D]; expert: `Experts` of refs, biases [1, N]; hidden_ref: [m, F]; sums_ref:
    [m, >= D] f32.
    """
    d = expert.w_in.shape[0]

    def product(rows_ref: Any, rows: pl.Slice, w: Any, depth: int, columns: pl.Slice) -> Any:
        total: Any = 0
        for units in pieces(depth, piece):
            total += dot(rows_ref[rows, units], w[units, columns])
        return total

    for rows in pieces(x_ref.shape[0], piece):
        for columns in pieces(num_units, piece):
            found = []
            for weight, bias in expert.into():
                sums = product(x_ref, rows, weight, d, columns)
                found.append(sums if bias is None else sums + bias[:, columns].astype(jnp.float32))
            hidden = hidden_units(activation, *found)
            hidden_ref[rows, columns] = hidden.astype(hidden_ref.dtype)
        for columns in pieces(d, piece):
            sums_ref[rows, columns] += product(hidden_ref, rows, expert.w_out, num_units, columns)
