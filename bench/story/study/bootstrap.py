"""How far differences in BLEU may be from what they are, had the test text other sentences.

Paired bootstrap (Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation):
the test sentences are drawn anew, with replacement, the same ones for every system and seed, and
every score is computed of what was drawn. Directions with equally many sentences are drawn alike:
text that is parallel over several languages is as hard in all of them. Seeds of training are taken
as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from sacrebleu.metrics import BLEU

from taskmoe.bench.harness.console import each
from taskmoe.bench.story.study.runs import System
from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import split_pair
from taskmoe.wmt.text.folders import Pairs
from taskmoe.wmt.text.scoring import tokenizer

SAMPLES = 1000
#: Direction -> [N, 10] i64, a sentence a row: n-grams of 1 to 4 words that are right, n-grams that
#: there are, and words of the translation and of the reference.
Counts = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Interval:
    """The ends of a 95% interval."""

    low: float
    high: float

    @classmethod
    def of(cls, samples: np.ndarray) -> Interval:
        """Between the 2.5th and the 97.5th percentile."""
        low, high = np.percentile(samples, (2.5, 97.5))
        return cls(float(low), float(high))

    def words(self, form: str) -> str:
        """Both ends in this format."""
        return f"({self.low:{form}} to {self.high:{form}})"


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """95% intervals of the shares in percent of gains over dense that the student keeps.

    samples: how many were drawn. kept_of_teacher, kept_of_task_moe: of the token-routed model's and
    the task-routed one's gain; None where a system is not there, and where its gain may be nothing.
    """

    samples: int
    kept_of_teacher: Interval | None = None
    kept_of_task_moe: Interval | None = None


def count(pair: str, translations: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """What BLEU needs of each sentence, [N, 10] i64 as in `Counts`, cut into words as `score` does.

    Raises ValueError where there are not equally many.
    """
    metric = BLEU(tokenize=tokenizer(split_pair(pair)[1]), effective_order=True)
    pairs = zip(translations, references, strict=True)
    scores = (metric.sentence_score(ours, [wanted]) for ours, wanted in pairs)
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], np.int64)


def bleu(sums: np.ndarray) -> float:
    """BLEU in [0, 100] of a text, from the sums [10] over its sentences."""
    *ngrams, length, wanted = sums.tolist()
    found = BLEU.compute_bleu(ngrams[:4], ngrams[4:], length, wanted, smooth_method="exp")
    return float(found.score)


@functools.cache
def drawn(sentences: int) -> np.ndarray:
    """How often each sentence is in each sample: [SAMPLES, sentences] f64, always the same."""
    random = np.random.default_rng(0)
    chosen = random.integers(0, sentences, (SAMPLES, sentences))
    flat = chosen + sentences * np.arange(SAMPLES)[:, None]
    times = np.bincount(flat.reshape(-1), minlength=SAMPLES * sentences)
    return times.reshape(SAMPLES, sentences).astype(np.float64)


def resampled(runs: Sequence[Counts]) -> np.ndarray:
    """BLEU of each sample, mean over directions and over seeds: [SAMPLES] f64.

    runs: of one system, one a seed.
    """
    levels = [
        [bleu(sums) for sums in (drawn(len(counts)) @ counts).astype(np.int64)]
        for run in runs
        for counts in run.values()
    ]
    return np.mean(levels, axis=0)


def levels(systems: Sequence[System], text: Pairs) -> dict[str, np.ndarray]:
    """System -> `resampled` of its translations; without those whose translations are not kept.

    text: the test text, of the directions that count. Raises InputError where translations do not
    have the BLEU that they were scored with, or systems have not the same directions.
    """
    kept = [system for system in systems if system.translations]
    runs = {system.name: counted(system, text) for system in kept}
    _check_alike(kept, runs)
    found: dict[str, np.ndarray] = {}
    for name in each("drawing samples", "systems", list(runs), enabled=sys.stderr.isatty()):
        found[name] = resampled(runs[name])
    return found


def counted(system: System, text: Pairs) -> list[Counts]:
    """The counts of a system's translations of these directions, one a seed.

    Raises InputError where they do not have the BLEU that they were scored with.
    """
    found: list[Counts] = []
    for seed, lines, scores in zip(system.seeds, system.translations, system.scores, strict=True):
        run: Counts = {}
        for pair in (pair for pair in text if pair in lines):
            ours, theirs = lines[pair], text[pair][1][: len(lines[pair])]
            if len(ours) == len(theirs):
                run[pair] = count(pair, ours, theirs)
                have = bleu(run[pair].sum(axis=0))
            if len(ours) != len(theirs) or abs(have - scores[pair]) > 1e-6:
                raise InputError(
                    f"{system.name}-{seed}: its translations of {pair} do not have the BLEU of "
                    f"test.json, {scores[pair]:.2f}, with the test text of --data: one of the "
                    "three is of another text"
                )
        found.append(run)
    return found


def difference(levels: Mapping[str, np.ndarray], name: str, base: str) -> Interval | None:
    """Interval of a system's mean BLEU less a base's; None for itself and where one is missing."""
    if name == base or name not in levels or base not in levels:
        return None
    return Interval.of(levels[name] - levels[base])


def shares(levels: Mapping[str, np.ndarray]) -> Bootstrap | None:
    """Intervals of the shares of gain that the student keeps; None without any level."""
    if not levels:
        return None
    if "distilled" not in levels:
        return Bootstrap(SAMPLES)
    dense, student = levels["dense"], levels["distilled"]
    teachers = (levels.get(name) for name in ("token", "target"))
    both = [None if best is None else share(student, dense, best) for best in teachers]
    return Bootstrap(SAMPLES, *both)


def share(student: np.ndarray, dense: np.ndarray, best: np.ndarray) -> Interval | None:
    """Interval of the percentage of a gain over dense that a student keeps.

    student, dense, best: [SAMPLES], as `resampled` gives them. None where the gain itself may be
    nothing: of that there is no share.
    """
    gain = best - dense
    if Interval.of(gain).low <= 0:
        return None
    kept = gain > 0  # all but 25 of a thousand at most
    return Interval.of(100 * (student - dense)[kept] / gain[kept])


def _check_alike(systems: Sequence[System], runs: Mapping[str, Sequence[Counts]]) -> None:
    sizes = {
        f"{system.name}-{seed}": {pair: len(counts) for pair, counts in run.items()}
        for system in systems
        for seed, run in zip(system.seeds, runs[system.name], strict=True)
    }
    first, wanted = next(iter(sizes.items()))
    for name, found in sizes.items():
        for pair in found | wanted:
            if found.get(pair) != wanted.get(pair):
                raise InputError(
                    f"{name} has {found.get(pair, 0)} translations of {pair}, {first} has "
                    f"{wanted.get(pair, 0)}: they cannot be compared sentence by sentence"
                )
