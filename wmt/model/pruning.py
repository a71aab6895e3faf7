"""Cut a token-routed model down to the experts that a text uses most: extraction's rival.

Koishekenov et al. 2022, Memory-efficient NLLB-200 (arXiv 2212.09811). Nothing is trained; unlike a
task's sub-network the result says something else than the whole model wherever the router would
have chosen an expert that is gone, and it still needs its router.
"""

from __future__ import annotations

import dataclasses
import functools
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
    config = model.config
    check_prunable(config)
    totals: dict[str, list[np.ndarray]] = {"encoder": [], "decoder": []}
    weights = {"encoder": 0.0, "decoder": 0.0}
    for pair, (sources, targets) in text.items():
        language = split_pair(pair)[1]
        source = model.tokenizer.encode_source(sources, language)
        target = model.tokenizer.encode_target(targets)
        order = np.argsort([max(len(a), len(b)) for a, b in zip(source, target, strict=True)])
        for at in range(0, len(order), batch):
            rows = order[at : at + batch]
            width = max(max(len(source[i]), len(target[i])) for i in rows)
            width = -(-width // _MULTIPLE) * _MULTIPLE
            filled = [_padded([ids[i] for i in rows], batch, width) for ids in (source, target)]
            for side, loads, weight in _loads(model.params, config, *filled):
                previous = totals[side] or [np.zeros(len(loads[0]))] * len(loads)
                totals[side] = [
                    p + np.asarray(x) * weight for p, x in zip(previous, loads, strict=True)
                ]
                weights[side] += float(weight)
    return {side: [t / max(weights[side], 1.0) for t in layers] for side, layers in totals.items()}


def prune(model: Model, usage: Usage, keep: int) -> Model:
    """The model with the `keep` busiest experts of each mixture, by `expert_usage`.

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


def _loads(
    params: Params, config: ModelConfig, source: np.ndarray, target: np.ndarray
) -> list[tuple[str, list[jax.Array], jax.Array]]:
    """(side, loads [E] of its mixtures, units they were shares of) of one batch."""
    first, second = _forward(params, config, source, target)
    counts = {
        "token": {"encoder": (source != PAD).sum(), "decoder": (target != PAD).sum()},
        "sentence": dict.fromkeys(("encoder", "decoder"), (source != PAD).any(axis=1).sum()),
    }
    found = []
    for side, loads in (("encoder", first), ("decoder", second)):
        if loads:
            found.append((side, loads, counts[getattr(config, side)][side]))
    return found


@functools.partial(jax.jit, static_argnums=1)
def _forward(params: Params, config: ModelConfig, source: jax.Array, target: jax.Array) -> Any:
    valid, wanted = source != PAD, target != PAD
    begin = jnp.full((target.shape[0], 1), BOS, target.dtype)
    shifted = jnp.concatenate([begin, target[:, :-1]], axis=1)
    memory, first = encode(params, config, source, valid, None)
    _, second = decode(params, config, memory, valid, shifted, wanted, None)
    return [r.load for r in first], [r.load for r in second]
