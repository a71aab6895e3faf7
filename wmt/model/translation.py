"""Translate many sentences: grouped by task and length into a few compiled shapes, order kept."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import ModelConfig, check_languages, split_pair
from taskmoe.wmt.model.beams import HERE, Search, Spread
from taskmoe.wmt.model.continuous import Keep, Sentences, prepared, search_many
from taskmoe.wmt.model.decoding import MULTIPLE, check_alpha, length_limit
from taskmoe.wmt.model.saved import Model
from taskmoe.wmt.model.shortlist import Shortlist, narrowed
from taskmoe.wmt.model.transformer import Tasks
from taskmoe.wmt.text.tokenizer import EOS, PAD

TaskIds = tuple[int | None, int | None]
_ENDS_OF_LINES = str.maketrans("\r\n", "  ")  # byte pieces, which would break a line in two
_FEW, _MANY = 16, 64  # batches: below, no smaller sizes are worth compiling; above, all are
_SHORT = 128  # source tokens up to which a batch is full; of longer ones it has fewer rows


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How to search: hypotheses, length penalty, sentences a batch, and lengths.

    batch: fewer are taken at once of sentences above 128 tokens, as many tokens.
    max_length: target positions at most; None is `decoding.length_limit` of each sentence.
    max_source: tokens of a sentence, its language and `</s>` included; the rest is cut off.
    mixed_tasks: batches hold whatever directions come, as when one full model serves all; else a
      batch holds one combination of tasks and a task-routed model runs as that sub-network.
    shrink: a power of two by which a batch shrinks as its sentences end; each size is compiled
      once. 1 is never. None is 1 for few sentences, 4 from 16 batches on and 2 from 64 on, those
      before in the same stream counted.
    shortlist: the words that a batch's translations are made of; None is all.
    """

    beam: int = 1
    alpha: float = 0.6
    batch: int = 64
    max_length: int | None = None
    mixed_tasks: bool = False
    max_source: int = 512
    shrink: int | None = None
    shortlist: Shortlist | None = None

    def __post_init__(self) -> None:
        for name in ("beam", "batch", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.shrink is not None and (self.shrink < 1 or self.shrink & (self.shrink - 1)):
            raise ValueError(f"shrink must be a power of two, got {self.shrink}")
        if self.max_source < 3:  # the language, a piece, </s>
            raise ValueError(f"max_source must be at least 3, got {self.max_source}")
        check_alpha(self.alpha)


class Hypothesis(NamedTuple):
    """A translation. score: log probability, with a beam divided by the length penalty."""

    text: str
    score: float


def translate(
    model: Model,
    requests: Iterable[tuple[str, str]],
    decoding: Decoding = Decoding(),
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = lambda _: None,
    before: int = 0,
    spread: Spread = HERE,
) -> list[str]:
    """Translate (direction, sentence) requests; results in their order, "" for an empty sentence.

    progress: called with (done, total) after each batch. note: called with a line for each sentence
    that is cut to `decoding.max_source`. before: lines of the same stream that stand before these.
    spread: a mesh over which the model's experts lie, see `parallel.spread_model`.
    Raises InputError for a direction that the model cannot translate.
    """
    found = translate_n_best(
        model, requests, decoding, 1, progress, note, before, spread, scored=False
    )
    return [best[0].text if best else "" for best in found]


def translate_n_best(
    model: Model,
    requests: Iterable[tuple[str, str]],
    decoding: Decoding = Decoding(),
    n_best: int = 1,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = lambda _: None,
    before: int = 0,
    spread: Spread = HERE,
    scored: bool = True,
) -> list[list[Hypothesis]]:
    """As `translate`, with up to n_best hypotheses a request, best first; none for an empty one.

    scored: whether greedy hypotheses get their scores; else they are 0, and time is saved.
    Raises ValueError unless n_best is in [1, decoding.beam].
    """
    if not 1 <= n_best <= decoding.beam:
        raise ValueError(f"n_best must be in [1, beam={decoding.beam}], got {n_best}")
    requests = list(requests)
    encoded: dict[int, list[int]] = {}
    ids = {pair: task_ids(model.config, pair) for pair in dict.fromkeys(p for p, _ in requests)}
    for pair in ids:
        members = [i for i, (p, line) in enumerate(requests) if p == pair and line.strip()]
        lines = [requests[i][1] for i in members]
        target = split_pair(pair)[1]
        encoded |= zip(members, model.tokenizer.encode_source(lines, target), strict=True)
    number: Counter[str] = Counter()
    for i, (pair, _) in enumerate(requests):
        number[pair] += 1
        if (length := len(encoded.get(i, ()))) > decoding.max_source:
            line = before + number[pair]
            note(f"{pair}, line {line}: cut to {decoding.max_source} of {length:,} tokens")
            encoded[i] = [*encoded[i][: decoding.max_source - 1], EOS]
    # Sentences of like lengths come together.
    groups: dict[tuple[TaskIds | None, int], list[int]] = defaultdict(list)
    for i in sorted(encoded, key=lambda i: (len(encoded[i]), i)):
        width = max(_SHORT, -(-len(encoded[i]) // MULTIPLE) * MULTIPLE)
        rows = max(1, decoding.batch * _SHORT // width)
        groups[None if decoding.mixed_tasks else ids[requests[i][0]], rows].append(i)
    # A full batch's shape for few sentences would be mostly padding; powers of two are few shapes.
    largest = max(map(len, groups.values()), default=1)
    most_rows = 1 << (largest - 1).bit_length()
    config = model.config
    if not any(config.tasks(side) for side in ("encoder", "decoder")):
        # Search does not look at directions then: one compilation serves every sub-network.
        config = dataclasses.replace(config, pairs=("source-target",))
    batches = (before + len(encoded)) / decoding.batch
    shrink = decoding.shrink or (1 if batches < _FEW else 4 if batches < _MANY else 2)
    out: list[list[Hypothesis]] = [[] for _ in requests]
    done = 0
    for (one_task, most), group in groups.items():
        alone = Tasks(None, None) if one_task is None else _tasks([], one_task)
        params = prepared(model.params, config, alone)
        rows = min(most, most_rows)
        keep = Keep(rows, shrink)
        at_once = len(group) if decoding.shortlist is None else rows  # a batch has one shortlist
        for at in range(0, len(group), at_once):
            chunk = group[at : at + at_once]
            sentences = Sentences(
                [encoded[i] for i in chunk],
                [decoding.max_length or length_limit(len(encoded[i])) for i in chunk],
                _tasks([ids[requests[i][0]] for i in chunk], one_task),
            )
            words = None
            if decoding.shortlist is not None:
                directions = [requests[i][0] for i in chunk]
                words = decoding.shortlist.words(directions, sentences.part(0, len(chunk))[0])
            used = params if words is None else narrowed(params, words)
            longest = max(sentences.limits)
            how = Search(longest, decoding.beam, decoding.alpha, n_best, spread, scored)
            for names, found, scores in search_many(used, config, how, sentences, keep):
                found = found if words is None else words[found]
                for name, best in zip(names, _hypotheses(model, found, scores), strict=True):
                    out[chunk[name]] = best
                done += len(names)
                if progress is not None:
                    progress(done, len(encoded))
    return out


def _hypotheses(model: Model, found: np.ndarray, scores: np.ndarray) -> Iterator[list[Hypothesis]]:
    """Of each sentence, from ids [B, n_best, L] and scores [B, n_best]."""
    rows = [
        [int(t) for t in row if t not in (PAD, EOS)] for row in found.reshape(-1, found.shape[2])
    ]
    texts = iter(text.translate(_ENDS_OF_LINES) for text in model.tokenizer.decode(rows))
    for row in scores:
        best = [Hypothesis(next(texts), float(score)) for score in row]
        # Places that no hypothesis reached in time have no score.
        yield [h for n, h in enumerate(best) if n == 0 or h.score > -1e8]


def task_ids(config: ModelConfig, pair: str) -> TaskIds:
    """Task id of a direction on the encoder's and the decoder's side; None where not task-routed.

    A direction that was not trained still has its ids where target and source were seen in others.
    Raises InputError where a language or task is not the model's.
    """
    check_languages(config, pair)
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
