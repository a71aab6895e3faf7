"""What the translation system's tests share: a tiny language, its vocabulary and tiny models."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from taskmoe.wmt.config import ModelConfig, TrainConfig
from taskmoe.wmt.model import transformer
from taskmoe.wmt.model.saved import Model
from taskmoe.wmt.text.data import Pairs
from taskmoe.wmt.text.tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "multi30k"

PAIRS = ("en-de", "de-en", "en-fr")
WORDS = {
    "en": "one two three four five six".split(),
    "de": "eins zwei drei vier fünf sechs".split(),
    "fr": "un deux trois quatre cinq six".split(),
}


def sentences(language: str, count: int, seed: int = 0) -> list[str]:
    """Numbers spelled out, the same ones in every language."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 6, rng.integers(2, 6)) for _ in range(count)]
    return [" ".join(WORDS[language][i] for i in row) for row in rows]


def text(count: int = 200, pairs: tuple[str, ...] = PAIRS) -> Pairs:
    split = (pair.split("-") for pair in pairs)
    return {f"{a}-{b}": (sentences(a, count), sentences(b, count)) for a, b in split}


def write_folder(folder: Path, count: int = 200) -> Path:
    folder.mkdir()
    for language in WORDS:
        for split, n, seed in (("train", count, 0), ("valid", 12, 1)):
            lines = "".join(f"{line}\n" for line in sentences(language, n, seed))
            (folder / f"{split}.{language}").write_text(lines, encoding="utf-8")
    return folder


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer({x: sentences(x, 200) for x in WORDS}, 330)


def model_config(**fields: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "pairs": PAIRS,
        "vocab_size": tokenizer().vocab_size,
        "d_model": 16,
        "d_ff": 16,
        "num_heads": 2,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "num_experts": 4,
        "tie_embeddings": True,
        "dropout": 0.0,
    }
    return ModelConfig(**(sizes | fields))


def train_config(**fields: Any) -> TrainConfig:
    sizes: dict[str, Any] = {
        "steps": 12,
        "batch_tokens": 512,
        "buckets": (16,),
        "learning_rate": 1e-2,
        "warmup_steps": 20,
        "checkpoint_every": 4,
    }
    return TrainConfig(**(sizes | fields))


@functools.cache
def params(config: ModelConfig, seed: int = 0) -> Any:
    """Fresh parameters whose next-token distributions are far from flat."""
    made = jax.jit(transformer.init, static_argnums=1)(jax.random.key(seed), config)
    return jax.tree.map(lambda leaf: leaf * (1.0 if leaf.ndim == 1 else 1.5), made)


def model(**fields: Any) -> Model:
    config = model_config(**fields)
    return Model(params(config), config, tokenizer())
