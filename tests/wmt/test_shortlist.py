"""A shortlist of words: what is learnt from sentence pairs, and searches among those alone."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.__main__ import main
from taskmoe.wmt.model import shortlist as module
from taskmoe.wmt.model.quantization import quantized
from taskmoe.wmt.model.saved import Model, save_model
from taskmoe.wmt.model.shortlist import Candidates, Shortlist, learn_candidates, shortlist_of
from taskmoe.wmt.model.translation import Decoding, translate, translate_n_best
from taskmoe.wmt.text import lexicon
from taskmoe.wmt.text.lexicon import NOTHING, learn_lexicon
from taskmoe.wmt.text.tokenizer import EOS, Tokenizer


def test_model_1_finds_which_word_causes_which() -> None:
    # The house, the book, a book: Knight's example, in which "book" alone cannot be told by counts.
    the, a, house, book = 10, 11, 12, 13
    das, ein, haus, buch = 20, 21, 22, 23
    source, target = [[the, house], [the, book], [a, book]], [[das, haus], [das, buch], [ein, buch]]
    found = learn_lexicon(source, target, rounds=30)
    table = {(s, t): p for s, t, p in zip(*found, strict=True)}
    for word, wanted in ((the, das), (a, ein), (house, haus), (book, buch)):
        own = {t: p for (s, t), p in table.items() if s == word}
        assert max(own, key=lambda t: own[t]) == wanted
        np.testing.assert_allclose(sum(own.values()), 1, rtol=1e-5)
    assert NOTHING in found.source


def by_loops(source: Any, target: Any, rounds: int) -> dict[tuple[int, int], float]:
    table: dict[tuple[int, int], float] = {}
    for s, t in zip(source, target, strict=True):
        table |= dict.fromkeys([(i, j) for j in t for i in [NOTHING, *s]], 1.0)
    for _ in range(rounds):
        count = dict.fromkeys(table, 0.0)
        for s, t in zip(source, target, strict=True):
            for j in t:
                total = sum(table[i, j] for i in [NOTHING, *s])
                for i in [NOTHING, *s]:
                    count[i, j] += table[i, j] / total
        sums: dict[int, float] = {}
        for (i, _), c in count.items():
            sums[i] = sums.get(i, 0.0) + c
        table = {(i, j): c / sums[i] for (i, j), c in count.items()}
    return table


def test_long_sentences_and_what_is_too_much_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lexicon, "LONGEST", 3)
    monkeypatch.setattr(lexicon, "MOST", 12)
    source, target = [[9, 9, 9, 9], [10], [11, 12], [13]], [[20], [20, 21], [22, 23], [24]]
    assert lexicon.learnt_from(source, target) == [1, 2, 3]
    assert 9 not in learn_lexicon(source, target).source
    assert lexicon.learnt_from(source * 2, target * 2) == [1, 2, 3]
    assert 13 not in learn_lexicon(source[:3] * 2, target[:3] * 2).source


sentence = st.lists(st.integers(4, 9), max_size=4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(sentence, sentence), min_size=1, max_size=6), st.integers(0, 3))
def test_the_lexicon_is_that_of_plain_loops(pairs: list[Any], rounds: int) -> None:
    source, target = zip(*pairs, strict=True)
    if not any(target):
        with pytest.raises(ValueError, match="no target has a piece"):
            learn_lexicon(source, target, rounds)
        return
    found = learn_lexicon(source, target, rounds)
    want = by_loops(source, target, rounds)
    got = {(int(s), int(t)): float(p) for s, t, p in zip(*found, strict=True)}
    assert got.keys() == want.keys()
    np.testing.assert_allclose([got[x] for x in want], list(want.values()), rtol=1e-5)
    assert list(got) == sorted(got)


def test_another_number_of_rounds_is_noticed() -> None:
    source, target = [[4, 5], [4, 6]], [[7, 8], [7, 9]]
    found, want = learn_lexicon(source, target, 3), by_loops(source, target, 2)
    got = {(int(s), int(t)): float(p) for s, t, p in zip(*found, strict=True)}
    with pytest.raises(AssertionError):
        np.testing.assert_allclose([got[x] for x in want], list(want.values()), rtol=1e-5)


def test_candidates_are_the_likeliest_the_frequent_and_the_piece_itself() -> None:
    source = [[10, 12], [10, 13], [11, 13]] * 3
    target = [[20, 22], [20, 23], [21, 23]] * 3
    found = learn_candidates(source, target, 40, first=1, best=1)
    assert {int(w) for w in found.of(12)} == {22, 12}
    assert {int(w) for w in found.of(13)} == {23, 13}
    assert {int(w) for w in found.of(30)} == {30}  # never seen
    assert len(found.of(EOS)) == 0
    # One of the two most frequent, and the likeliest that nothing caused.
    assert len(found.first) <= 2
    assert set(found.first.tolist()) <= {20, 21, 22, 23}
    with pytest.raises(ValueError, match="best must be at least 0, got -1"):
        learn_candidates(source, target, 40, best=-1)


def made(size: int, multiple: int, monkeypatch: pytest.MonkeyPatch) -> Shortlist:
    monkeypatch.setattr(module, "MULTIPLE", multiple)
    own = Candidates(np.array([7], np.int32), np.arange(size + 1), np.arange(size, dtype=np.int32))
    return Shortlist(
        {"en-de": own, "en-fr": dataclasses.replace(own, first=own.first + 1)}, "", size
    )


def test_a_batchs_words_are_sorted_special_ones_first_and_of_few_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some = made(40, 8, monkeypatch)
    source = np.array([[20, 3, 0], [30, 20, 3]], np.int32)
    found = some.words(["en-de", "en-de"], source)
    assert found is not None
    assert found.tolist() == [0, 1, 2, 3, 4, 7, 20, 30]  # filled up with 4
    both = some.words(["en-de", "en-fr"], source)
    assert both is not None
    assert both.tolist() == [0, 1, 2, 3, 7, 8, 20, 30]
    assert made(40, 64, monkeypatch).words(["en-de"], source[:1]) is None
    with pytest.raises(InputError, match="no direction de-en, only en-de, en-fr"):
        some.words(["de-en"], source[:1])


def everything(model: Model, but: tuple[int, ...] = ()) -> Shortlist:
    """A shortlist of all words but some."""
    size = model.tokenizer.vocab_size
    words = np.setdiff1d(np.arange(size), but).astype(np.int32)
    none = Candidates(words, np.zeros(size + 1, np.int64), words[:0])
    return shortlist_of(dict.fromkeys(model.config.pairs, none), model.tokenizer)


def requests(count: int = 12) -> list[tuple[str, str]]:
    return [("en-de", line) for line in support.sentences("en", count, seed=3)]


def ids_of(model: Model, how: Decoding, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What `translate` finds, as ids: texts of an untrained model are other pieces' too."""
    rows: list[list[int]] = []
    decode = Tokenizer.decode

    def spy(self: Tokenizer, ids: list[list[int]]) -> list[str]:
        rows.extend(ids)
        return decode(self, ids)

    with monkeypatch.context() as patched:
        patched.setattr(Tokenizer, "decode", spy)
        translate(model, requests(), how)
    return rows


