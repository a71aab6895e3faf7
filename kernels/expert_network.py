"""Expert feed-forward networks over rows sorted by expert.

    out[i] = act(x[i] W_in[g(i)]) W_out[g(i)]
    out[i] = (act(x[i] W_gate[g(i)]) * (x[i] W_in[g(i)])) W_out[g(i)]     gated (SwiGLU and kin)

The Pallas kernel's backward recomputes the hidden activations; the other implementations keep what
comes before the activation, [M, F] in f32, under the name HIDDEN. Results are named OUT. Policies
of `jax.checkpoint` see both names, so that a layer that is recomputed need not multiply again.
Shazeer 2020, GLU variants (arXiv 2002.05202).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from taskmoe.kernels import ragged_products
from taskmoe.kernels.checks import (
    accumulator,
    as_floats,
    check_shape,
    match_varying,
    zeros_like_all,
)
from taskmoe.kernels.ffn_backward_kernel import expert_ffn_backward_mosaic
from taskmoe.kernels.ffn_backward_tiling import is_split
from taskmoe.kernels.ffn_kernel import expert_ffn_mosaic
from taskmoe.kernels.ffn_tiling import FFNSizes
from taskmoe.kernels.frozen_experts import frozen_ffn
from taskmoe.kernels.grouped_matmul import gmm_reference
from taskmoe.kernels.groups import Groups, check_groups
from taskmoe.kernels.hidden_gradients_kernel import expert_ffn_backward_split
from taskmoe.kernels.options import (
    Activation,
    Experts,
    FFNOptions,
    ProductOptions,
    check_activation,
    hidden_units,
)
from taskmoe.kernels.platforms import Op, check_implementation, with_plain_settings
from taskmoe.kernels.quantized import Quantized, as_weights, quantises_rows
from taskmoe.kernels.tiled_ffn import (
    expert_ffn_backward_xla,
    expert_ffn_keeping_xla,
    expert_ffn_xla,
)
from taskmoe.kernels.tiling import Tiling, check_tiling

HIDDEN, OUT = "taskmoe_expert_hidden", "taskmoe_expert_out"


@with_plain_settings
def expert_ffn_reference(
    options: FFNOptions,
    x: jax.Array,
    experts: Experts,
    groups: Groups,
) -> jax.Array:
    """The definition of `expert_ffn`."""
    acc = accumulator(x.dtype)

    def times(rows: jax.Array, matrices: Any, bias: jax.Array | None) -> jax.Array:
        product = ProductOptions(acc, matrices.shape[0], options.shifted, None)
        out = gmm_reference(product, rows, matrices, groups)
        if bias is None:
            return out
        return out + gmm_reference(product, jnp.ones_like(rows[:, :1]), bias[:, None], groups)

    hidden = hidden_units(options.activation, *(times(x, *into) for into in experts.into()))
    return times(hidden.astype(x.dtype), experts.w_out, experts.b_out).astype(x.dtype)


def _keeping_mosaic(
    options: FFNOptions, x: jax.Array, experts: Experts, groups: Groups
) -> tuple[jax.Array, list[jax.Array]]:
    """Nothing is kept: the zeros that stand for it are never read, and XLA drops them."""
    nothing = jnp.zeros((x.shape[0], experts.w_in.shape[2]), x.dtype)
    return expert_ffn_mosaic(options, x, experts, groups), [nothing] * _products(experts)


def _backward_mosaic(
    options: FFNOptions, x: jax.Array, experts: Experts, groups: Groups, _: Any, grad: jax.Array
) -> tuple[jax.Array, Experts]:
    split = is_split(FFNSizes.of(x, experts))
    run = expert_ffn_backward_split if split else expert_ffn_backward_mosaic
    return run(options, x, experts, groups, grad)


def _products(experts: Experts) -> int:
    """Products before the activation."""
    return 1 if experts.w_gate is None else 2


EXPERT_FFN = Op(
    "expert_ffn",
    reference=expert_ffn_reference,
    xla=expert_ffn_xla,
    mosaic=expert_ffn_mosaic,
    ragged_dot=lambda *args: ragged_products.expert_ffn(*args)[0],
    mosaic_gpu=lambda *args: ragged_products.expert_ffn(*args)[0],
    tokamax=lambda *args: ragged_products.expert_ffn(*args)[0],
)
EXPERT_FFN_KEEPING = Op(
    "expert_ffn_keeping",
    xla=expert_ffn_keeping_xla,
    mosaic=_keeping_mosaic,
    ragged_dot=ragged_products.expert_ffn,
    mosaic_gpu=ragged_products.expert_ffn,
    tokamax=ragged_products.expert_ffn,
)
EXPERT_FFN_BACKWARD = Op(
    "expert_ffn_backward",
    xla=expert_ffn_backward_xla,
    mosaic=_backward_mosaic,
    ragged_dot=ragged_products.expert_ffn_backward,
    mosaic_gpu=ragged_products.expert_ffn_backward,
    tokamax=ragged_products.expert_ffn_backward,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _expert_ffn(x: jax.Array, experts: Experts, groups: Groups, options: FFNOptions) -> jax.Array:
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return EXPERT_FFN(options, options.implementation, out, x, experts, groups)


def _expert_ffn_forward(
    x: jax.Array, experts: Experts, groups: Groups, options: FFNOptions
) -> tuple[jax.Array, tuple[Any, ...]]:
    hidden = jax.ShapeDtypeStruct((x.shape[0], experts.w_in.shape[2]), x.dtype)
    results = jax.ShapeDtypeStruct(x.shape, x.dtype), [hidden] * _products(experts)
    out, kept = EXPERT_FFN_KEEPING(options, options.implementation, results, x, experts, groups)
    return checkpoint_name(out, OUT), (x, experts, groups, checkpoint_name(kept, HIDDEN))


def _expert_ffn_backward(
    options: FFNOptions, residuals: tuple[Any, ...], grad: jax.Array
) -> tuple[Any, ...]:
    results = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), residuals[:2])
    return *EXPERT_FFN_BACKWARD(options, options.implementation, results, *residuals, grad), None


_expert_ffn.defvjp(_expert_ffn_forward, _expert_ffn_backward)


def expert_ffn(
    x: jax.Array,
    w_in: jax.Array | Quantized,
    w_out: jax.Array | Quantized,
    group_sizes: jax.Array,
    *,
    activation: Activation = "relu",
    w_gate: jax.Array | Quantized | None = None,
    b_in: jax.Array | None = None,
    b_out: jax.Array | None = None,
    b_gate: jax.Array | None = None,
    group_offset: int | jax.Array | None = None,
    tiling: Tiling | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Run each group of rows through its expert's feed-forward network.

        out[i] = act(x[i] W_in) W_out,  or gated  (act(x[i] W_gate) * (x[i] W_in)) W_out

    with biases added to the products, where they are given.

    x: [M, D] bf16|f32, rows sorted by expert.
    w_in: [E, D, F], same dtype; or every matrix is a `Quantized`, which gets no gradient: x and
      biases get theirs as from what the matrices stand for.
    w_out: [E, F, D], same dtype.
    group_sizes: [G] i32, rows of each expert; negative counts as 0, rows past M are cut off.
    activation: "relu", "gelu" (tanh form) or "silu", taken in f32; with w_gate also "gpt_oss" and
      "deepseek_v4", which clamp both; or a function of f32 arrays, act(x W_in), or with w_gate
      act(x W_gate, x W_in), of operations that Pallas knows where it is to run on TPU. Another
      function is another program.
    w_gate: [E, D, F] or None; the activation is on x W_gate (silu: SwiGLU, gelu: GeGLU).
    b_in, b_out, b_gate: [E, F], [E, D], [E, F] or None, added to x W_in, to the result and to
      x W_gate. They reach the rows of their experts alone.
    group_offset: scalar i32, the group that w_in[0] belongs to; None means 0 and wants E == G.
    tiling: a `Tiling` (m rows, k = D, n hidden units) that overrides the forward kernel's choice of
      block sizes ("mosaic" only).
    implementation: "mosaic" (Pallas TPU), "mosaic_gpu", "ragged_dot", "tokamax", "xla", "reference"
      or None (by the platform that is lowered for, see `taskmoe.kernels.platforms`).

    Returns [M, D] in x's dtype; hidden activations are rounded to x's dtype before W_out. Rows past
    sum(group_sizes) and of experts that are not held are zero, whatever x holds there; gradients of
    experts without rows are zero. Raises ValueError or TypeError where an argument does not fit.

    Shazeer 2020 (arXiv 2002.05202) for the gated forms; Gale et al. 2022 (arXiv 2211.15841).
    """
    x = as_floats("x", x)
    check_shape("x", x, ("M", "D"))
    if len({isinstance(w, Quantized) for w in (w_in, w_out, w_gate) if w is not None}) > 1:
        raise TypeError("w_in, w_out and w_gate must all be Quantized, or none of them")
    w_in = as_weights("w_in", w_in, ("x", x))
    check_shape("w_in", w_in, ("E", x.shape[1], "F"))
    num_groups, _, hidden = w_in.shape
    w_out = as_weights("w_out", w_out, ("x", x))
    check_shape("w_out", w_out, (num_groups, hidden, x.shape[1]))
    if w_gate is not None:
        w_gate = as_weights("w_gate", w_gate, ("x", x))
        check_shape("w_gate", w_gate, w_in.shape)
    check_activation(activation, w_gate is not None)
    if b_gate is not None and w_gate is None:
        raise ValueError("b_gate must be None without w_gate")
    biases = {"b_in": (b_in, hidden), "b_out": (b_out, x.shape[1]), "b_gate": (b_gate, hidden)}
    given = {name: as_floats(name, b, ("x", x)) for name, (b, _) in biases.items() if b is not None}
    for name, bias in given.items():
        check_shape(name, bias, (num_groups, biases[name][1]))
    groups = check_groups(group_sizes, group_offset, num_groups, "w_in.shape[0]")
    if tiling is not None and quantises_rows(w_in, w_out, w_gate):
        raise ValueError("tiling must be None where matrices quantise rows: each product has one")
    check_tiling(tiling, x.shape[1], hidden, x.dtype.itemsize)
    if tiling is not None and tiling.k != x.shape[1]:
        raise ValueError(f"tiling.k must be D={x.shape[1]} in expert_ffn, got {tiling.k}")
    check_implementation(implementation)
    options = FFNOptions(activation, group_offset is not None, implementation, tiling)
    leaves, tree = jax.tree.flatten((x, Experts(w_in, w_out, w_gate, **given), groups))
    operands = jax.tree.unflatten(tree, match_varying(*leaves))
    if 0 in (*x.shape, *w_in.shape):
        return zeros_like_all(x.shape, x.dtype, *leaves)
    if isinstance(w_in, Quantized):
        return frozen_ffn(*operands, options, EXPERT_FFN)
    if implementation == "reference":
        return expert_ffn_reference(options, *operands)
    return _expert_ffn(*operands, options)
