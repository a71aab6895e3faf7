"""Cut a token-routed model down to the experts that matter most to a text: extraction's rival.

Experts are scored by load (Koishekenov et al. 2022, Memory-efficient NLLB-200, arXiv 2212.09811) or
by gate weight times output norm (Lasby et al. 2025, REAP the Experts, arXiv 2510.13999). Nothing is
trained; unlike a task's sub-network the result says something else than the whole model wherever
the router would have chosen an expert that is gone, and it still needs its router.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskmoe import moe
from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import TASK_LEVELS, ModelConfig, split_pair
from taskmoe.wmt.model.saved import Model
from taskmoe.wmt.model.transformer import Params, decode, encode
from taskmoe.wmt.text.folders import Pairs
from taskmoe.wmt.text.tokenizer import BOS, PAD

Usage = dict[str, list[np.ndarray]]
_MULTIPLE = 16  # lengths are padded up to a multiple, so that few shapes are compiled


def expert_usage(model: Model, text: Pairs, *, batch: int = 64) -> Usage:
    """Share of the assignments that each expert gets on a text, targets given.

    batch: sentences at once. Returns for each side, "encoder" and "decoder", one [E] f64 a mixture,
    in the order of the layers. Raises InputError where no side routes tokens or sentences.
    """
    return _means(model, text, batch, _loaded)


def expert_saliency(model: Model, text: Pairs, *, batch: int = 64) -> Usage:
    """Mean over an expert's tokens of gate weight times output norm, on a text, targets given.

    S_e = 1/|X_e| sum_{x in X_e} g_e(x) * ||FFN_e(x)||_2, X_e the tokens that are routed to e and
    g_e(x) its weight among the top k (Lasby et al. 2025, REAP the Experts, arXiv 2510.13999).
    Padding counts nowhere, a limited capacity drops nothing here, and an expert without tokens
    has 0.
    As `expert_usage` otherwise. An expert that few tokens choose may be high: the score is a mean.
    """
    return _means(model, text, batch, _weighed)


#: What experts are ranked by -> its measurement.
CRITERIA = {"load": expert_usage, "reap": expert_saliency}


def prune(model: Model, usage: Usage, keep: int) -> Model:
    """The model with the `keep` highest experts of each mixture, by one of `CRITERIA`.

    Raises InputError where no side routes tokens or sentences or `keep` is out of range.
    """
    config = model.config
    check_prunable(config)
    params = dict(model.params)
    for side in ("encoder", "decoder"):
        mixture = config.moe(side)
        if mixture is None:
            continue
        loads = iter(usage[side])
        try:
            params[side] = [_fewer(layer, mixture, loads, keep) for layer in params[side]]
        except ValueError as error:
            raise InputError(str(error)) from None
    return Model(params, dataclasses.replace(config, num_experts=keep), model.tokenizer)


def check_prunable(config: ModelConfig) -> None:
    """Raise InputError unless a side routes tokens or sentences and none routes by task."""
    sides = {"encoder": config.encoder, "decoder": config.decoder}
    if any(level in (*TASK_LEVELS, "static") for level in sides.values()):
        raise InputError(
            f"prune is for token-routed models (encoder is {config.encoder}, decoder is "
            f"{config.decoder}): extract a task first, which loses nothing, then prune the rest"
        )
    if set(sides.values()) == {"dense"}:
        raise InputError("nothing to prune: the model has no mixture")


def _fewer(layer: Params, mixture: moe.MoEConfig, loads: Any, keep: int) -> Params:
    if "moe" not in layer["feed_forward"]:
        return layer
    small, _ = moe.prune(layer["feed_forward"]["moe"], mixture, next(loads), keep)
    return layer | {"feed_forward": layer["feed_forward"] | {"moe": small}}


def _padded(sequences: list[list[int]], rows: int, width: int) -> np.ndarray:
    out = np.full((rows, width), PAD, np.int32)
    for row, ids in enumerate(sequences):
        out[row, : len(ids)] = ids
    return out


def _means(model: Model, text: Pairs, batch: int, layer_fn: Any) -> Usage:
    """Sums over sums of what `layer_fn` counts in each mixture over all of a text."""
    check_prunable(model.config)
    totals: dict[str, list[Any]] = {"encoder": [], "decoder": []}
    for source, target in _batches(model, text, batch):
        for side, counted in _forward(model.params, model.config, source, target, layer_fn).items():
            wide = [[np.asarray(x, np.float64) for x in pair] for pair in counted]
            before = totals[side] or [(0.0, 0.0)] * len(wide)
            totals[side] = [(a + c, b + d) for (a, b), (c, d) in zip(before, wide, strict=True)]
    return {side: [s / np.maximum(n, 1.0) for s, n in found] for side, found in totals.items()}


def _batches(model: Model, text: Pairs, batch: int) -> Iterator[list[np.ndarray]]:
    """Source and target ids of `batch` sentences at once, [batch, S] and [batch, S] i32, padded."""
    for pair, (sources, targets) in text.items():
        source = model.tokenizer.encode_source(sources, split_pair(pair)[1])
        target = model.tokenizer.encode_target(targets)
        order = np.argsort([max(len(a), len(b)) for a, b in zip(source, target, strict=True)])
        for at in range(0, len(order), batch):
            rows = order[at : at + batch]
            width = max(max(len(source[i]), len(target[i])) for i in rows)
            width = -(-width // _MULTIPLE) * _MULTIPLE
            yield [_padded([ids[i] for i in rows], batch, width) for ids in (source, target)]


def _loaded(
    params: Params, config: moe.MoEConfig, x: jax.Array, *, valid: jax.Array, **rest: Any
) -> Any:
    """A mixture's output, with its experts' assignments [E] and [], those of all of them."""
    y, report = moe.apply(params, config, x, valid=valid, **rest)
    units = jnp.sum(valid if config.routing == "token" else valid.any(axis=1))
    return y, (report.load * units, units)


def _weighed(
    params: Params, config: moe.MoEConfig, x: jax.Array, *, valid: jax.Array, **rest: Any
) -> Any:
    """A mixture's output, with sums [E] of gate weight times output norm and counts [E] of tokens.

    The first choices are computed alone, without their weights, then the second ones, and so on.
    """
    y, _, chosen = moe.apply(params, config, x, valid=valid, return_chosen=True, **rest)
    if config.routing == "sentence":  # all its tokens go where it goes
        each = (*x.shape[:2], config.top_k)
        chosen = jax.tree.map(lambda a: jnp.broadcast_to(a[:, None], each), chosen)
    alone = dataclasses.replace(config, routing="given", top_k=1, capacity_factor=None)
    sums = counts = jnp.zeros(config.num_experts)
    for choice in range(config.top_k):
        experts = chosen.experts[..., choice : choice + 1]
        output, _ = moe.apply(
            params, alone, x, valid=valid, experts=experts, weights=jnp.ones(experts.shape)
        )
        norms = jnp.linalg.norm(output.astype(jnp.float32), axis=-1)
        weighed = jnp.where(valid, chosen.weights[..., choice] * norms, 0)
        sums = sums.at[experts[..., 0]].add(weighed, mode="drop")
        counts = counts.at[experts[..., 0]].add(valid.astype(jnp.float32), mode="drop")
    return y, (sums, counts)


@functools.partial(jax.jit, static_argnums=(1, 4))
def _forward(
    params: Params, config: ModelConfig, source: jax.Array, target: jax.Array, layer_fn: Any
) -> dict[str, Any]:
    """What `layer_fn` counts in each mixture of both sides, of one batch."""
    valid, wanted = source != PAD, target != PAD
    begin = jnp.full((target.shape[0], 1), BOS, target.dtype)
    shifted = jnp.concatenate([begin, target[:, :-1]], axis=1)
    memory, first = encode(params, config, source, valid, None, layer_fn=layer_fn)
    _, second = decode(params, config, memory, valid, shifted, wanted, None, layer_fn=layer_fn)
    return {"encoder": first, "decoder": second}
