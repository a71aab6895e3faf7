"""Encoder-decoder Transformer whose every other feed-forward layer is a mixture of experts.

Vaswani et al. 2017 with layer normalisation before each sub-layer (RMS, scale only), sinusoidal
positions and no biases; layers 1, 3, 5, ... (from 0) of each side hold the mixture (GShard,
section 2.1), or, on a dense side, a feed-forward layer of width `config.wide_d_ff(side)`. All
functions are pure; parameters are a pytree of arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from taskmoe import moe
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.attention import (
    attend,
    attend_cached,
    by_head,
    cross_key_value,
    qkv,
    query,
    rms_norm,
)
from taskmoe.wmt.model.cache import Cache
from taskmoe.wmt.model.products import logits_of, looked_up, transposed

Params = dict[str, Any]


class Tasks(NamedTuple):
    """Task ids of a batch on each side: [B] i32, or a scalar for a batch of one task.

    None on a side that is not task-routed.
    """

    encoder: ArrayLike | None
    decoder: ArrayLike | None


def init(key: jax.Array, config: ModelConfig) -> Params:
    """Fresh float32 parameters."""
    keys = iter(jax.random.split(key, 3 + 4 * (config.encoder_layers + config.decoder_layers)))
    d, v = config.d_model, config.vocab_size

    def matrix(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[0] ** -0.5

    def attention(names: tuple[str, ...]) -> Params:
        split = jax.random.split(next(keys), len(names) + 1)
        p: Params = {
            name: jax.random.normal(k, (d, width)) * d**-0.5
            for name, k, width in zip(
                names,
                split,
                [2 * d if n == "kv" else 3 * d if n == "qkv" else d for n in names],
                strict=False,
            )
        }
        return p | {"norm": jnp.ones(d), "out": jax.random.normal(split[-1], (d, d)) * d**-0.5}

    def feed_forward(side: str, index: int) -> Params:
        mixture = config.moe(side) if index % 2 else None
        if mixture is not None:
            return {"norm": jnp.ones(d), "moe": moe.init(next(keys), mixture)}
        width = config.wide_d_ff(side) if index % 2 else config.d_ff
        w_in, w_out = jax.random.split(next(keys))
        return {
            "norm": jnp.ones(d),
            "ffn": moe.FFNParams(
                w_in=jax.random.normal(w_in, (d, width)) * d**-0.5,
                w_out=jax.random.normal(w_out, (width, d)) * width**-0.5,
            ),
        }

    params: Params = {"embedding": matrix(v, d) * (v / d) ** 0.5}
    if not config.tie_embeddings:
        params["target_embedding"] = matrix(v, d) * (v / d) ** 0.5
        params["softmax"] = matrix(d, v)
    params["encoder"] = [
        {"attention": attention(("qkv",)), "feed_forward": feed_forward("encoder", i)}
        for i in range(config.encoder_layers)
    ]
    params["decoder"] = [
        {
            "attention": attention(("qkv",)),
            "cross": attention(("query", "kv")),
            "feed_forward": feed_forward("decoder", i),
        }
        for i in range(config.decoder_layers)
    ]
    params["encoder_norm"] = jnp.ones(d)
    params["decoder_norm"] = jnp.ones(d)
    return params


def param_count(params: Params) -> int:
    """Number of scalars in a tree of parameters (or of their shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def encode(
    params: Params,
    config: ModelConfig,
    source: jax.Array,
    valid: jax.Array,
    task: ArrayLike | None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    strategy: str = "auto",
    key: jax.Array | None = None,
    remat: bool = False,
    layer_fn: Callable[..., Any] = moe.apply,
) -> tuple[jax.Array, list[Any]]:
    """Encode source ids [B, S] i32 with valid [B, S] bool; returns [B, S, D] and metrics.

    The result has the parameters' dtype, f32 or bf16; norms and routing are f32 always.
    task: [B] i32 or scalar on a task-routed encoder, else None. mesh, strategy: as in `moe.apply`,
    for expert parallelism. key: of dropout; None is off. remat: gradients recompute what a layer
    does instead of keeping it (Chen et al. 2016, arXiv 1604.06174). layer_fn: runs a mixture and is
    called as `moe.apply` is; what it gives beside y stands in place of the metrics.
    """
    x = _embed(params["embedding"], source, jnp.arange(source.shape[1]))
    x, key = _drop_embedded(x, config, key)
    mask = valid[:, None, None, :]
    mixture = config.moe("encoder")
    apply = functools.partial(layer_fn, mesh=mesh, strategy=strategy)

    def run(layer: Params, x: jax.Array, key: jax.Array | None) -> Any:
        drop = _Dropout(config.dropout, key)
        q, k, v = qkv(layer["attention"], x, config)
        x = x + drop(attend(layer["attention"], q, k, v, mask))
        y, report = _feed_forward(layer["feed_forward"], mixture, x, valid, task, apply)
        return x + drop(y), report

    x, reports = _through(run, params["encoder"], x, key, remat)
    return rms_norm(x, params["encoder_norm"]), reports


def decode(
    params: Params,
    config: ModelConfig,
    memory: jax.Array,
    memory_valid: jax.Array,
    target: jax.Array,
    valid: jax.Array,
    task: ArrayLike | None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    strategy: str = "auto",
    key: jax.Array | None = None,
    remat: bool = False,
    layer_fn: Callable[..., Any] = moe.apply,
) -> tuple[jax.Array, list[Any]]:
    """Logits [B, L, V] f32 of the next token at each position of target ids [B, L], and metrics.

    memory, memory_valid: from `encode`. valid: [B, L] bool, target positions that count. task,
    mesh, strategy, key, remat, layer_fn: as in `encode`, of the decoder.
    """
    length = target.shape[1]
    x = _embed(_target_embedding(params), target, jnp.arange(length))
    x, key = _drop_embedded(x, config, key)
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    cross_mask = memory_valid[:, None, None, :]
    sentence = _sentence(config, memory, memory_valid)
    mixture = config.moe("decoder")
    apply = functools.partial(layer_fn, mesh=mesh, strategy=strategy)

    def run(layer: Params, x: jax.Array, key: jax.Array | None) -> Any:
        drop = _Dropout(config.dropout, key)
        q, k, v = qkv(layer["attention"], x, config)
        x = x + drop(attend(layer["attention"], q, k, v, causal))
        k, v = cross_key_value(layer["cross"], memory, config)
        x = x + drop(attend(layer["cross"], query(layer["cross"], x, config), k, v, cross_mask))
        y, report = _feed_forward(layer["feed_forward"], mixture, x, valid, task, apply, sentence)
        return x + drop(y), report

    x, reports = _through(run, params["decoder"], x, key, remat)
    return _logits(params, x), reports


def _through(
    run: Any, layers: list[Params], x: jax.Array, key: jax.Array | None, remat: bool
) -> tuple[jax.Array, list[moe.Metrics]]:
    """x through all layers, `x, reports = run(layer, x, key)` each, and all their reports."""
    if remat:
        run = jax.checkpoint(run)
    reports: list[moe.Metrics] = []
    for i, layer in enumerate(layers):
        x, report = run(layer, x, None if key is None else jax.random.fold_in(key, i))
        reports += report
    return x, reports


def start_cache(
    params: Params,
    config: ModelConfig,
    memory: jax.Array,
    memory_valid: jax.Array,
    length: int,
    *,
    beam: int = 1,
) -> Cache:
    """An empty cache for `length` target positions over the encoder's output [B, S, D].

    beam: hypotheses K of each sentence; they share what the encoder gave.
    """
    heads = config.num_heads
    batch = memory.shape[0]
    shape = (batch, heads, length * beam, config.d_model // heads)
    empty = tuple(jnp.zeros(shape, memory.dtype) for _ in params["decoder"])
    cross = [
        [by_head(x) for x in cross_key_value(layer["cross"], memory, config)]
        for layer in params["decoder"]
    ]
    sentence = _sentence(config, memory, memory_valid)
    ancestors = None if beam == 1 else jnp.zeros((batch, beam, length), jnp.int32)
    keys, values = (tuple(pair[i] for pair in cross) for i in range(2))
    return Cache(empty, empty, keys, values, sentence, jnp.int32(0), ancestors)


def decode_step(
    params: Params,
    config: ModelConfig,
    cache: Cache,
    memory_valid: jax.Array,
    token: jax.Array,
    position: jax.Array,
    task: ArrayLike | None,
    *,
    valid: jax.Array | None = None,
    mesh: jax.sharding.Mesh | None = None,
    strategy: str = "auto",
) -> tuple[jax.Array, Cache]:
    """One position of decoding: token ids [B*K] at `position` -> logits [B*K, V] f32.

    position: i32, a scalar or one a sentence [B], of those that the cache holds the last ones of.
    memory_valid: [B, S] bool; the K hypotheses of a sentence stand side by side in `token`.
    task: [B*K] i32 or scalar on a task-routed decoder, else None.
    valid: [B*K] bool, sequences that are still being decoded; others take no expert's time.
    mesh, strategy: as in `moe.apply`, for expert parallelism.
    Returns the logits and the cache with this position filled in.
    """
    sentences, beam, length = memory_valid.shape[0], cache.beam, cache.room
    at = jnp.repeat(position, beam)[:, None] if position.ndim else position[None]
    x = _embed(_target_embedding(params), token[:, None], at)
    seen = cache.seen(position)
    ancestors = cache.ancestors
    if ancestors is not None:
        own = jnp.broadcast_to(jnp.arange(beam, dtype=jnp.int32)[:, None], (sentences, beam, 1))
        ancestors = jax.lax.dynamic_update_slice_in_dim(ancestors, own, cache.column, 2)
        theirs = (ancestors[..., None] == jnp.arange(beam)) & seen[:, 0, ..., None]
        seen = theirs.reshape(sentences, 1, beam, length * beam)

    def together(x: jax.Array) -> jax.Array:
        """A sentence's hypotheses read the same keys: to attention they are its positions."""
        return x.reshape(sentences, beam, *x.shape[2:])

    cross_mask = memory_valid[:, None, None, :]
    alive = jnp.ones_like(token, bool) if valid is None else valid
    sentence = None
    if cache.sentence is not None:
        sentence = jnp.repeat(cache.sentence, beam, axis=0)
    keys, values = [], []
    for i, layer in enumerate(params["decoder"]):
        q, k, v = qkv(layer["attention"], x, config)
        k, v = by_head(together(k)), by_head(together(v))
        place = cache.column * beam
        keys.append(jax.lax.dynamic_update_slice_in_dim(cache.self_key[i], k, place, 2))
        values.append(jax.lax.dynamic_update_slice_in_dim(cache.self_value[i], v, place, 2))
        y = attend_cached(layer["attention"], together(q), keys[-1], values[-1], seen)
        x = x + y.reshape(x.shape)
        q = together(query(layer["cross"], x, config))
        y = attend_cached(layer["cross"], q, cache.cross_key[i], cache.cross_value[i], cross_mask)
        x = x + y.reshape(x.shape)
        mixture = config.moe("decoder")
        apply = functools.partial(moe.apply, mesh=mesh, strategy=strategy)
        y, _ = _feed_forward(
            layer["feed_forward"], mixture, x, alive[:, None], task, apply, sentence
        )
        x = x + y
    cache = cache._replace(
        self_key=tuple(keys),
        self_value=tuple(values),
        column=(cache.column + 1) % length,
        ancestors=ancestors,
    )
    return _logits(params, x)[:, 0], cache


class _Dropout:
    """Drops entries; hands out one key a call. Off without a key."""

    def __init__(self, rate: float, key: jax.Array | None) -> None:
        self.rate, self.key = rate, key if rate > 0 else None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.key is None:
            return x
        self.key, key = jax.random.split(self.key)
        keep = jax.random.bernoulli(key, 1 - self.rate, x.shape)
        return jnp.where(keep, x / (1 - self.rate), 0)


def _drop_embedded(
    x: jax.Array, config: ModelConfig, key: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """(Embeddings with dropout, the key of what comes after)."""
    if key is None:
        return x, None
    key, own = jax.random.split(key)
    return _Dropout(config.dropout, own)(x), key


def _embed(embedding: Any, ids: jax.Array, positions: jax.Array) -> jax.Array:
    """Scaled embeddings plus sinusoidal positions (Vaswani et al. 2017, 3.4, 3.5): [B, S, D]."""
    d = embedding.shape[1]
    found = looked_up(embedding, ids)
    return found * d**0.5 + position_waves(positions, d).astype(found.dtype)


def position_waves(positions: jax.Array, width: int) -> jax.Array:
    """What is added to embeddings at positions [...]: all sines, then all cosines, [..., width]."""
    rate = jnp.exp(jnp.arange(0, width, 2) * (-jnp.log(10000.0) / width))
    angle = positions[..., None] * rate
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def with_softmax(params: Params) -> Params:
    """The same parameters with a softmax matrix [D, V] of its own.

    For loops over `decode_step`: a tied embedding is transposed once, not at each step.
    """
    return params if "softmax" in params else params | {"softmax": transposed(params["embedding"])}


def _target_embedding(params: Params) -> Any:
    return params["target_embedding" if "target_embedding" in params else "embedding"]


def _logits(params: Params, x: jax.Array) -> jax.Array:
    x = rms_norm(x, params["decoder_norm"])
    return logits_of(x, with_softmax(params)["softmax"])


def _sentence(config: ModelConfig, memory: jax.Array, valid: jax.Array) -> jax.Array | None:
    """Mean of the encoder's output [B, D], by which a sentence-routed decoder gates.

    The mean of the target's own tokens would let a position see those to come, and does not exist
    yet while decoding.
    """
    if config.decoder != "sentence":
        return None
    total = jnp.sum(jnp.where(valid[..., None], memory, 0), axis=1)
    return total / jnp.maximum(valid.sum(axis=1, keepdims=True), 1)


def _feed_forward(
    p: Params,
    mixture: moe.MoEConfig | None,
    x: jax.Array,
    valid: jax.Array,
    task: ArrayLike | None,
    apply: Callable[..., Any],
    sentence: jax.Array | None = None,
) -> tuple[jax.Array, list[Any]]:
    """The feed-forward branch, dense or mixture run by `apply`, and the metrics of a mixture."""
    x = rms_norm(x, p["norm"])
    if "ffn" in p:
        return moe.ffn(p["ffn"], x), []
    assert mixture is not None  # the parameters were made by the same configuration
    y, report = apply(p["moe"], mixture, x, valid=valid, task=task, sentence=sentence)
    return y, [report]
