"""Sentences on their way through greedy or beam search: where they start, a step, what was found.

Beam search keeps `beam` live and `beam` ended hypotheses a sentence and ranks the ended ones by
`log p / ((5 + length) / 6)^alpha` (Wu et al. 2016, equation 14). A sentence stops once no live
hypothesis can overtake its best ended ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.cache import Cache
from taskmoe.wmt.model.ranking import best_continuations, most_likely
from taskmoe.wmt.model.transformer import Params, Tasks, decode_step, encode, start_cache
from taskmoe.wmt.text.tokenizer import BOS, EOS, PAD

_NEVER = -1e9  # log probability of what must not be chosen; finite, so that sums stay numbers


class Spread(NamedTuple):
    """Where the experts lie, and how rows travel to them, as in `moe.apply`."""

    mesh: jax.sharding.Mesh | None = None
    strategy: str = "auto"


#: On one device.
HERE = Spread()


class Search(NamedTuple):
    """How to search, all of it static: as the arguments of `decoding.search_n_best`.

    scored: whether greedy search gives scores; else they are 0, and no word's exponential is taken.
    """

    max_length: int
    beam: int = 1
    alpha: float = 0.6
    n_best: int = 1
    on: Spread = HERE
    scored: bool = True

    def penalty(self, length: Any) -> Any:
        """What log probabilities of hypotheses of so many tokens are divided by."""
        return ((5.0 + length) / 6.0) ** self.alpha

    def stages(self) -> list[int]:
        """Positions that the cache has room for, in turn: attention reads at most twice what is.

        Each stage is compiled by itself, so they are few.
        """
        if self.max_length <= 32:
            return [self.max_length]
        return [-(-self.max_length // 4), -(-self.max_length // 2), self.max_length]


class Batch(NamedTuple):
    """Sentences on their way; the first axis is the sentence's.

    position: [B] i32, target tokens so far; of a sentence that has ended it stays.
    ended: [B] bool, sentences that are found.
    valid: [B, S] bool, of the source. task: [B] i32, a scalar or None, the decoder's.
    limit: [B] i32 of target positions, or None. cache: of the decoder.
    live: [B, K, L + 1] ids of hypotheses that grow, column 0 holds <s>; score: [B, K] f32, their
      log probabilities.
    done: [B, K, L + 1] ids of ended hypotheses, best first; done_score: [B, K] f32, their log
      probabilities over the length penalty. Both None in greedy search, which has no other.
    """

    position: jax.Array
    ended: jax.Array
    valid: jax.Array
    task: ArrayLike | None
    limit: jax.Array | None
    cache: Cache
    live: jax.Array
    score: jax.Array
    done: jax.Array | None
    done_score: jax.Array | None

    @property
    def room(self) -> int:
        """Positions that the cache has room for."""
        return self.cache.room

    def rows(self, kept: jax.Array) -> Batch:
        """The sentences at these places [N] i32."""
        return jax.tree.map(lambda x: x[kept] if jnp.ndim(x) else x, self)

    def joined(self, others: Batch, places: jax.Array) -> Batch:
        """With others, who are at position 0, at these places [N] i32 of sentences that have ended.

        What those left in the cache stays there: nobody at position 0 reads it.
        """
        nothing: dict[str, Any] = {"self_key": (), "self_value": (), "ancestors": None}
        ours, theirs = (b._replace(cache=b.cache._replace(**nothing)) for b in (self, others))
        new: Batch = jax.tree.map(
            lambda x, y: x.at[places].set(y) if jnp.ndim(x) else x, ours, theirs
        )
        kept = {name: getattr(self.cache, name) for name in nothing}
        return new._replace(cache=new.cache._replace(**kept))

    def widened(self, source: int, target: int) -> Batch:
        """With so many source and target positions, no fewer than there are."""

        def pad(x: jax.Array, axis: int, width: int) -> jax.Array:
            widths = [(0, 0)] * x.ndim
            widths[axis] = (0, width - x.shape[axis])
            return jnp.pad(x, widths)  # PAD, or not valid

        keys, values = self.cache.cross_key, self.cache.cross_value
        return self._replace(
            valid=pad(self.valid, 1, source),
            live=pad(self.live, 2, target + 1),
            done=None if self.done is None else pad(self.done, 2, target + 1),
            cache=self.cache._replace(
                cross_key=tuple(pad(x, 2, source) for x in keys),
                cross_value=tuple(pad(x, 2, source) for x in values),
            ),
        )


def start(
    params: Params,
    config: ModelConfig,
    how: Search,
    source: jax.Array,
    tasks: Tasks,
    limit: jax.Array | None,
    room: int,
) -> Batch:
    """Sentences [B, S] i32 at position 0, encoded, with a cache that has so much room."""
    valid = source != PAD
    memory, _ = encode(params, config, source, valid, tasks.encoder, **how.on._asdict())
    sentences, beam = source.shape[0], how.beam
    padding = ~valid.any(axis=1)
    empty = jnp.full((sentences, beam, how.max_length + 1), PAD, jnp.int32)
    first = jnp.broadcast_to(jnp.where(jnp.arange(beam) == 0, 0.0, _NEVER), (sentences, beam))
    score, done, done_score = first, None, None
    if beam > 1:
        score = jnp.where(padding[:, None], _NEVER, first)
        done, done_score = empty, jnp.where(padding[:, None], 0.0, jnp.full_like(first, _NEVER))
    return Batch(
        jnp.zeros(sentences, jnp.int32),
        padding,
        valid,
        tasks.decoder,
        limit,
        start_cache(params, config, memory, valid, room, beam=beam),
        empty.at[:, :, 0].set(BOS),
        score,
        done,
        done_score,
    )


def advance(
    params: Params, config: ModelConfig, how: Search, batch: Batch, at_most: ArrayLike = 0
) -> Batch:
    """Step until one that has not ended needs more room or at most so many sentences are left."""
    step = _greedy_step if how.beam == 1 else _beam_step

    def going(b: Batch) -> jax.Array:
        has_room = jnp.all(b.ended | (b.position < b.room))
        return has_room & (jnp.sum(~b.ended) > at_most)

    return jax.lax.while_loop(going, lambda b: step(params, config, how, b), batch)


def found(how: Search, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Ids [B, n_best, L] i32 and scores [B, n_best] f32 of sentences that have ended or must now.

    A sentence none of whose hypotheses ended in time gets its best live one.
    """
    if batch.done is None or batch.done_score is None:
        return batch.live[:, :, 1:], batch.score
    none = batch.done_score[:, :1] <= _NEVER / 2
    ids = batch.done[:, : how.n_best, 1:]
    ids = ids.at[:, 0].set(jnp.where(none, batch.live[:, 0, 1:], ids[:, 0]))
    score = batch.done_score[:, : how.n_best]
    late = batch.score[:, :1] / _longest(how, batch)
    return ids, score.at[:, :1].set(jnp.where(none, late, score[:, :1]))