@pytest.mark.parametrize("kind", ["tied", "untied", "int8", "target"])
@pytest.mark.parametrize("beam", [1, 3])
def test_words_that_are_not_wanted_change_no_translation(
    kind: str, beam: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = "target" if kind == "target" else "dense"
    model = support.model(encoder=side, decoder=side, tie_embeddings=kind != "untied")
    if kind == "int8":
        model = dataclasses.replace(model, params=quantized(model.params))
    how = Decoding(beam=beam, max_length=8, alpha=0.0)
    want = ids_of(model, how, monkeypatch)
    said = {i for row in want for i in row}
    monkeypatch.setattr(module, "MULTIPLE", 1)
    unused = sorted(set(range(4, model.tokenizer.vocab_size)) - said)
    if beam == 1:  # a beam's other hypotheses take other words too
        short = dataclasses.replace(how, shortlist=everything(model, tuple(unused[::2])))
        assert ids_of(model, short, monkeypatch) == want
    most = max(said, key=lambda i: sum(i in row for row in want))
    for without in ((most,), tuple(unused[:50]), (*unused[:100], most)):
        short = dataclasses.replace(how, shortlist=everything(model, without))
        found = ids_of(model, short, monkeypatch)
        assert not {i for row in found for i in row} & set(without)
        assert (found != want) or most not in without


def test_scores_are_those_among_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MULTIPLE", 1)
    model = support.model(encoder="dense", decoder="dense")
    how = Decoding(beam=1, max_length=1)
    (whole,) = translate_n_best(model, requests(1), how)
    short = dataclasses.replace(how, shortlist=everything(model, tuple(range(50, 150))))
    (among,) = translate_n_best(model, requests(1), short)
    assert among[0].score > whole[0].score


def test_a_shortlist_comes_back_from_its_file_and_knows_its_vocabulary(tmp_path: Path) -> None:
    model = support.model(encoder="dense", decoder="dense")
    some = everything(model, (9,))
    some.save(tmp_path / "words.npz")
    back = Shortlist.load(tmp_path / "words.npz", model.tokenizer)
    jax.tree.map(
        np.testing.assert_array_equal,
        *({p: dataclasses.asdict(c) for p, c in x.candidates.items()} for x in (some, back)),
    )
    assert back.digest() == some.digest() != everything(model, (10,)).digest()
    with pytest.raises(InputError, match="of another vocabulary than the model's"):
        Shortlist.load(tmp_path / "words.npz", model.tokenizer.with_languages(["nl"]))
    for content in (b"", b"words", (tmp_path / "words.npz").read_bytes()[:200]):
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(InputError, match="is no shortlist"):
            Shortlist.load(tmp_path / "broken.npz", model.tokenizer)
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    with pytest.raises(InputError, match="is no shortlist"):
        Shortlist.load(tmp_path / "other.npz", model.tokenizer)


def test_from_the_command_line(tmp_path: Path, capsys: Any) -> None:
    data = support.write_folder(tmp_path / "data")
    save_model(support.model(encoder="dense", decoder="dense"), tmp_path / "model")
    model, file = ["--model", str(tmp_path / "model")], str(tmp_path / "words.npz")
    words = ["shortlist", *model, "--data", str(data), "--out", file]
    assert main([*words, "--first", "5", "--best", "2"]) == 0
    assert "words for 3 directions" in capsys.readouterr().out
    text = tmp_path / "text"
    text.write_text("one two three\n\nsix\n")
    asked = ["translate", *model, "--pair", "en-de", "--input", str(text), "--beam", "2"]
    assert main([*asked, "--shortlist", file]) == 0
    assert capsys.readouterr().out.count("\n") == 3
    scored = ["evaluate", *model, "--data", str(data), "--split", "valid", "--limit", "2"]
    assert main([*scored, "--shortlist", file]) == 0
    capsys.readouterr()
    for wrong, message in (
        ([*words, "--best", "-1"], "best must be at least 0, got -1"),
        ([*words, "--limit", "0"], "--limit must be at least 1, got 0"),
        ([*asked, "--shortlist", str(text)], f"{text} is no shortlist"),
        ([*asked, "--shortlist", str(tmp_path / "none")], "is no shortlist"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
