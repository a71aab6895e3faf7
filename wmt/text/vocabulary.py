"""The vocabulary of a run: trained on its text, and kept for the next run on the same text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import sentencepiece

from taskmoe.cli.command_line import write_bytes
from taskmoe.wmt.config import split_pair
from taskmoe.wmt.text.folders import Pairs
from taskmoe.wmt.text.tokenizer import Tokenizer, train_tokenizer

_DIGEST_BYTES = 32


def cached_vocabulary(
    text: Pairs,
    vocab_size: int,
    cache: Path,
    *,
    temperature: float,
    sentences: int,
    seed: int,
    note: Callable[[str], None] = lambda _: None,
) -> Tokenizer:
    """`train_tokenizer` on the text of all directions, each different sentence once a language.

    cache: folder that keeps vocabularies by a hash of the text and of all settings; an entry that
      is damaged is made anew, and where none can be written the vocabulary is not kept. note:
      called with a line that says where the vocabulary is from.
    Raises InputError as `train_tokenizer` does.
    """
    lines: dict[str, list[str]] = {}
    for pair in sorted(text):  # so that the order of directions does not count
        for language, side in zip(split_pair(pair), text[pair], strict=True):
            lines.setdefault(language, []).extend(side)
    lines = {language: list(dict.fromkeys(lines[language])) for language in sorted(lines)}
    entry = cache / f"vocabulary-{_key(lines, vocab_size, temperature, sentences, seed)}.spm"
    kept = _read(entry)
    if kept is not None:
        note(f"vocabulary of {kept.vocab_size:,} pieces from {entry}")
        return kept
    if entry.exists():
        note(f"{entry} is damaged; training the vocabulary anew")
    made = train_tokenizer(
        lines, vocab_size, temperature=temperature, sentences=sentences, seed=seed
    )
    kept_where = f"kept in {entry}"
    try:
        write_bytes(entry, hashlib.sha256(made.model).digest() + made.model)
    except OSError as error:
        kept_where = f"not kept: {entry.parent}: {error.strerror}"
    note(f"vocabulary of {made.vocab_size:,} pieces, {kept_where}")
    return made


def _key(
    lines: dict[str, list[str]], vocab_size: int, temperature: float, sentences: int, seed: int
) -> str:
    digest = hashlib.sha256()
    versions = [sentencepiece.__version__, "3"]  # the second: of how train_tokenizer works
    settings = [vocab_size, float(temperature), sentences, seed, versions]
    digest.update(json.dumps([settings, {x: len(v) for x, v in lines.items()}]).encode())
    for every in lines.values():
        for line in every:
            digest.update(line.encode() + b"\n")
    return digest.hexdigest()[:32]


def _read(entry: Path) -> Tokenizer | None:
    """The vocabulary of an entry; None where there is none or its digest does not fit."""
    if not entry.is_file():
        return None
    data = entry.read_bytes()
    digest, model = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return Tokenizer(model) if hashlib.sha256(model).digest() == digest and model else None
