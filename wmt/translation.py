"""Translate many sentences: grouped by task and length into a few compiled shapes, order kept."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable

import jax
import numpy as np

from taskmoe.wmt.config import ModelConfig, split_pair
from taskmoe.wmt.decoding import search
from taskmoe.wmt.errors import InputError
from taskmoe.wmt.model import Model
from taskmoe.wmt.tokenizer import EOS, PAD
from taskmoe.wmt.transformer import Params, Tasks

TaskIds = tuple[int | None, int | None]
_MULTIPLE = 16  # source lengths are padded up to a multiple, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How to search: hypotheses, length penalty, sentences a batch, and target positions.

    max_length: target positions at most; None is twice the padded source length plus 16.
    mixed_tasks: batches hold whatever directions come, as when one full model serves all; else a
      batch holds one combination of tasks and a task-routed model runs as that sub-network.
    """

    beam: int = 1
    alpha: float = 0.6
    batch: int = 64
    max_length: int | None = None
    mixed_tasks: bool = False

    def __post_init__(self) -> None:
        for name in ("beam", "batch", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.alpha < 0:
            raise ValueError(f"alpha must be at least 0, got {self.alpha}")


def translate(
    model: Model,
    requests: Iterable[tuple[str, str]],
    decoding: Decoding = Decoding(),
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Translate (direction, sentence) requests; results in their order, "" for an empty sentence.

    progress: called with (done, total) after each batch.
    Raises InputError for a direction that the model cannot translate.
    """
    requests = list(requests)
    encoded: dict[int, list[int]] = {}
    ids = {pair: task_ids(model.config, pair) for pair in dict.fromkeys(p for p, _ in requests)}
    for pair in ids:
        members = [i for i, (p, line) in enumerate(requests) if p == pair and line.strip()]
        lines = [requests[i][1] for i in members]
        target = split_pair(pair)[1]
        encoded |= zip(members, model.tokenizer.encode_source(lines, target), strict=True)
    groups: dict[tuple[int, TaskIds | None], list[int]] = defaultdict(list)
    for i in sorted(encoded):
        width = -(-len(encoded[i]) // _MULTIPLE) * _MULTIPLE
        groups[width, None if decoding.mixed_tasks else ids[requests[i][0]]].append(i)

    # A full batch's shape for few sentences would be mostly padding; powers of two are few shapes.
    largest = max(map(len, groups.values()), default=1)
    rows_a_batch = min(decoding.batch, 1 << (largest - 1).bit_length())
    config = model.config
    if not any(config.tasks(side) for side in ("encoder", "decoder")):
        # Search does not look at directions then: one compilation serves every sub-network.
        config = dataclasses.replace(config, pairs=("source-target",))
    out = [""] * len(requests)
    done = 0
    for (width, one_task), group in groups.items():
        for at in range(0, len(group), rows_a_batch):
            chunk = group[at : at + rows_a_batch]
            source = np.full((rows_a_batch, width), PAD, np.int32)
            for row, i in enumerate(chunk):
                source[row, : len(encoded[i])] = encoded[i]
            rows = [ids[requests[i][0]] for i in chunk]
            rows += rows[:1] * (rows_a_batch - len(chunk))
            found, _ = _search(
                model.params,
                config,
                source,
                _tasks(rows, one_task),
                decoding.max_length or 2 * width + 16,
                decoding.beam,
                decoding.alpha,
            )
            texts = [[int(t) for t in row if t not in (PAD, EOS)] for row in np.asarray(found)]
            for i, text in zip(chunk, model.tokenizer.decode(texts[: len(chunk)]), strict=True):
                out[i] = text
            done += len(chunk)
            if progress is not None:
                progress(done, len(encoded))
    return out


def task_ids(config: ModelConfig, pair: str) -> TaskIds:
    """Task id of a direction on the encoder's and the decoder's side; None where not task-routed.

    A direction that was not trained still has its ids where target and source were seen in others.
    Raises InputError where a language or task is not the model's.
    """
    source, target = split_pair(pair)
    targets = {split_pair(p)[1] for p in config.pairs}
    if target not in targets or source not in targets | {split_pair(p)[0] for p in config.pairs}:
        raise InputError(f"pair {pair}: the model knows only {', '.join(config.pairs)}")
    ids = []
    for side in ("encoder", "decoder"):
        tasks = config.tasks(side)
        task = config.task_name(side, pair)
        if task is not None and task not in tasks:
            raise InputError(
                f"pair {pair}: the model's {side} has no task {task}, only {', '.join(tasks)}"
            )
        ids.append(None if task is None else tasks.index(task))
    return ids[0], ids[1]


def _tasks(rows: list[TaskIds], one_task: TaskIds | None) -> Tasks:
    """Task ids of a batch: scalars where all rows share them, else one a row."""
    if one_task is not None:
        return Tasks(*(None if t is None else np.int32(t) for t in one_task))
    sides = zip(*rows, strict=True)
    return Tasks(*(None if None in side else np.array(side, np.int32) for side in sides))


@functools.partial(jax.jit, static_argnums=(1, 4, 5, 6))
def _search(
    params: Params,
    config: ModelConfig,
    source: jax.Array,
    tasks: Tasks,
    max_length: int,
    beam: int,
    alpha: float,
) -> tuple[jax.Array, jax.Array]:
    return search(params, config, source, tasks, max_length=max_length, beam=beam, alpha=alpha)
