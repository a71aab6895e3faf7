"""What an op works with, and what is fixed when it is traced.

Options are hashable, so that equal calls share what was compiled.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax

from taskmoe.kernels.tiling import Tiling

Activation = Literal["relu", "gelu", "silu"]
ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


class Experts(NamedTuple):
    """Matrices of E experts: w_in [E, D, F], w_out [E, F, D], and w_gate [E, D, F] where gated."""

    w_in: jax.Array
    w_out: jax.Array
    w_gate: jax.Array | None = None


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
