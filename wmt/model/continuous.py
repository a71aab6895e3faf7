"""Search on the host in a batch that is kept full: when sentences end the next take their places.

A batch has a few shapes, each compiled once. Its cache is a ring of columns, which all sentences
fill together, whatever the position of each, see `cache.Cache`: so a new sentence needs no column
to be moved or cleared. When no more are to come, the batch goes on in smaller ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model import beams
from taskmoe.wmt.model.beams import Batch, Search
from taskmoe.wmt.model.decoding import MULTIPLE, checked
from taskmoe.wmt.model.subnetwork import one_task, without_tasks
from taskmoe.wmt.model.transformer import Params, Tasks, with_softmax
from taskmoe.wmt.text.tokenizer import PAD


@dataclasses.dataclass(frozen=True)
class Sentences:
    """What is to be translated: in this order, so the shortest should be first.

    ids: of each source. limits: target positions of each, at least 1. tasks: [N] i32, scalars or
    None, as the model's sides have them.
    """

    ids: Sequence[Sequence[int]]
    limits: Sequence[int]
    tasks: Tasks

    def part(self, at: int, count: int, width: int = 0) -> tuple[np.ndarray, Tasks, np.ndarray]:
        """Of so many from there on: source ids [count, S], tasks and limits [count].

        S is no less than width. Behind the last sentence there are rows of padding.
        """
        ids = self.ids[at : at + count]
        width = max(width, _padded(max(1, *map(len, ids))))
        source = np.full((count, width), PAD, np.int32)
        for row, own in zip(source, ids, strict=False):
            row[: len(own)] = own
        these = np.minimum(np.arange(at, at + count), len(self.ids) - 1)
        tasks = jax.tree.map(lambda t: t[these] if np.ndim(t) else t, self.tasks)
        return source, tasks, np.asarray(self.limits, np.int32)[these]


class Found(NamedTuple):
    """Sentences that have ended: which ones [N], and what `search_n_best` gives of them.

    ids: [N, n_best, L] i32, PAD after `</s>`. scores: [N, n_best] f32.
    """

    names: np.ndarray
    ids: np.ndarray
    scores: np.ndarray


class Keep(NamedTuple):
    """How a batch is kept full.

    rows: sentences at once. factor: a power of two. When none are to come, sentences go on in
    batches of its powers below rows; with 1 all places stay. joins: the next sentences come when an
    eighth of the places is free; else they come when all sentences of a batch have ended.
    """

    rows: int
    factor: int = 2
    joins: bool = True

    @property
    def together(self) -> int:
        """Places that are filled at a time."""
        return max(1, self.rows // 8)


def prepared(params: Params, config: ModelConfig, tasks: Tasks) -> Params:
    """What `search_many` takes: computed once for all sentences, whose scalar tasks are these.

    A task's sub-network where tasks are scalars, and a tied embedding as the softmax's matrix.
    """
    return _prepared(params, config, tasks)


def search_many(
    params: Params, config: ModelConfig, how: Search, sentences: Sentences, keep: Keep
) -> Iterator[Found]:
    """As `search_n_best` of all sentences, on the host: each comes when a place is free for it.

    params: from `prepared`. config: the model's. how: its max_length is no less than any limit.
    Yields every sentence once, as they end. Raises ValueError as that, and where a limit does not
    fit.

    Experts of a limited capacity have room by the size of the batch, and drop what is beyond: where
    the model has such, none join, and where the decoder has, every sentence stays as well.
    """
    checked(how)
    for limit in sentences.limits:
        if not 1 <= limit <= how.max_length:
            raise ValueError(f"limits must be in [1, {how.max_length}], got {limit}")
    running = _Running(params, config, how, sentences, keep)
    while running.fill():
        found = running.step()
        if len(found.names):
            yield found


class _Running:
    """The batch, and which sentence is at each of its places."""

    def __init__(
        self, params: Params, config: ModelConfig, how: Search, sentences: Sentences, keep: Keep
    ) -> None:
        config, tasks = without_tasks(config, sentences.tasks)
        if config.capacity_factor is not None:
            if config.moe("decoder") is not None:
                keep = Keep(keep.rows, factor=1, joins=False)
            elif config.moe("encoder") is not None:
                keep = keep._replace(joins=False)
        self.params, self.config, self.how, self.keep = params, config, how, keep
        self.sentences = dataclasses.replace(sentences, tasks=tasks)
        self.most = how.max_length
        self.come = 0  # sentences that are in the batch or were
        self.names = np.empty(0, np.int64)  # at each place of the batch; -1 where it is free
        self.width = 0  # source positions
        self.longest = 0  # target positions so far of a sentence in the batch
        self.batch: Any = None

    @property
    def to_come(self) -> int:
        """Sentences that have not been in the batch."""
        return len(self.sentences.ids) - self.come

    def _joins(self) -> bool:
        return self.keep.joins and self.to_come > 0

    def fill(self) -> bool:
        """Let the next sentences come, or give up places; False when all have ended."""
        free = np.flatnonzero(self.names < 0)
        left = len(self.names) - len(free)
        if self.to_come and not left:
            self._begin()
        elif self._joins():
            self._join(free)
        elif left:
            self._shrink(left)
        return bool((self.names >= 0).any())

    def step(self) -> Found:
        """Go on until places can be filled or given up, or a sentence needs more room."""
        room = min(room for room in self.how.stages() if room > self.longest)
        if room != self.batch.room:
            self.batch = _resized(self.batch, room)
        rows, keep = len(self.names), self.keep
        at_most = rows - keep.together if self._joins() else _smaller(rows, keep.factor)
        self.batch = _advance(self.params, self.config, self.how, self.batch, at_most)
        ended, position = jax.device_get((self.batch.ended, self.batch.position))
        self.longest = max(position[~ended], default=0)
        new = np.flatnonzero(ended & (self.names >= 0))
        names = self.names[new]
        self.names[new] = -1
        ids, scores = jax.device_get(_found(self.how, self.batch))
        return Found(names, ids[new], scores[new])

    def _begin(self) -> None:
        """A batch of the next sentences."""
        names, source, tasks, limits = self._next(self.keep.rows, 0)
        self.names, self.width, self.longest = names, source.shape[1], 0
        self.how = self.how._replace(max_length=self._length(limits))
        self.batch = _start(self.params, self.config, self.how, source, tasks, limits)

    def _join(self, free: np.ndarray) -> None:
        """The next sentences come into free places, so many at a time."""
        count = self.keep.together
        times = min(len(free) // count, -(-self.to_come // count))
        if not times:  # the batch has stopped for room
            return
        names, source, tasks, limits = self._next(times * count, self.width)
        length = max(self.how.max_length, self._length(limits))
        if source.shape[1] > self.width or length > self.how.max_length:
            self.width, self.how = source.shape[1], self.how._replace(max_length=length)
            self.batch = _widened(self.batch, self.width, length)
        places = free[: len(names)]
        self.names[places] = names
        for at in range(0, len(names), count):
            new = jax.tree.map(
                lambda x, at=at: x[at : at + count] if np.ndim(x) else x,
                (source, tasks, limits, places),
            )
            self.batch = _joined(self.params, self.config, self.how, self.batch, *new)

    def _next(self, count: int, width: int) -> tuple[np.ndarray, np.ndarray, Tasks, np.ndarray]:
        """Names of the next sentences, -1 behind the last one, and `Sentences.part` of them."""
        names = np.arange(self.come, self.come + count)
        part = self.sentences.part(self.come, count, width)
        names[self.to_come :] = -1
        self.come += min(count, self.to_come)
        return names, *part

    def _length(self, limits: np.ndarray) -> int:
        """Target positions of a batch: of few sizes, so that few are compiled."""
        return min(self.most, _padded(int(limits.max())))

    def _shrink(self, left: int) -> None:
        """A smaller batch, where the sentences that are left fit into one."""
        factor = self.keep.factor
        if left <= _smaller(len(self.names), factor):
            kept = np.argsort(self.names < 0, kind="stable")[: _size(left, factor)]
            self.names = self.names[kept]
            self.batch = _kept(self.batch, kept)


def _padded(positions: int) -> int:
    return -(-positions // MULTIPLE) * MULTIPLE


def _size(rows: int, factor: int) -> int:
    """The least power of the factor that holds so many rows."""
    size = 1
    while size < rows:
        size *= factor
    return size


def _smaller(rows: int, factor: int) -> int:
    """The largest power of the factor below so many rows; 0 of one row, or where it is 1."""
    return 0 if factor == 1 else _size(rows, factor) // factor


@functools.partial(jax.jit, static_argnames="config")
def _prepared(params: Params, config: ModelConfig, tasks: Tasks) -> Params:
    return with_softmax(one_task(params, config, tasks)[0])


@functools.partial(jax.jit, static_argnames=("config", "how"))
def _start(
    params: Params,
    config: ModelConfig,
    how: Search,
    source: jax.Array,
    tasks: Tasks,
    limits: jax.Array,
) -> Batch:
    return beams.start(params, config, how, source, tasks, limits, how.stages()[0])


@functools.partial(jax.jit, static_argnames=("config", "how"), donate_argnames="batch")
def _joined(
    params: Params,
    config: ModelConfig,
    how: Search,
    batch: Batch,
    source: jax.Array,
    tasks: Tasks,
    limits: jax.Array,
    places: jax.Array,
) -> Batch:
    return batch.joined(beams.start(params, config, how, source, tasks, limits, 0), places)


@functools.partial(jax.jit, static_argnames=("config", "how"), donate_argnames="batch")
def _advance(params: Params, config: ModelConfig, how: Search, batch: Batch, at_most: int) -> Batch:
    return beams.advance(params, config, how, batch, at_most)


@functools.partial(jax.jit, static_argnames="room")
def _resized(batch: Batch, room: int) -> Batch:
    return batch._replace(cache=batch.cache.resized(room))


@functools.partial(jax.jit, static_argnames=("source", "target"))
def _widened(batch: Batch, source: int, target: int) -> Batch:
    return batch.widened(source, target)


@jax.jit
def _kept(batch: Batch, kept: jax.Array) -> Batch:
    """The sentences at these places."""
    return batch.rows(kept)


@functools.partial(jax.jit, static_argnames="how")
def _found(how: Search, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return beams.found(how, batch)
