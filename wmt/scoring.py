"""BLEU of translations with sacreBLEU, and the averages that the paper reports."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sacrebleu.metrics import BLEU

from taskmoe.wmt.config import split_pair


class Score(NamedTuple):
    """BLEU in [0, 100] of one direction, with sacreBLEU's signature and the number of sentences."""

    bleu: float
    signature: str
    sentences: int


def score(pair: str, hypotheses: list[str], references: list[str]) -> Score:
    """BLEU as in the paper: mixed case, smooth exp, tokenizer intl, zh for Chinese.

    Raises ValueError where the lists differ in length or are empty.
    """
    if len(hypotheses) != len(references) or not references:
        raise ValueError(
            "hypotheses and references must be equally many and not empty, "
            f"got {len(hypotheses)} and {len(references)}"
        )
    metric = BLEU(tokenize="zh" if split_pair(pair)[1] == "zh" else "intl")
    bleu = float(metric.corpus_score(hypotheses, [references]).score)
    return Score(bleu, str(metric.get_signature()), len(references))


def averages(scores: dict[str, Score]) -> dict[str, float]:
    """Mean BLEU over all directions, those out of English and those into English."""
    groups = {
        "all": list(scores),
        "en→xx": [p for p in scores if split_pair(p)[0] == "en"],
        "xx→en": [p for p in scores if split_pair(p)[1] == "en"],
    }
    return {
        name: float(np.mean([scores[p].bleu for p in pairs]))
        for name, pairs in groups.items()
        if pairs
    }
