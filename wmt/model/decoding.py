"""Greedy and beam search with a key-value cache, in one program that is to be jitted or exported.

Its loop ends when all sentences have. `continuous.search_many` is what `translate` uses.
"""

from __future__ import annotations

from typing import Any

import jax

from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model import beams
from taskmoe.wmt.model.beams import Search, Spread
from taskmoe.wmt.model.subnetwork import one_task
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
    first, *more = how.stages()
    batch = beams.start(params, config, how, source, tasks, limit, first)
    batch = beams.advance(params, config, how, batch)
    for room in more:
        batch = batch._replace(cache=batch.cache.resized(room))
        batch = beams.advance(params, config, how, batch)
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
