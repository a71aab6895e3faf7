"""Which target pieces translate which source pieces, learnt from encoded sentence pairs.

IBM's model 1 (Brown et al. 1993, section 4.1): each target piece was caused by one of the source's
pieces, or by none. Expectation maximisation finds how probable each is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from taskmoe.wmt.text.tokenizer import PAD

#: Stands among a sentence's source pieces for the cause of what nothing in it caused.
NOTHING = PAD


class Lexicon(NamedTuple):
    """Pairs of pieces that stand in a sentence pair together: three arrays [N], sorted by source.

    source, target: ids i32. probability: f32 of the target piece, given that the source piece
    caused it; those of a source piece add up to 1.
    """

    source: np.ndarray
    target: np.ndarray
    probability: np.ndarray


def learn_lexicon(
    source: Sequence[Sequence[int]], target: Sequence[Sequence[int]], rounds: int = 5
) -> Lexicon:
    """A lexicon of sentence pairs as ids; rounds: of expectation maximisation.

    Memory grows by 28 bytes for each source piece times target piece of a sentence pair.
    Raises ValueError where there is no pair of pieces.
    """
    causes, effects = [], []
    for sentence, wanted in zip(source, target, strict=True):
        caused_by = np.array([NOTHING, *sentence], np.int64)
        causes.append(np.tile(caused_by, len(wanted)))
        effects.append(np.repeat(np.array(wanted, np.int64), len(caused_by)))
    places = np.array([len(s) + 1 for s, t in zip(source, target, strict=True) for _ in t])
    if not len(places):
        raise ValueError("no sentence pair has a piece on both sides")
    starts = np.concatenate([[0], np.cumsum(places)[:-1]])
    keys = np.concatenate(causes) << 32 | np.concatenate(effects)
    pairs, which = np.unique(keys, return_inverse=True)
    cause, effect = (pairs >> 32).astype(np.int32), (pairs & 0xFFFFFFFF).astype(np.int32)
    probability = np.ones(len(pairs))
    for _ in range(rounds):
        weight = probability[which]
        weight /= np.repeat(np.add.reduceat(weight, starts), places)
        count = np.bincount(which, weight, len(pairs))
        probability = count / np.bincount(cause, count)[cause]
    return Lexicon(cause, effect, probability.astype(np.float32))
