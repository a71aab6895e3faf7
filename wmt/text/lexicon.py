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
#: Pieces of a side, and pairs of pieces in all: the latter take about 51 bytes each.
LONGEST = 128
MOST = 1 << 25


class Lexicon(NamedTuple):
    """Pairs of pieces that stand in a sentence pair together: three arrays [N], sorted by source.

    source, target: ids i32. probability: f32 of the target piece, given that the source piece
    caused it; those of a source piece add up to 1.
    """

    source: np.ndarray
    target: np.ndarray
    probability: np.ndarray


def learnt_from(source: Sequence[Sequence[int]], target: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of the sentence pairs that a lexicon is learnt from.

    Those with a side beyond `LONGEST` pieces are left out, and all that come after `MOST` pairs of
    a piece and what may have caused it.
    """
    found, pairs = [], 0
    for i, (sentence, wanted) in enumerate(zip(source, target, strict=True)):
        if max(len(sentence), len(wanted)) > LONGEST:
            continue
        pairs += (len(sentence) + 1) * len(wanted)
        if pairs > MOST:
            break
        found.append(i)
    return found


def learn_lexicon(
    source: Sequence[Sequence[int]], target: Sequence[Sequence[int]], rounds: int = 5
) -> Lexicon:
    """A lexicon of sentence pairs as ids; rounds: of expectation maximisation.

    Raises ValueError where no target has a piece. Memory is bounded by `MOST`: see `learnt_from`.
    """
    chosen = learnt_from(source, target)
    widths = [len(source[i]) + 1 for i in chosen]
    heights = [len(target[i]) for i in chosen]
    keys = np.empty(sum(w * h for w, h in zip(widths, heights, strict=True)), np.int64)
    if not len(keys):
        raise ValueError("no target has a piece to learn from")
    at = 0
    for i, width, height in zip(chosen, widths, heights, strict=True):
        causes = np.array([NOTHING, *source[i]], np.int64) << 32
        part = keys[at : at + width * height].reshape(height, width)
        np.bitwise_or(causes, np.array(target[i], np.int64)[:, None], out=part)
        at += width * height
    places = np.repeat(widths, heights)
    starts = np.cumsum(places) - places
    pairs, which = np.unique(keys, return_inverse=True)
    del keys
    cause, effect = (pairs >> 32).astype(np.int32), (pairs & 0xFFFFFFFF).astype(np.int32)
    probability = np.ones(len(pairs))
    for _ in range(rounds):
        weight = probability[which]
        weight /= np.repeat(np.add.reduceat(weight, starts), places)
        count = np.bincount(which, weight, len(pairs))
        probability = count / np.bincount(cause, count)[cause]
    return Lexicon(cause, effect, probability.astype(np.float32))
