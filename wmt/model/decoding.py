"""Greedy and beam search with a key-value cache: in one program, or with rows that leave the batch.

`search` and `search_n_best` are functions to be jitted or exported: one loop that ends when all
sentences have. `search_leaving` runs on the host and is what `translate` uses: it stops the loop
whenever half of the sentences have ended and goes on with those that are left in a smaller batch.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model import beams
from taskmoe.wmt.model.beams import Batch, Search, Spread
from taskmoe.wmt.model.subnetwork import one_task, without_tasks
from taskmoe.wmt.model.transformer import Params, Tasks, with_softmax

MULTIPLE = 16  # source lengths are padded up to a multiple, so that few shapes are compiled
_MOST_ALPHA = 10.0  # a length penalty beyond means nothing, and overflows


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
    how = checked(Search(max_length, beam, alpha, n_best, Spread(mesh, strategy)))
    params, config, tasks = one_task(params, config, tasks)
    params = with_softmax(params)
    batch = beams.start(params, config, how, source, tasks, limit)
    for room in how.stages():
        batch = beams.advance(params, config, how, _with_room(batch, room))
    return beams.found(how, batch)


def checked(how: Search) -> Search:
    """The same; raises ValueError where a number does not fit."""
    beam, max_length, n_best = how.beam, how.max_length, how.n_best
    if beam < 1 or max_length < 1:
        raise ValueError(
            f"beam and max_length must be at least 1, got beam={beam}, max_length={max_length}"
        )
    check_alpha(how.alpha)
    if not 1 <= n_best <= beam:
        raise ValueError(f"n_best must be in [1, beam={beam}], got n_best={n_best}")
    return how


def prepared(params: Params, config: ModelConfig, tasks: Tasks) -> Params:
    """What `search_leaving` takes: computed once for all batches, whose scalar tasks are these.

    A task's sub-network where tasks are scalars, and a tied embedding as the softmax's matrix.
    """
    return _prepared(params, config, tasks)


def search_leaving(
    params: Params,
    config: ModelConfig,
    how: Search,
    source: np.ndarray,
    tasks: Tasks,
    factor: int = 2,
) -> tuple[np.ndarray, np.ndarray]:
    """As `search_n_best`, on the host: sentences that have ended leave the batch.

    params: from `prepared`. config: the model's. source: [B, S] i32. factor: a power of two;
    batches of B sentences and of its powers below are compiled, once each for a length of the
    source and room in the cache. With 1 all stay until the last has ended.
    Returns ids [B, n_best, max_length] i32 and scores [B, n_best] f32. Raises ValueError as that.

    Experts of a limited capacity have room by the size of the batch, and drop what is beyond: where
    the decoder has such, every sentence stays.
    """
    checked(how)
    config, tasks = without_tasks(config, tasks)
    limited = config.moe("decoder") is not None and config.capacity_factor is not None
    batch = _start(params, config, how, source, tasks)
    names = np.arange(source.shape[0])  # of the sentences in the batch
    ids = np.zeros((len(names), how.n_best, how.max_length), np.int32)
    scores = np.zeros((len(names), how.n_best), np.float32)
    for room in how.stages():
        batch = _moved(batch, None, room)
        while True:
            smaller = 0 if limited or factor == 1 else _smaller(len(names), factor)
            batch = _advance(params, config, how, batch, smaller)
            ended = np.asarray(batch.ended)
            left = len(ended) - int(ended.sum())
            if left > smaller:
                break  # for more room, or because there is no further position
            ids[names], scores[names] = jax.device_get(_found(how, batch))
            if not left:
                return ids, scores
            # Of those that have ended some may have to fill a batch; they are found already.
            kept = np.argsort(ended, kind="stable")[: _size(left, factor)]
            names = names[kept]
            batch = _moved(batch, kept, room)
    ids[names], scores[names] = jax.device_get(_found(how, batch))
    return ids, scores


def _size(rows: int, factor: int) -> int:
    """The least power of the factor that holds so many rows."""
    size = 1
    while size < rows:
        size *= factor
    return size


def _smaller(rows: int, factor: int) -> int:
    """The largest power of the factor below so many rows; 0 of one row."""
    return _size(rows, factor) // factor


def _with_room(batch: Batch, room: int) -> Batch:
    return batch._replace(cache=batch.cache.grown(room))


@functools.partial(jax.jit, static_argnames="config")
def _prepared(params: Params, config: ModelConfig, tasks: Tasks) -> Params:
    return with_softmax(one_task(params, config, tasks)[0])


@functools.partial(jax.jit, static_argnames=("config", "how"))
def _start(
    params: Params, config: ModelConfig, how: Search, source: jax.Array, tasks: Tasks
) -> Batch:
    return beams.start(params, config, how, source, tasks, None)


@functools.partial(jax.jit, static_argnames=("config", "how"), donate_argnames="batch")
def _advance(params: Params, config: ModelConfig, how: Search, batch: Batch, at_most: int) -> Batch:
    return beams.advance(params, config, how, batch, at_most)


@functools.partial(jax.jit, static_argnames="room")
def _moved(batch: Batch, kept: jax.Array | None, room: int) -> Batch:
    """The sentences that are kept, None for all, with room for so many positions."""
    return _with_room(batch if kept is None else batch.rows(kept), room)


@functools.partial(jax.jit, static_argnames="how")
def _found(how: Search, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return beams.found(how, batch)
