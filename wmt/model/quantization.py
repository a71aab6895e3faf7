"""A model whose matrices are int8: a quarter of float32's bytes, for serving.

Every matrix has a scale for each of its columns, and embeddings one for each word; norms stay as
they are. Rows that meet a matrix are quantised as they come, a scale a row, and products of int8
are summed in int32 (Jacob et al. 2018, arXiv 1712.05877, with scales as in Wu et al. 2020, arXiv
2004.09602).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from taskmoe import moe
from taskmoe.cli.errors import InputError
from taskmoe.kernels.quantized import Quantized, QuantizedRows, quantize
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.transformer import Params


def checked_quantized(params: Params, config: ModelConfig) -> Params:
    """As `quantized`, of a dense model or a sub-network.

    Raises InputError where a side is routed (a task's sub-network is what is served) or the
    parameters are quantised already.
    """
    if {config.encoder, config.decoder} != {"dense"}:
        raise InputError(
            f"quantize wants a dense model (encoder is {config.encoder}, decoder is "
            f"{config.decoder}): extract a task first"
        )
    if is_quantized(params):
        raise InputError("the model is quantised already")
    return quantized(params)


def is_quantized(params: Params) -> bool:
    """Whether these are what `quantized` makes."""
    return isinstance(params["embedding"], QuantizedRows)


def quantized(params: Params) -> Params:
    """Parameters of a dense model with every matrix in int8."""
    tables = {n: _by_row(params[n]) for n in ("embedding", "target_embedding") if n in params}
    softmax = {"softmax": _by_column(params["softmax"])} if "softmax" in params else {}
    sides = {side: [_layer(p) for p in params[side]] for side in ("encoder", "decoder")}
    return params | tables | softmax | sides


def _layer(p: Params) -> Params:
    small = {
        name: {n: w if n == "norm" else _by_column(w) for n, w in p[name].items()}
        for name in ("attention", "cross")
        if name in p
    }
    own = p["feed_forward"]
    return small | {"feed_forward": own | {"ffn": _feed_forward(own["ffn"])}}


def _feed_forward(ffn: moe.FFNParams) -> moe.FFNParams:
    return dataclasses.replace(ffn, w_in=_by_column(ffn.w_in), w_out=_by_column(ffn.w_out))


def _by_column(w: Any) -> Quantized:
    return quantize(w, activations="int8")


def _by_row(table: Any) -> QuantizedRows:
    """A table [V, D] with a scale a row."""
    found = quantize(table.T)
    return QuantizedRows(found.values.T, found.scales[0].T)