def _logits(
    params: Params, config: ModelConfig, how: Search, b: Batch, growing: jax.Array
) -> tuple[jax.Array, Cache]:
    """Of the next token of all hypotheses: [B*K, V] f32. growing: [B*K] bool, those that matter."""
    token = jnp.take_along_axis(b.live, b.position[:, None, None], 2).reshape(-1)
    task = b.task
    if task is not None and jnp.ndim(task) == 1:
        task = jnp.repeat(jnp.asarray(task), how.beam)
    return decode_step(
        params,
        config,
        b.cache,
        b.valid,
        token,
        b.position,
        task,
        valid=growing,
        **how.on._asdict(),
    )


def _with_next(ids: jax.Array, b: Batch, words: jax.Array) -> jax.Array:
    """Ids [B, K, L + 1] of hypotheses, with words [B, K] behind the last one of each."""
    here = jnp.arange(ids.shape[2]) == b.position[:, None, None] + 1
    return jnp.where(here, words[:, :, None], ids)


def _greedy_step(params: Params, config: ModelConfig, how: Search, b: Batch) -> Batch:
    logits, cache = _logits(params, config, how, b, ~b.ended)
    chosen, gain = most_likely(logits)
    chosen = jnp.where(b.ended, PAD, chosen)
    ended = b.ended | (chosen == EOS)
    if b.limit is not None:
        ended |= b.position + 1 >= b.limit
    return b._replace(
        position=b.position + ~b.ended,
        ended=ended,
        cache=cache,
        live=_with_next(b.live, b, chosen[:, None]),
        score=b.score + jnp.where(b.ended, 0, gain)[:, None] if how.scored else b.score,
    )


def _longest(how: Search, b: Batch) -> Any:
    """Length penalty of the longest that a sentence may get: one number, or [B, 1]."""
    if b.limit is None:
        return how.penalty(how.max_length)
    every = how.penalty(np.arange(how.max_length + 1))
    return jnp.asarray(every, jnp.float32)[b.limit][:, None]


def _beam_step(params: Params, config: ModelConfig, how: Search, b: Batch) -> Batch:
    assert b.done is not None
    assert b.done_score is not None
    beam = how.beam

    def alive(score: jax.Array, position: jax.Array) -> jax.Array:
        """[B, K] bool: hypotheses that may still grow."""
        live = score > _NEVER / 2
        return live if b.limit is None else live & (position < b.limit)[:, None]

    # A sentence with no live hypothesis left takes no expert's time.
    logits, cache = _logits(params, config, how, b, alive(b.score, b.position).reshape(-1))
    # 2K candidates hold at least K that do not end.
    score, origin, chosen = best_continuations(logits, b.score, 2 * beam)
    grown = jnp.take_along_axis(b.live, origin[:, :, None], axis=1)
    grown = _with_next(grown, b, chosen)
    ended = chosen == EOS
    real = ended & (score > _NEVER / 2)
    if b.limit is not None:
        real &= (b.position < b.limit)[:, None]
    ended_score = jnp.where(real, score / how.penalty(b.position + 1)[:, None], _NEVER)
    done_score, best = jax.lax.top_k(jnp.concatenate([b.done_score, ended_score], 1), beam)
    done = jnp.take_along_axis(jnp.concatenate([b.done, grown], 1), best[:, :, None], axis=1)

    live_score, best = jax.lax.top_k(jnp.where(ended, _NEVER, score), beam)
    # Scores only fall and the penalty divides by no more than this: what cannot overtake the
    # last of the best ended hypotheses any more is given up.
    hopeless = live_score / _longest(how, b) <= done_score[:, how.n_best - 1 : how.n_best]
    live_score = jnp.where(hopeless, _NEVER, live_score)
    live = jnp.take_along_axis(grown, best[:, :, None], axis=1)
    if b.limit is not None:  # what stands at its limit stays
        over = (b.position >= b.limit)[:, None]
        live_score = jnp.where(over, b.score, live_score)
        live = jnp.where(over[:, :, None], b.live, live)
    parent = jnp.take_along_axis(origin, best, axis=1)
    position = b.position + ~b.ended
    return b._replace(
        position=position,
        ended=~alive(live_score, position)[:, 0],
        cache=cache.inherited(parent),
        live=live,
        score=live_score,
        done=done,
        done_score=done_score,
    )
