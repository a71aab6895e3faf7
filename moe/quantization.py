"""Layers whose experts are 8 bits: half the memory of bfloat16, and half the bytes of a step."""

from __future__ import annotations

from typing import Any

from taskmoe.kernels import quantized
from taskmoe.moe.parameters import Params

#: Parameters that are quantised.
MATRICES = ("w_in", "w_gate", "w_out")


def quantize(
    params: Params, dtype: Any = "int8", block: int | None = None, activations: str | None = None
) -> Params:
    """Parameters whose experts' matrices are `taskmoe.kernels.Quantized`; all else is the same.

    params: of one layer, as `init` makes them, or several such layers along a first axis.
    dtype: "int8" or "float8_e4m3fn".
    block: rows of a matrix that share a scale, a multiple of 128 that divides D and F; None gives
      every column one.
    activations: None, or "int8" to quantise the rows that meet the matrices as well.

    `apply`, `extract`, `extract_tasks`, `prune` and `ffn` take the result, whose matrices are
    frozen and have no gradient; inputs, gates, biases and embeddings have theirs. Raises ValueError
    or TypeError where an argument does not fit.
    """
    found = {name: params[name] for name in MATRICES if name in params}
    if isinstance(next(iter(found.values()), None), quantized.Quantized):
        raise TypeError("params are quantised already")
    small = {name: quantized.quantize(w, dtype, block, activations) for name, w in found.items()}
    return {**params, **small}
