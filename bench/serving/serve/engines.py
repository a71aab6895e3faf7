"""The engines that are compared: each translates batches of source ids into lists of ids."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taskmoe.bench.harness import machine
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.beams import Search
from taskmoe.wmt.model.continuous import Keep, Sentences, prepared, search_many
from taskmoe.wmt.model.ctranslate2_export import VOCABULARY_MAP
from taskmoe.wmt.model.shortlist import narrowed
from taskmoe.wmt.model.transformer import Params, Tasks
from taskmoe.wmt.text.tokenizer import EOS, PAD

OURS = {"taskmoe, float32": "float32", "taskmoe, int8": "int8"}
THEIRS = {"CTranslate2, float32": "float32", "CTranslate2, int8": "int8"}
Ids = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sentences, the most that are ever at once, and target positions at most."""

    sentences: Ids
    rows: int
    max_length: int


#: Translates a batch with so many hypotheses.
Translate = Callable[[Batch, int], Ids]


def ctranslate2_version() -> str | None:
    """Of the package that is installed; None where it is not."""
    if importlib.util.find_spec("ctranslate2") is None:
        return None
    return str(importlib.import_module("ctranslate2").__version__)


def ours(params: Params, config: ModelConfig, words: np.ndarray | None = None) -> Translate:
    """This library's search as `translate` runs it for many sentences, once compiled.

    words: sorted ids that it looks at, as a shortlist's; None is all.
    """
    alone = Tasks(None, None)
    params = prepared(params, config, alone)

    def translate(batch: Batch, beam: int) -> Ids:
        how = Search(batch.max_length, beam, alpha=0.0, scored=False)
        used = params if words is None else narrowed(params, words)  # each batch has its own
        limits = [batch.max_length] * len(batch.sentences)
        sentences = Sentences(batch.sentences, limits, alone)
        translations: Ids = [[] for _ in limits]
        # As `translate` does: a text's last batch may hold few.
        rows = min(batch.rows, 1 << (len(limits) - 1).bit_length())
        for names, found, _ in search_many(used, config, how, sentences, Keep(rows)):
            found = found if words is None else words[found]
            for name, row in zip(names, found[:, 0], strict=True):
                translations[name] = _until_end(row.tolist())
        return translations

    return translate


def theirs(folder: Path, compute_type: str, pieces: Sequence[str]) -> Translate:
    """CTranslate2 with a model that was exported into a folder, on all cores.

    It looks at the words of the folder's vocabulary map, where there is one.
    """
    package = importlib.import_module("ctranslate2")
    translator: Any = package.Translator(
        str(folder), compute_type=compute_type, inter_threads=1, intra_threads=machine.cores()
    )
    ids = {piece: i for i, piece in enumerate(pieces)}

    def translate(batch: Batch, beam: int) -> Ids:
        results = translator.translate_batch(
            [[pieces[i] for i in row] for row in batch.sentences],
            beam_size=beam,
            length_penalty=0,
            min_decoding_length=0,
            max_decoding_length=batch.max_length,
            max_input_length=0,
            use_vmap=(folder / VOCABULARY_MAP).exists(),
        )
        return [[ids[piece] for piece in result.hypotheses[0]] for result in results]

    return translate


def _until_end(row: list[int]) -> list[int]:
    """A translation without `</s>` and what is behind it, or without padding behind a cut one."""
    if EOS in row:
        return row[: row.index(EOS)]
    while row and row[-1] == PAD:
        row.pop()
    return row
