"""A shared SentencePiece vocabulary with a target-language token in front of the source."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from taskmoe.cli.errors import InputError, exhausted
from taskmoe.wmt.text.normalization import rules

PAD, UNK, BOS, EOS = 0, 1, 2, 3


class Tokenizer:
    """Text to ids and back. Ids 0 to 3 are padding, unknown, `<s>` and `</s>`.

    Text is normalised by the rules that lie in the model: those of `taskmoe.wmt.text.normalization`
    where `train_tokenizer` made it, none where it is older.
    """

    def __init__(self, model: bytes) -> None:
        """model: a serialised SentencePiece model, as `train_tokenizer` makes it."""
        if not model:
            raise ValueError("it is empty")
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a model file; raises InputError where it is not one."""
        try:
            return cls(path.read_bytes())
        except (OSError, RuntimeError, ValueError) as error:
            if exhausted(error):
                raise
            raise InputError(f"{path} is no SentencePiece model: {error}") from None

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return int(self._processor.vocab_size())

    def pieces(self) -> list[str]:
        """All pieces in the order of their ids."""
        return [str(self._processor.id_to_piece(i)) for i in range(self.vocab_size)]

    def piece_id(self, piece: str) -> int:
        """Id of a piece; UNK for one that is not there."""
        return int(self._processor.piece_to_id(piece))

    def with_languages(self, languages: Iterable[str]) -> Tokenizer:
        """The same with a token for each of these target languages, new ones behind all pieces."""
        tokens = [language_token(language) for language in languages]
        if missing := [token for token in tokens if self.piece_id(token) == UNK]:
            whole = sentencepiece_model_pb2.ModelProto.FromString(self.model)
            kind = sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
            for token in missing:
                whole.pieces.add(piece=token, score=0.0, type=kind)
            whole.trainer_spec.control_symbols.extend(missing)
            whole.trainer_spec.vocab_size = len(whole.pieces)
            return Tokenizer(whole.SerializeToString(deterministic=True))
        return self

    def encode_source(self, lines: list[str], target_language: str) -> list[list[int]]:
        """`<2xx> pieces </s>` of each line; raises InputError for a language without a token."""
        tag = self.piece_id(language_token(target_language))
        if tag == UNK:
            raise InputError(f"the vocabulary has no token for target language {target_language!r}")
        return [[tag, *ids, EOS] for ids in self._processor.encode(lines)]

    def encode_target(self, lines: list[str]) -> list[list[int]]:
        """`pieces </s>` of each line."""
        return [[*ids, EOS] for ids in self._processor.encode(lines)]

    def decode(self, ids: list[list[int]]) -> list[str]:
        """Text of id sequences; special ids vanish."""
        return [str(line) for line in self._processor.decode(ids)]


def language_token(language: str) -> str:
    """The piece that asks for a target language."""
    return f"<2{language}>"


def drawn_shares(sizes: Sequence[int], sentences: int, temperature: float) -> list[int]:
    """How many sentences of each language are drawn, with p ~ size^(1/T): `sentences` in all."""
    size = np.array(sizes)
    weight = np.where(size > 0, size, 1.0) ** (1 / temperature) * (size > 0)
    drawn = min(sentences, int(size.sum()))
    return [int(n) for n in np.ceil(weight / max(weight.sum(), 1e-300) * drawn - 1e-9)]


def train_tokenizer(
    texts: dict[str, list[str]],
    vocab_size: int,
    *,
    temperature: float = 5.0,
    sentences: int = 200_000,
    seed: int = 0,
    shares: Sequence[int] | None = None,
) -> Tokenizer:
    """Train a unigram vocabulary on text sampled with p ~ size^(1/T) over languages.

    texts: language -> sentences. vocab_size: pieces, byte pieces and language tokens included; a
    text too poor for so many gets fewer. sentences: how many are drawn for training, at most as
    many as there are; a language that has fewer than its share is gone through again.
    Raises InputError where the size does not fit the text.
    """
    rng = np.random.default_rng(seed)
    sizes = [len(lines) for lines in texts.values()]
    quota = drawn_shares(sizes, sentences, temperature) if shares is None else shares

    def draw() -> Iterable[str]:
        for lines, n in zip(texts.values(), quota, strict=True):
            chosen = np.resize(rng.permutation(len(lines)), n)
            yield from (lines[i] for i in chosen)

    model = io.BytesIO()
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="ascii") as file:
            file.write(rules())
            file.flush()
            _train(draw(), model, vocab_size, file.name, sorted(texts))
    except RuntimeError as error:
        raise InputError(f"vocab_size={vocab_size} does not fit this text: {error}") from None
    whole = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    whole.normalizer_spec.ClearField("normalization_rule_tsv")  # where the file was
    return Tokenizer(whole.SerializeToString(deterministic=True))


def _train(
    lines: Iterable[str], model: io.BytesIO, vocab_size: int, rules: str, languages: list[str]
) -> None:
    """rules: the file of the normalisation."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=0.9999,
        normalization_rule_tsv=rules,
        byte_fallback=True,
        pad_id=PAD,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        # Control symbols are never found in text: a "<2de>" in it is plain characters.
        control_symbols=[language_token(language) for language in languages],
        num_threads=2,
        minloglevel=2,
    )
