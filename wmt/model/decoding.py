"""Greedy and beam search with a key-value cache, one compiled loop that ends when all have ended.

Beam search keeps `beam` live and `beam` ended hypotheses a sentence and ranks the ended ones by
`log p / ((5 + length) / 6)^alpha` (Wu et al. 2016, equation 14). A sentence stops once no live
hypothesis can overtake its best ended one.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.cache import Cache
from taskmoe.wmt.model.ranking import best_continuations
from taskmoe.wmt.model.subnetwork import one_task
from taskmoe.wmt.model.transformer import (
    Params,
    Tasks,
    decode_step,
    encode,
    most_likely,
    start_cache,
    with_softmax,
)
from taskmoe.wmt.text.tokenizer import BOS, EOS, PAD

MULTIPLE = 16  # source lengths are padded up to a multiple, so that few shapes are compiled
_MOST_ALPHA = 10.0  # a length penalty beyond means nothing, and overflows
_NEVER = -1e9  # log probability of what must not be chosen; finite, so that sums stay numbers


def length_limit(tokens: Any) -> Any:
    """Target positions for a sentence of so many source tokens: twice as many, padded, plus 16."""
    return 2 * (-(-tokens // MULTIPLE) * MULTIPLE) + 16


def check_alpha(alpha: float) -> None:
    """Raise ValueError for a length penalty that is out of range."""
    if not 0 <= alpha <= _MOST_ALPHA:  # nan is not, either
        raise ValueError(f"alpha must be in [0, {_MOST_ALPHA:.0f}], got alpha={alpha}")


def search(
    params: Params,
    config: ModelConfig,
    source: jax.Array,
    tasks: Tasks,
    *,
    max_length: int,
    beam: int = 1,
    alpha: float = 0.6,
    limit: jax.Array | None = None,
    mesh: jax.sharding.Mesh | None = None,
    strategy: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Translate padded source ids [B, S] i32: the best hypothesis of `search_n_best`.

    Returns ids [B, max_length] i32 (PAD after `</s>`) and scores [B] f32.
    """
    ids, scores = search_n_best(
        params, config, source, tasks, max_length=max_length, beam=beam, alpha=alpha, limit=limit,
        mesh=mesh, strategy=strategy,
    )  # fmt: skip
    return ids[:, 0], scores[:, 0]


