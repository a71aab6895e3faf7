"""BLEU and chrF of translations with sacreBLEU, averages as papers report them, and bootstrap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from taskmoe.wmt.config import split_pair


class Score(NamedTuple):
    """Scores of one direction.

    bleu, chrf: in [0, 100]. signature, chrf_signature: sacreBLEU's. sentences: how many.
    """

    bleu: float
    signature: str
    sentences: int
    chrf: float
    chrf_signature: str


class Comparison(NamedTuple):
    """Two systems on the same sentences.

    bleu, other: BLEU of the system and of the one beside it. p: share of paired bootstrap samples
      (Koehn 2004) whose difference lies further from the mean difference than the observed one
      from zero: small where the systems differ. samples: how many were drawn.
    """

    bleu: float
    other: float
    p: float
    samples: int


def score(pair: str, hypotheses: list[str], references: list[str]) -> Score:
    """BLEU as in the paper (mixed case, smooth exp, tokenizer intl, zh for Chinese), and chrF2.

    Raises ValueError where the lists differ in length or are empty.
    """
    _check(hypotheses, references)
    metric, chrf = _bleu(pair), CHRF()
    bleu = float(metric.corpus_score(hypotheses, [references]).score)
    characters = float(chrf.corpus_score(hypotheses, [references]).score)
    return Score(
        bleu,
        str(metric.get_signature()),
        len(references),
        characters,
        str(chrf.get_signature()),
    )


def compare(
    pair: str, hypotheses: list[str], others: list[str], references: list[str], samples: int = 1000
) -> Comparison:
    """Paired bootstrap between two systems' translations of the same sentences, by BLEU.

    Raises ValueError where the lists differ in length or are empty.
    """
    _check(hypotheses, references)
    _check(others, references)
    systems = [("other", others), ("this", hypotheses)]  # the first is what is compared with
    test = PairedTest(
        systems, {"BLEU": _bleu(pair)}, [references], test_type="bs", n_samples=samples
    )
    _, results = test()
    other, this = results["BLEU"]
    return Comparison(float(this.score), float(other.score), float(this.p_value), samples)


def averages(
    scores: Mapping[str, float],
    *,
    trained: tuple[str, ...] | None = None,
    sizes: Mapping[str, int] | None = None,
    high_resource: int = 1_000_000,
) -> dict[str, float]:
    """Mean scores of groups of directions; groups without any are left out.

    trained: the directions that the model was trained on, None for all; others are "zero-shot" and
      in no other group. sizes: sentence pairs that each was trained on; with it those of at least
      `high_resource` and those below are groups.
    """
    seen = [p for p in scores if trained is None or p in trained]
    known = {p: sizes[p] for p in seen if p in sizes} if sizes else {}
    groups = {
        "all": seen,
        "en→xx": [p for p in seen if split_pair(p)[0] == "en"],
        "xx→en": [p for p in seen if split_pair(p)[1] == "en"],
        "high resource": [p for p, size in known.items() if size >= high_resource],
        "low resource": [p for p, size in known.items() if size < high_resource],
        "zero-shot": [p for p in scores if p not in seen],
    }
    return {
        name: float(np.mean([scores[p] for p in pairs])) for name, pairs in groups.items() if pairs
    }


def _bleu(pair: str) -> BLEU:
    return BLEU(tokenize="zh" if split_pair(pair)[1] == "zh" else "intl")


def _check(hypotheses: list[str], references: list[str]) -> None:
    if len(hypotheses) != len(references) or not references:
        raise ValueError(
            "hypotheses and references must be equally many and not empty, "
            f"got {len(hypotheses)} and {len(references)}"
        )
