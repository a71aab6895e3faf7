"""Text to ids and back."""

from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.text.tokenizer import EOS, UNK, Tokenizer, train_tokenizer

# What text cannot hold: surrogates; U+2581 is SentencePiece's mark of a space.
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2581"))


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(line=TEXT)
def test_text_comes_back_as_it_was(line: str) -> None:
    (ids,) = support.tokenizer().encode_target([line])
    assert ids[-1] == EOS
    assert UNK not in ids
    (back,) = support.tokenizer().decode([ids[:-1]])
    assert back == " ".join(word for word in line.split(" ") if word)


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