def search_n_best(
    params: Params,
    config: ModelConfig,
    source: jax.Array,
    tasks: Tasks,
    *,
    max_length: int,
    beam: int = 1,
    alpha: float = 0.6,
    n_best: int = 1,
    limit: jax.Array | None = None,
    mesh: jax.sharding.Mesh | None = None,
    strategy: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Translate padded source ids [B, S] i32.

    max_length: target positions at most, `</s>` included (static). beam: hypotheses; 1 is greedy.
    alpha: strength of the length penalty. n_best: hypotheses to return, from 1 to beam.
    limit: [B] i32 of positions that each sentence has, from 1 to max_length; None is max_length.
    mesh, strategy: as in `moe.apply`, for expert parallelism. tasks: scalar tasks run as their
    sub-network.
    Returns ids [B, n_best, max_length] i32 (PAD after `</s>`), best first, and scores [B, n_best]
    f32 (log probability, with a beam divided by the length penalty). A row of only padding ends at
    once. Where fewer hypotheses ended in time the rest are empty, with a score below -1e8.
    Raises ValueError where beam or max_length is below 1, or alpha or n_best out of range.
    """
    if beam < 1 or max_length < 1:
        raise ValueError(
            f"beam and max_length must be at least 1, got beam={beam}, max_length={max_length}"
        )
    check_alpha(alpha)
    if not 1 <= n_best <= beam:
        raise ValueError(f"n_best must be in [1, beam={beam}], got n_best={n_best}")
    params, config, tasks = one_task(params, config, tasks)
    params = with_softmax(params)
    valid = source != PAD
    on = Spread(mesh, strategy)
    memory, _ = encode(params, config, source, valid, tasks.encoder, **on._asdict())
    if beam == 1:
        ids, score = _greedy(params, config, memory, valid, tasks.decoder, max_length, limit, on)
        return ids[:, None], score[:, None]
    search = beam, alpha, n_best
    return _beam(params, config, memory, valid, tasks.decoder, max_length, limit, search, on)


def _stages(max_length: int) -> list[int]:
    """Positions that the cache has room for, in turn: attention reads no more than twice what is.

    Each stage is compiled by itself, so they are few.
    """
    if max_length <= 32:
        return [max_length]
    return [-(-max_length // 4), -(-max_length // 2), max_length]


class Spread(NamedTuple):
    """Where the experts lie, and how rows travel to them, as in `moe.apply`."""

    mesh: jax.sharding.Mesh | None = None
    strategy: str = "auto"


#: On one device.
HERE = Spread()


class _Greedy(NamedTuple):
    position: jax.Array
    tokens: jax.Array  # [B, L + 1], column 0 holds <s>
    score: jax.Array  # [B]
    ended: jax.Array  # [B] bool
    cache: Cache


def _greedy(
    params: Params,
    config: ModelConfig,
    memory: jax.Array,
    valid: jax.Array,
    task: ArrayLike | None,
    max_length: int,
    limit: jax.Array | None,
    on: Spread,
) -> tuple[jax.Array, jax.Array]:
    def step(s: _Greedy) -> _Greedy:
        token = jax.lax.dynamic_index_in_dim(s.tokens, s.position, 1, keepdims=False)
        logits, cache = decode_step(
            params,
            config,
            s.cache,
            valid,
            token,
            s.position,
            task,
            valid=~s.ended,
            **on._asdict(),
        )
        chosen = most_likely(logits)
        gain = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.where(s.ended, PAD, chosen)
        ended = s.ended | (chosen == EOS)
        if limit is not None:
            ended |= s.position + 1 >= limit
        return _Greedy(
            s.position + 1,
            jax.lax.dynamic_update_slice_in_dim(s.tokens, chosen[:, None], s.position + 1, 1),
            s.score + jnp.where(s.ended, 0, gain),
            ended,
            cache,
        )

    rows = memory.shape[0]
    tokens = jnp.full((rows, max_length + 1), PAD, jnp.int32).at[:, 0].set(BOS)
    start = _Greedy(
        jnp.int32(0),
        tokens,
        jnp.zeros(rows),
        ~valid.any(axis=1),
        start_cache(params, config, memory, valid, max_length),
    )
    end = jax.lax.while_loop(lambda s: (s.position < max_length) & ~s.ended.all(), step, start)
    return end.tokens[:, 1:], end.score


class _Beam(NamedTuple):
    position: jax.Array
    live: jax.Array  # [B, K, L + 1] ids, column 0 holds <s>
    live_score: jax.Array  # [B, K] log probability
    done: jax.Array  # [B, K, L + 1]
    done_score: jax.Array  # [B, K] log probability over the length penalty
    cache: Cache


def _beam(
    params: Params,
    config: ModelConfig,
    memory: jax.Array,
    valid: jax.Array,
    task: ArrayLike | None,
    max_length: int,
    limit: jax.Array | None,
    search: tuple[int, float, int],
    on: Spread,
) -> tuple[jax.Array, jax.Array]:
    beam, alpha, n_best = search
    batch = memory.shape[0]
    wide = functools.partial(jnp.repeat, repeats=beam, axis=0)
    if task is not None and jnp.ndim(task) == 1:
        task = wide(task)

    def penalty(length: Any) -> Any:
        return ((5.0 + length) / 6.0) ** alpha

    # Of the longest that a sentence may get: one number, or [B, 1].
    longest: Any = penalty(max_length)
    if limit is not None:
        longest = jnp.asarray(penalty(np.arange(max_length + 1)), jnp.float32)[limit][:, None]

    def alive(s: _Beam) -> jax.Array:
        """[B, K] bool: hypotheses that may still grow."""
        live = s.live_score > _NEVER / 2
        return live if limit is None else live & (s.position < limit)[:, None]

    def step(s: _Beam) -> _Beam:
        token = jax.lax.dynamic_index_in_dim(s.live, s.position, 2, keepdims=False).reshape(-1)
        # A sentence with no live hypothesis left takes no expert's time.
        growing = alive(s).reshape(-1)
        logits, cache = decode_step(
            params,
            config,
            s.cache,
            valid,
            token,
            s.position,
            task,
            valid=growing,
            **on._asdict(),
        )
        # 2K candidates hold at least K that do not end.
        score, origin, chosen = best_continuations(logits, s.live_score, 2 * beam)
        grown = jnp.take_along_axis(s.live, origin[:, :, None], axis=1)
        grown = jax.lax.dynamic_update_slice_in_dim(grown, chosen[:, :, None], s.position + 1, 2)
        ended = chosen == EOS
        real = ended & (score > _NEVER / 2)
        if limit is not None:
            real &= (s.position < limit)[:, None]
        ended_score = jnp.where(real, score / penalty(s.position + 1), _NEVER)
        done_score, best = jax.lax.top_k(jnp.concatenate([s.done_score, ended_score], 1), beam)
        done = jnp.take_along_axis(jnp.concatenate([s.done, grown], 1), best[:, :, None], axis=1)

        live_score, best = jax.lax.top_k(jnp.where(ended, _NEVER, score), beam)
        # Scores only fall and the penalty divides by no more than this: what cannot overtake the
        # last of the best ended hypotheses any more is given up.
        hopeless = live_score / longest <= done_score[:, n_best - 1 : n_best]
        live_score = jnp.where(hopeless, _NEVER, live_score)
        live = jnp.take_along_axis(grown, best[:, :, None], axis=1)
        if limit is not None:  # what stands at its limit stays
            over = (s.position >= limit)[:, None]
            live_score = jnp.where(over, s.live_score, live_score)
            live = jnp.where(over[:, :, None], s.live, live)
        parent = jnp.take_along_axis(origin, best, axis=1)
        cache = cache.inherited(parent)
        return _Beam(s.position + 1, live, live_score, done, done_score, cache)

    empty = jnp.full((batch, beam, max_length + 1), PAD, jnp.int32)
    padding = ~valid.any(axis=1, keepdims=True)
    first = jnp.where(jnp.arange(beam) == 0, 0.0, _NEVER)[None]
    start = _Beam(
        jnp.int32(0),
        empty.at[:, :, 0].set(BOS),
        jnp.where(padding, _NEVER, first),
        empty,
        jnp.where(padding, 0.0, jnp.full((batch, beam), _NEVER)),
        start_cache(params, config, memory, valid, 0, beam=beam),
    )
    end = start
    for room in _stages(max_length):

        def going(s: _Beam, room: int = room) -> jax.Array:
            return (s.position < room) & alive(s)[:, 0].any()

        end = jax.lax.while_loop(going, step, end._replace(cache=end.cache.grown(room)))
    # A sentence none of whose hypotheses ended in time gets its best live one.
    none = end.done_score[:, :1] <= _NEVER / 2
    ids = end.done[:, :n_best, 1:]
    ids = ids.at[:, 0].set(jnp.where(none, end.live[:, 0, 1:], ids[:, 0]))
    score = end.done_score[:, :n_best]
    late = end.live_score[:, :1] / longest
    return ids, score.at[:, :1].set(jnp.where(none, late, score[:, :1]))
