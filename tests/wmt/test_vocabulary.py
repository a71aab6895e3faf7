"""A vocabulary is kept by its content: found again for the same, made anew for anything else."""

import collections
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.text import vocabulary
from taskmoe.wmt.text.folders import Pairs
from taskmoe.wmt.text.sources import cache_folder, open_source
from taskmoe.wmt.text.tokenizer import Tokenizer, train_tokenizer
from taskmoe.wmt.text.vocabulary import cached_vocabulary

SETTINGS: dict[str, Any] = {"temperature": 5.0, "sentences": 1000, "seed": 0}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, list[str]]]:
    """The texts that a vocabulary was asked for; the same one is given for all, at once."""
    asked: list[dict[str, list[str]]] = []

    def train(texts: dict[str, list[str]], *_: Any, **__: Any) -> Tokenizer:
        asked.append(texts)
        return support.tokenizer()

    monkeypatch.setattr(vocabulary, "train_tokenizer", train)
    return asked


def make(cache: Path, text: Pairs | None = None, size: int = 330, **fields: Any) -> bytes:
    return cached_vocabulary(text or support.text(9), size, cache, **(SETTINGS | fields)).model


def test_the_same_text_and_settings_are_trained_on_once(
    tmp_path: Path, trained: list[dict[str, list[str]]]
) -> None:
    notes: list[str] = []
    first = make(tmp_path, note=notes.append)
    turned = {pair: support.text(9)[pair] for pair in reversed(support.PAIRS)}
    assert make(tmp_path, turned, note=notes.append) == first  # whatever the directions' order
    (texts,) = trained
    assert list(texts) == ["de", "en", "fr"]
    assert texts["en"] == list(dict.fromkeys(support.sentences("en", 9)))  # once, not thrice
    (entry,) = tmp_path.iterdir()
    size = support.tokenizer().vocab_size
    assert notes == [
        f"vocabulary of {size} pieces, kept in {entry}",
        f"vocabulary of {size} pieces from {entry}",
    ]


def test_any_other_text_or_setting_is_another_vocabulary(
    tmp_path: Path, trained: list[dict[str, list[str]]]
) -> None:
    make(tmp_path)
    source, target = support.text(9)["en-de"]
    one_more = support.text(9) | {"en-de": ([*source, "seven"], [*target, "sieben"])}
    joined = support.text(9) | {"en-de": ([source[0] + source[1], *source[2:]], target[1:])}
    for text in (one_more, joined, {"en-de": (source, target)}, {"en-nl": (source, target)}):
        make(tmp_path, text)
    make(tmp_path, size=331)
    for change in ({"temperature": 1.0}, {"sentences": 1001}, {"seed": 1}):
        make(tmp_path, **change)
    assert len(trained) == len(list(tmp_path.iterdir())) == 9


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_a_damaged_entry_is_made_anew(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    cache = tmp_path_factory.mktemp("kept")
    trained: list[int] = []

    def train(*_: Any, **__: Any) -> Tokenizer:
        trained.append(1)
        return support.tokenizer()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "train_tokenizer", train)
        make(cache)
        (entry,) = cache.iterdir()
        whole = entry.read_bytes()
        at = data.draw(st.integers(0, len(whole) - 1))
        flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        entry.write_bytes(data.draw(st.sampled_from([whole[:at], flipped, whole + b"\0"])))
        notes: list[str] = []
        assert make(cache, note=notes.append) == support.tokenizer().model
        assert "is damaged; training the vocabulary anew" in notes[0]
        assert entry.read_bytes() == whole
        make(cache)
        assert len(trained) == 2


def test_a_vocabulary_that_is_trained_for_real(tmp_path: Path) -> None:
    texts = {x: list(dict.fromkeys(support.sentences(x, 200))) for x in sorted(support.WORDS)}
    expected = train_tokenizer(texts, 330, sentences=1000).model
    assert make(tmp_path, support.text()) == expected
    assert make(tmp_path, support.text()) == expected
    for language in support.WORDS:  # each has its token
        Tokenizer(expected).encode_source(["one"], language)


def test_a_language_has_its_share_of_the_text_however_poor_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[str] = []

    def take(sentence_iterator: Any, model_writer: Any, **_: Any) -> None:
        drawn.extend(sentence_iterator)
        model_writer.write(support.tokenizer().model)

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


def test_a_cache_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    made = cached_vocabulary(support.text(), 330, tmp_path / "file", **SETTINGS, note=said.append)
    assert made.vocab_size <= 330
    assert f"not kept: {tmp_path}/file: " in said[0]
    with pytest.raises(InputError, match=r"cache folder .*file: .*; name another with --cache"):
        open_source("cldr", cache=tmp_path / "file").read("train", "en-de")
