"""The vocabulary of a training set, trained on lines drawn from those that are kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from taskmoe.wmt.config import TrainConfig, split_pair
from taskmoe.wmt.text.tokenizer import Tokenizer, drawn_shares, train_tokenizer

_WHOLE = 1_000_000  # lines of all sides that may be in memory at once


class KeptLines(Protocol):
    """The lines of one direction that training takes."""

    pair: str

    def kept(self) -> int:
        """How many they are."""

    def lines(self, which: np.ndarray) -> Iterator[tuple[str, str]]:
        """Some of them, by rising number."""


def drawn_vocabulary(size: int, config: TrainConfig, directions: Sequence[KeptLines]) -> Tokenizer:
    """`train_tokenizer` on lines drawn with p ~ size^(1/T) over languages.

    Of a text of up to a million lines each different one counts once a language, however many
    directions it stands in; of a larger one only what is drawn is in memory. Raises InputError as
    `train_tokenizer` does.
    """
    sides = sorted(
        ((split_pair(each.pair)[side], each.pair, side, each) for each in directions
         for side in (0, 1)),
        key=lambda each: each[:3],
    )  # fmt: skip
    by_language = {
        language: list(group)
        for language, group in itertools.groupby(sides, key=lambda each: each[0])
    }
    sizes = [sum(each.kept() for _, _, _, each in group) for group in by_language.values()]
    whole = sum(sizes) <= _WHOLE
    shares = sizes if whole else drawn_shares(sizes, config.vocab_sentences, config.temperature)
    rng = np.random.default_rng(config.seed)
    drawn: dict[str, list[str]] = {}
    for (language, group), kept, share in zip(by_language.items(), sizes, shares, strict=True):
        chosen = np.sort(rng.choice(kept, min(kept, share), replace=False, shuffle=False))
        lines: list[str] = []
        for _, _, side, each in group:
            own = chosen[chosen < each.kept()]
            lines.extend(line[side] for line in each.lines(own))
            chosen = chosen[len(own) :] - each.kept()
        drawn[language] = list(dict.fromkeys(lines))
    return train_tokenizer(
        drawn,
        size,
        temperature=config.temperature,
        sentences=config.vocab_sentences,
        seed=config.seed,
        shares=None if whole else shares,
    )
