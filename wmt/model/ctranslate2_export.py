"""A model for CTranslate2, the C++ engine that serves Transformers on CPUs and GPUs.

The folder holds what `ctranslate2.Translator` loads (`model.bin`, `config.json` of CTranslate2's
own, `shared_vocabulary.json`), and beside it

    spm.model     the SentencePiece vocabulary
    export.json   longest source, how a source is spelled, and how long a translation may get
    vmap.txt      with a shortlist: its words, for `translate_batch(use_vmap=True)`

A program reads them with ctranslate2 and sentencepiece; docs/trainer.md has one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.attention import EPSILON
from taskmoe.wmt.model.decoding import MULTIPLE, length_limit
from taskmoe.wmt.model.export import DESCRIPTION, check_sizes
from taskmoe.wmt.model.quantization import is_quantized
from taskmoe.wmt.model.saved import VOCABULARY, Model, whole_folder
from taskmoe.wmt.model.shortlist import Shortlist
from taskmoe.wmt.model.transformer import Params, position_waves
from taskmoe.wmt.text.tokenizer import BOS, EOS, UNK

WEIGHTS = "model.bin"
VOCABULARY_MAP = "vmap.txt"


def export_ctranslate2(
    model: Model,
    folder: Path,
    *,
    length: int = 512,
    max_length: int | None = None,
    shortlist: Shortlist | None = None,
) -> int:
    """Write a dense model or a sub-network into a new folder that CTranslate2 serves.

    length: source tokens at most, `<2xx> pieces </s>`. max_length: target positions at most; None
      is `decoding.length_limit` of each sentence, as `translate` has it. shortlist: the words of
      its directions together, as CTranslate2 knows no direction. Weights are float32; CTranslate2
      makes int8 or others of them as it loads.
    Returns the size of the weights in bytes. Raises InputError where a side is routed (a task's
    sub-network is what is served) or the model is quantised, ctranslate2 is not installed, a number
    does not fit or the folder is not empty.
    """
    config = model.config
    if {config.encoder, config.decoder} != {"dense"}:
        raise InputError(
            f"CTranslate2 has no mixtures (encoder is {config.encoder}, decoder is "
            f"{config.decoder}): extract a task or distill a dense model first"
        )
    if is_quantized(model.params):
        raise InputError("the model is quantised: export what it was made of, in float32")
    check_sizes(length=length, max_length=max_length)
    longest = max_length or length_limit(length)
    spec = specification(model.params, config, model.tokenizer.pieces(), max(length, longest))
    described = {
        "format": "ctranslate2",
        "length": length,
        "max_length": max_length,
        "multiple": MULTIPLE,
        "directions": list(config.pairs),
        "source": "<2xx> pieces </s>, xx the target language",
    }
    with whole_folder(folder) as beside:
        spec.save(str(beside))
        if shortlist is not None:
            lines = vocabulary_map(shortlist, config.pairs, model.tokenizer.pieces())
            (beside / VOCABULARY_MAP).write_text(lines, encoding="utf-8")
        (beside / VOCABULARY).write_bytes(model.tokenizer.model)
        (beside / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return (folder / WEIGHTS).stat().st_size


def specification(
    params: Params, config: ModelConfig, pieces: Sequence[str], positions: int
) -> Any:
    """A dense model as CTranslate2's `TransformerSpec`, with a table of so many positions.

    pieces: of the vocabulary, in the order of their ids. Raises InputError without ctranslate2.
    """
    try:
        from ctranslate2 import specs
    except ModuleNotFoundError:
        raise InputError(
            "this export needs ctranslate2: pip install 'taskmoe[ctranslate2]'"
        ) from None
    encoder = specs.TransformerEncoderSpec(config.encoder_layers, config.num_heads, rms_norm=True)
    decoder = specs.TransformerDecoderSpec(config.decoder_layers, config.num_heads, rms_norm=True)
    source = params["embedding"]
    target = params.get("target_embedding", source)
    # Aliased where they are the same, so that a tied matrix is stored once.
    encoder.embeddings[0].weight = _array(source)
    decoder.embeddings.weight = _array(target)
    decoder.projection.weight = _array(params["softmax"].T if "softmax" in params else source)
    waves = _array(position_waves(jnp.arange(positions), config.d_model))
    for side, spec in (("encoder", encoder), ("decoder", decoder)):
        # Its own sinusoids have other wavelengths and begin at position 1.
        spec.position_encodings.encodings = waves
        spec.layer_norm.gamma = _array(params[f"{side}_norm"])
        for layer, p in zip(spec.layer, params[side], strict=True):
            _attention(layer.self_attention, p["attention"], ("qkv", "out"))
            if side == "decoder":
                _attention(layer.attention, p["cross"], ("query", "kv", "out"))
            _feed_forward(layer.ffn, p["feed_forward"])
    spec = specs.TransformerSpec(encoder, decoder)
    spec.register_source_vocabulary(list(pieces))
    spec.register_target_vocabulary(list(pieces))
    spec.config.unk_token, spec.config.bos_token = pieces[UNK], pieces[BOS]
    spec.config.eos_token, spec.config.decoder_start_token = pieces[EOS], pieces[BOS]
    spec.config.add_attribute("layer_norm_epsilon", EPSILON)
    spec.validate()
    spec.optimize()
    return spec


def vocabulary_map(shortlist: Shortlist, directions: Sequence[str], pieces: Sequence[str]) -> str:
    """As CTranslate2 reads it: source piece, tab, its words; first those that always count.

    Raises InputError for a direction that the shortlist lacks.
    """

    def line(piece: str, words: Iterable[int]) -> str:
        return f"{piece}\t{' '.join(pieces[i] for i in words)}\n"

    every = [shortlist.of(pair) for pair in directions]
    always = np.unique(np.concatenate([np.arange(EOS + 1), *(own.first for own in every)]))
    lines = [line("", always)]
    for i, piece in enumerate(pieces):
        words = np.unique(np.concatenate([own.of(i) for own in every]))
        if len(words):
            lines.append(line(piece, words))
    return "".join(lines)


def _attention(spec: Any, p: Params, names: tuple[str, ...]) -> None:
    spec.layer_norm.gamma = _array(p["norm"])
    for linear, name in zip(spec.linear, names, strict=True):
        linear.weight = _array(p[name].T)


def _feed_forward(spec: Any, p: Params) -> None:
    spec.layer_norm.gamma = _array(p["norm"])
    spec.linear_0.weight = _array(p["ffn"].w_in.T)
    spec.linear_1.weight = _array(p["ffn"].w_out.T)


def _array(x: Any) -> np.ndarray:
    """On the host, float32, in rows."""
    return np.ascontiguousarray(np.asarray(x, np.float32))
