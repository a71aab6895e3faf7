"""expert_ffn over `Quantized` matrices: frozen, with gradients for rows and biases.

Forward it is the op itself, one kernel that reads 8-bit matrices. Backward it is the gradient of
the same network as grouped products, each of which reads the 8-bit matrices again, so that nothing
of theirs is kept or made larger. Matrices that quantise rows too (`Quantized.activations`) are
grouped products forward as well: a row of hidden units has to be whole before it has a scale.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from taskmoe.kernels.checks import accumulator
from taskmoe.kernels.grouped_matmul import grouped_product
from taskmoe.kernels.groups import Groups, of_each_row
from taskmoe.kernels.options import Experts, FFNOptions, ProductOptions, hidden_units
from taskmoe.kernels.platforms import Op, with_plain_settings
from taskmoe.kernels.quantized import quantises_rows


@with_plain_settings
def by_products(options: FFNOptions, x: jax.Array, experts: Experts, groups: Groups) -> jax.Array:
    """`expert_ffn` as grouped products: [M, D]."""
    acc = accumulator(x.dtype)

    def times(rows: jax.Array, w: Any, bias: jax.Array | None) -> jax.Array:
        product = ProductOptions(acc, w.shape[0], options.shifted, options.implementation)
        out = grouped_product(rows, w, groups, product)
        return out if bias is None else out + of_each_row(bias.astype(acc), groups, x.shape[0])

    hidden = hidden_units(options.activation, *(times(x, *into) for into in experts.into()))
    return times(hidden.astype(x.dtype), experts.w_out, experts.b_out).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def frozen_ffn(
    x: jax.Array, experts: Experts, groups: Groups, options: FFNOptions, op: Op
) -> jax.Array:
    """`expert_ffn` over `Quantized` matrices: [M, D]. op: that of the forward pass."""
    if quantises_rows(*experts[:3]):
        return by_products(options, x, experts, groups)
    return op(
        options, options.implementation, jax.ShapeDtypeStruct(x.shape, x.dtype), x, experts, groups
    )


def _forward(
    x: jax.Array, experts: Experts, groups: Groups, options: FFNOptions, op: Op
) -> tuple[jax.Array, tuple[Any, ...]]:
    return frozen_ffn(x, experts, groups, options, op), (x, experts, groups)


def _backward(
    options: FFNOptions, op: Op, residuals: tuple[Any, ...], grad: jax.Array
) -> tuple[Any, ...]:
    del op
    x, experts, groups = residuals
    matrices, biases = experts[:3], experts[3:]

    def run(x: jax.Array, biases: Any) -> jax.Array:
        return by_products(options, x, Experts(*matrices, *biases), groups)

    d_x, d_biases = jax.vjp(run, x, biases)[1](grad)
    return d_x, Experts(None, None, None, *d_biases), None


frozen_ffn.defvjp(_forward, _backward)
