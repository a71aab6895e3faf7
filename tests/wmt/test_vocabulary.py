"""A vocabulary is trained on what is kept, and each language has its share of it."""

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.config import split_pair
from taskmoe.wmt.text import vocabulary
from taskmoe.wmt.text.folders import Pairs
from taskmoe.wmt.text.sources import cache_folder, open_source
from taskmoe.wmt.text.tokenizer import train_tokenizer
from taskmoe.wmt.text.vocabulary import drawn_vocabulary

CONFIG = support.train_config(vocab_sentences=1000)


class Lines:
    """All lines of a direction, of which none is left out."""

    def __init__(self, pair: str, text: Pairs) -> None:
        self.pair, self._all = pair, list(zip(*text[pair], strict=True))
        self.most = 0  # that were asked for at once

    def kept(self) -> int:
        return len(self._all)

    def lines(self, which: np.ndarray) -> Iterator[tuple[str, str]]:
        self.most = max(self.most, len(which))
        return (self._all[i] for i in which)


def directions(count: int = 200) -> list[Lines]:
    text = support.text(count)
    return [Lines(pair, text) for pair in text]


def test_each_line_of_little_text_counts_once_a_language() -> None:
    texts: dict[str, list[str]] = {}
    for pair, sides in sorted(support.text().items()):
        for language, side in zip(split_pair(pair), sides, strict=True):
            texts.setdefault(language, []).extend(side)
    texts = {language: list(dict.fromkeys(texts[language])) for language in sorted(texts)}
    expected = train_tokenizer(texts, 330, sentences=1000).model
    assert drawn_vocabulary(330, CONFIG, directions()).model == expected
    # Whatever the directions' order.
    assert drawn_vocabulary(330, CONFIG, directions()[::-1]).model == expected
    twice = {language: lines * 2 for language, lines in texts.items()}
    assert train_tokenizer(twice, 330, sentences=2000).model != expected


def test_of_much_text_no_more_is_read_than_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_WHOLE", 1000)
    much = directions(2000)
    config = support.train_config(vocab_sentences=300)
    first = drawn_vocabulary(330, config, much)
    assert 0 < max(each.most for each in much) < 200
    assert drawn_vocabulary(330, config, directions(2000)).model == first.model
    other = support.train_config(vocab_sentences=300, seed=1)
    assert drawn_vocabulary(330, other, directions(2000)).model != first.model
    for language in support.WORDS:  # each has its token
        first.with_languages([language]).encode_source(["one"], language)


def test_a_language_has_its_share_of_the_text_however_poor_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[str] = []
    model = support.tokenizer().model

    def take(sentence_iterator: Any, model_writer: Any, **_: Any) -> None:
        drawn.extend(sentence_iterator)
        model_writer.write(model)

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", take)
    texts = {"en": [f"e{i}" for i in range(2000)], "de": [f"d{i}" for i in range(50)]}
    for temperature, sentences, total in ((5.0, 1000, 1000), (1.0, 1000, 1000), (5.0, 9999, 2050)):
        drawn.clear()
        train_tokenizer(texts, 330, temperature=temperature, sentences=sentences)
        share = np.array([2000, 50]) ** (1 / temperature)
        counts = collections.Counter(line[0] for line in drawn)
        want = share / share.sum() * total
        np.testing.assert_allclose([counts["e"], counts["d"]], want, atol=1)
        other = np.array([2000, 50]) ** (1 / (6 - temperature))
        assert abs(counts["d"] - other[1] / other.sum() * total) > 100
        german = collections.Counter(line for line in drawn if line[0] == "d")
        assert max(german.values()) - min(german[f"d{i}"] for i in range(50)) <= 1


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "taskmoe"
    assert cache_folder(tmp_path / "own") == tmp_path / "own"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "taskmoe"


def test_a_corpus_needs_a_cache_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache folder .*file: .*; name another with --cache"):
        open_source("cldr", cache=tmp_path / "file").read("train", "en-de")
