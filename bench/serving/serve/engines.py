"""The engines that are compared: each translates batches of source ids into lists of ids."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.decoding import search
from taskmoe.wmt.model.transformer import Params, Tasks
from taskmoe.wmt.text.tokenizer import EOS, PAD

OURS = "taskmoe, float32"
THEIRS = {"CTranslate2, float32": "float32", "CTranslate2, int8": "int8"}
Ids = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Source ids, the first `rows` of them sentences [B, S] i32, and target positions at most."""

    source: np.ndarray
    rows: int
    max_length: int

    @functools.cached_property
    def sentences(self) -> Ids:
        """The ids without padding."""
        return [[int(t) for t in row if t != PAD] for row in self.source[: self.rows]]


#: Translates a batch with so many hypotheses.
Translate = Callable[[Batch, int], Ids]


def ctranslate2_version() -> str | None:
    """Of the package that is installed; None where it is not."""
    if importlib.util.find_spec("ctranslate2") is None:
        return None
    return str(importlib.import_module("ctranslate2").__version__)


def ours(params: Params, config: ModelConfig) -> Translate:
    """This library's search, compiled once for each shape."""

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def run(params: Params, source: jax.Array, max_length: int, beam: int) -> jax.Array:
        options: Any = {"max_length": max_length, "beam": beam, "alpha": 0.0}
        return search(params, config, source, Tasks(None, None), **options)[0]

    def translate(batch: Batch, beam: int) -> Ids:
        found = np.asarray(run(params, batch.source, batch.max_length, beam))[: batch.rows]
        return [_until_end(row.tolist()) for row in found]

    return translate


def theirs(folder: Path, compute_type: str, pieces: Sequence[str]) -> Translate:
    """CTranslate2 with a model that was exported into a folder, on all cores."""
    package = importlib.import_module("ctranslate2")
    translator: Any = package.Translator(
        str(folder), compute_type=compute_type, inter_threads=1, intra_threads=_cores()
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


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
