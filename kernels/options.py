"""What an op works with, and what is fixed when it is traced.

Options are hashable, so that equal calls share what was compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from taskmoe.kernels.tiling import Tiling

#: A name in ACTIVATIONS, or in GATED_ACTIVATIONS for gated experts; or a function of the
#: pre-activations: of x W_in, and of x W_gate and x W_in where experts are gated.
Activation = str | Callable[..., jax.Array]
#: Of x W_in, or gated act(x W_gate) * (x W_in). "gelu" is the tanh form.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}


def _gpt_oss(gate: jax.Array, up: jax.Array) -> jax.Array:
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


def _deepseek_v4(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(jnp.minimum(gate, 10.0)) * jnp.clip(up, -10.0, 10.0)


#: Of x W_gate and x W_in, by the model that has them.
GATED_ACTIVATIONS = {"gpt_oss": _gpt_oss, "deepseek_v4": _deepseek_v4}


def check_activation(activation: Any, gated: bool) -> None:
    """ValueError that names the activation unless experts of this kind can have it."""
    known = [*ACTIVATIONS, *(GATED_ACTIVATIONS if gated else ())]
    if not callable(activation) and activation not in known:
        more = "" if gated else " ({} want gated experts)".format(", ".join(GATED_ACTIVATIONS))
        raise ValueError(
            f"activation must be one of {', '.join(map(repr, known))} or a function{more}, got "
            f"{activation!r}"
        )


def hidden_units(activation: Activation, up: jax.Array, gate: jax.Array | None = None) -> jax.Array:
    """Hidden units of what comes before the activation: x W_in, and x W_gate where gated."""
    if callable(activation):
        return activation(up) if gate is None else activation(gate, up)
    if gate is None:
        return ACTIVATIONS[activation](up)
    if activation in GATED_ACTIVATIONS:
        return GATED_ACTIVATIONS[activation](gate, up)
    return ACTIVATIONS[activation](gate) * up


class Experts(NamedTuple):
    """E experts: w_in [E, D, F], w_out [E, F, D], and w_gate [E, D, F] where they are gated.

    All matrices are arrays, or all `Quantized`.
    b_in [E, F], b_out [E, D], b_gate [E, F]: what is added to their products, where they have it.
    """

    w_in: Any
    w_out: Any
    w_gate: Any = None
    b_in: jax.Array | None = None
    b_out: jax.Array | None = None
    b_gate: jax.Array | None = None

    def into(self) -> list[tuple[Any, jax.Array | None]]:
        """Matrices and biases before the activation."""
        first = [(self.w_in, self.b_in)]
        return first if self.w_gate is None else [*first, (self.w_gate, self.b_gate)]


@dataclasses.dataclass(frozen=True)
class ProductOptions:
    """Of gmm and tgmm.

    out_dtype: of the result. num_groups: E. shifted: whether the first local group may be another
    than group 0. transpose_rhs: of gmm.
    """

    out_dtype: Any
    num_groups: int
    shifted: bool
    implementation: str | None
    transpose_rhs: bool = False
    tiling: Tiling | None = None


@dataclasses.dataclass(frozen=True)
class FFNOptions:
    """Of expert_ffn. shifted: as in `ProductOptions`."""

    activation: Activation
    shifted: bool
    implementation: str | None
    tiling: Tiling | None = None
