"""Text to ids and back."""

import io
import tempfile
import unicodedata
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import sentencepiece

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.text.tokenizer import EOS, UNK, Tokenizer, train_tokenizer

# What text cannot hold: surrogates; U+2581 is SentencePiece's mark of a space. What is normalised
# has tests of its own: spaces, what is not seen, and marks that are composed with letters.
TEXT = st.text(
    st.characters(
        exclude_categories=["Cs", "Cc", "Cf", "Mn", "Mc", "Zs", "Zl", "Zp"],
        exclude_characters="\u2581",
    )
    | st.just(" ")
)
PLAIN = "une tête à Köln"


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(line=TEXT)
def test_text_comes_back_as_it_was(line: str) -> None:
    (ids,) = support.tokenizer().encode_target([line])
    assert ids[-1] == EOS
    assert UNK not in ids
    (back,) = support.tokenizer().decode([ids[:-1]])
    composed = unicodedata.normalize("NFC", line)
    assert back == " ".join(word for word in composed.split(" ") if word)


@pytest.mark.parametrize(
    "line",
    [
        *(PLAIN.replace(" ", space) for space in "\t\xa0\u1680\u2003\u2009\u202f\u3000"),
        *(PLAIN.replace(" ", space) for space in "\u2028\u2029\x85\v\u200b"),
        PLAIN.replace(" ", " \u200b"),
        PLAIN.replace("t", "\xadt"),
        f"\ufeff{PLAIN}\u200e",
        f"\u2067{PLAIN}\u2069\x00\x07".replace("\x00", ""),
        unicodedata.normalize("NFD", PLAIN),
        f"  {PLAIN} ",
    ],
    ids=ascii,
)
def test_what_looks_the_same_is_the_same(line: str) -> None:
    tokenizer = support.tokenizer()
    assert line != PLAIN
    assert tokenizer.encode_target([line]) == tokenizer.encode_target([PLAIN])
    assert tokenizer.encode_source([line], "fr") == tokenizer.encode_source([PLAIN], "fr")


def test_joiners_and_what_nfkc_would_rewrite_stay() -> None:
    lines = [
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\u0915\u094d\u200d\u0937",
        "\ufb01 \xbd \uff21\uff01",
    ]
    ids = [line[:-1] for line in support.tokenizer().encode_target(lines)]
    assert support.tokenizer().decode(ids) == lines
    (khmer,) = support.tokenizer().encode_target(["\u1781\u1789\u200b\u1791"])
    assert support.tokenizer().decode([khmer]) == ["\u1781\u1789\u1791"]


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(point=st.integers(0xA0, 0x1FFFF))
def test_every_letter_is_composed(point: int) -> None:
    hypothesis.assume(unicodedata.category(chr(point)) in ("Lu", "Ll", "Lo"))
    composed = unicodedata.normalize("NFC", chr(point))
    for form in (chr(point), unicodedata.normalize("NFD", chr(point))):
        (ids,) = support.tokenizer().encode_target([form])
        assert support.tokenizer().decode([ids]) == [composed]


def test_an_older_vocabulary_goes_on_as_it_was_made() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PLAIN] * 50), model_writer=model, vocab_size=290,
        hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity",
        pad_id=0, unk_id=1, bos_id=2, eos_id=3, minloglevel=2,
    )  # fmt: skip
    older = Tokenizer(model.getvalue())
    (ids,) = older.encode_target([PLAIN.replace(" ", "\xa0")])
    assert older.decode([ids]) == [PLAIN.replace(" ", "\xa0")]


def test_a_vocabulary_does_not_tell_where_it_was_made() -> None:
    assert tempfile.gettempdir().encode() not in support.tokenizer().model


def test_punctuation_of_every_script_is_kept() -> None:
    lines = ["你好，世界！", "1 234,5 €", "½ … №", "«oui»", "नमस्ते।"]
    ids = [line[:-1] for line in support.tokenizer().encode_target(lines)]
    assert support.tokenizer().decode(ids) == lines


def test_a_lost_id_is_noticed() -> None:
    (ids,) = support.tokenizer().encode_target(["one two three"])
    assert support.tokenizer().decode([ids[1:-1]]) != ["one two three"]


def test_the_source_starts_with_the_language_that_is_asked_for() -> None:
    tokenizer = support.tokenizer()
    (de,), (fr,) = (tokenizer.encode_source(["one two"], language) for language in ("de", "fr"))
    assert de[0] != fr[0]
    assert de[1:] == fr[1:] == tokenizer.encode_target(["one two"])[0]
    with pytest.raises(InputError, match="no token for target language 'xx'"):
        tokenizer.encode_source(["one"], "xx")


def test_a_language_token_in_text_is_plain_characters() -> None:
    tokenizer = support.tokenizer()
    tags = {tokenizer.encode_source(["one"], language)[0][0] for language in support.WORDS}
    assert len(tags) == 3
    for line in ("<2de>", "one <2fr> two"):
        (source,) = tokenizer.encode_source([line], "de")
        assert tags.isdisjoint(source[1:])
        assert tokenizer.decode([source]) == [line]


def test_special_ids_vanish_in_decoding() -> None:
    (ids,) = support.tokenizer().encode_target(["one two"])
    assert support.tokenizer().decode([[0, 2, *ids, 0]]) == ["one two"]


def test_a_vocabulary_is_the_same_from_the_same_text(tmp_path: Path) -> None:
    texts = {x: support.sentences(x, 200) for x in support.WORDS}
    assert train_tokenizer(texts, 330).model == support.tokenizer().model
    (tmp_path / "spm.model").write_bytes(support.tokenizer().model)
    loaded = Tokenizer.load(tmp_path / "spm.model")
    assert loaded.vocab_size == support.tokenizer().vocab_size <= 330


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "spm.model"
    for content in (b"", b"text", support.tokenizer().model[:-100]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"spm\.model is no SentencePiece model"):
            Tokenizer.load(path)
    with pytest.raises(InputError, match=r"gone is no SentencePiece model"):
        Tokenizer.load(tmp_path / "gone")


def test_a_vocabulary_too_small_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="vocab_size=20 does not fit this text"):
        train_tokenizer({"en": ["one two"] * 20}, 20)
    assert capfd.readouterr().err == ""
