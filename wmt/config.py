"""Configurations of the translation model and of its training, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import numpy as np

from taskmoe.cli.errors import InputError
from taskmoe.moe import MoEConfig

SideRouting = Literal["dense", "token", "sentence", "target", "source", "pair", "static"]
_MOST_LAYERS = 1000
_MOST_NUMBERS = 2**40  # in one array: XLA's own arithmetic on sizes overflows far above
TASK_LEVELS = ("target", "source", "pair")


def split_pair(pair: str) -> tuple[str, str]:
    """ "en-de" -> ("en", "de"). Raises ValueError where it is not two different codes."""
    source, dash, target = pair.partition("-")
    if not (source and dash and target) or "-" in target or source == target:
        raise ValueError(f"pair must be two different language codes like 'en-de', got {pair!r}")
    return source, target


class _Json:
    """Reading and writing a frozen dataclass as a JSON object, and checking its fields' types."""

    def check_types(self) -> None:
        """Raise ValueError that names the first field whose value is not of its type."""
        for name, wanted in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, wanted):
                words = str(getattr(wanted, "__name__", wanted)).replace("typing.", "")
                if get_origin(wanted) is Literal:
                    words = f"one of {', '.join(get_args(wanted))}"
                if type(value) is int and abs(value) >= 2**31:
                    words += " below 2^31"
                raise ValueError(f"{name} must be {words}, got {value!r}")

    def to_json(self) -> str:
        """All fields, as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_json`; raises ValueError that names an unknown field."""
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"{cls.__name__} has no field {unknown[0]!r}; it has {sorted(known)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of a field's type: a plain type, Literal, tuple[T, ...] or T | None."""
    if get_origin(wanted) is Literal:
        return value in get_args(wanted)
    if get_origin(wanted) is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(wanted)[0]) for v in value)
    if get_args(wanted):
        return any(_fits(value, kind) for kind in get_args(wanted))
    if wanted is float:
        # Compared, not converted: an int may be too long for a float.
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if wanted is int:  # what follows counts in 32 bits in places
        return type(value) is int and abs(value) < 2**31
    return type(value) is wanted


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Json):
    """An encoder-decoder Transformer whose every other feed-forward layer is a mixture.

    pairs: the translation directions, like "en-de"; their order is the order of task ids.
    vocab_size: of the shared SentencePiece vocabulary.
    d_model, d_ff: width of the model, and hidden width of a feed-forward layer or an expert.
    num_heads: of attention, each of d_model / num_heads.
    encoder_layers, decoder_layers: every other one, from the second on, is a mixture.
    num_experts, top_k: experts of a mixture, and how many of them each unit goes to.
    capacity_factor: room of an expert over its even share; null is room for all (dropless).
    encoder, decoder: routing of the mixture layers on each side: "dense" (no mixture), "token",
      "sentence", a task level ("target" language, "source" language or "pair"), or "static": the
      i-th target language has experts i*top_k, i*top_k + 1, ..., modulo num_experts, for good.
    encoder_wide_d_ff, decoder_wide_d_ff: hidden width of the feed-forward layers that stand where
      the mixtures would, on a dense side. None is `top_k * d_ff`: equal compute per token with a
      mixture, and what an extracted sub-network has. The paper's dense baseline has d_ff.
    tie_embeddings: one matrix for source, target and softmax; the paper unties all three.
    dropout: share of entries dropped, while training, of the embeddings and of what each attention
      and feed-forward layer adds (Vaswani et al. 2017, 5.4).
    """

    pairs: tuple[str, ...]
    vocab_size: int
    d_model: int = 512
    d_ff: int = 2048
    num_heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder: SideRouting = "target"
    decoder: SideRouting = "target"
    num_experts: int = 32
    top_k: int = 2
    encoder_wide_d_ff: int | None = None
    decoder_wide_d_ff: int | None = None
    capacity_factor: float | None = None
    tie_embeddings: bool = False
    dropout: float = 0.1

    def __post_init__(self) -> None:
        self.check_types()
        for pair in self.pairs:
            split_pair(pair)
        if not self.pairs or len(set(self.pairs)) != len(self.pairs):
            raise ValueError(f"pairs must be one or more different directions, got {self.pairs}")
        sizes = ("vocab_size", "d_model", "d_ff", "num_heads", "num_experts", "top_k")
        for name in (*sizes, "encoder_layers", "decoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("encoder_layers", "decoder_layers"):
            if getattr(self, name) > _MOST_LAYERS:
                raise ValueError(
                    f"{name} must be at most {_MOST_LAYERS}, got {getattr(self, name)}"
                )
        wide = map(self.wide_d_ff, ("encoder", "decoder"))
        width = max(3 * self.d_model, self.vocab_size, self.num_experts * self.d_ff, *wide)
        if width >= 2**31 or width * self.d_model > _MOST_NUMBERS:
            raise ValueError(
                "vocab_size, top_k * d_ff and num_experts * d_ff must be below 2^31, and below "
                f"2^40 once multiplied by d_model, got d_model={self.d_model}, d_ff={self.d_ff}, "
                f"num_experts={self.num_experts}, vocab_size={self.vocab_size}"
            )
        if self.d_model % (2 * self.num_heads):
            raise ValueError(
                f"d_model must be a multiple of 2*num_heads={2 * self.num_heads}, "
                f"got {self.d_model}"
            )
        for side in ("encoder", "decoder"):
            width = getattr(self, f"{side}_wide_d_ff")
            if width is not None and width < 1:
                raise ValueError(f"{side}_wide_d_ff must be at least 1 or None, got {width}")
            self.moe(side)  # raises where sizes do not fit
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def wide_d_ff(self, side: str) -> int:
        """Hidden width of the dense layers that stand where the mixtures of a side would."""
        return getattr(self, f"{side}_wide_d_ff") or self.top_k * self.d_ff

    def moe(self, side: str) -> MoEConfig | None:
        """The mixture layer of "encoder" or "decoder"; None on a dense side."""
        routing = getattr(self, side)
        if routing == "dense":
            return None
        by_task = routing in TASK_LEVELS
        table = None
        if routing == "static":
            first = [task * self.top_k for task in range(len(self.tasks(side)))]
            table = tuple(
                tuple((at + j) % self.num_experts for j in range(self.top_k)) for at in first
            )
        return MoEConfig(
            d_model=self.d_model,
            d_ff=self.d_ff,
            num_experts=self.num_experts,
            top_k=self.top_k,
            routing="task" if by_task else routing,
            num_tasks=len(self.tasks(side)) if by_task else 0,
            table=table,
            capacity_factor=None if by_task or table else self.capacity_factor,
        )

    def task_name(self, side: str, pair: str) -> str | None:
        """The task that a direction is on a side; None where that is not task-routed."""
        source, target = split_pair(pair)
        names = {"target": target, "static": target, "source": source, "pair": pair}
        return names.get(getattr(self, side))

    def tasks(self, side: str) -> tuple[str, ...]:
        """Names of a side's tasks in the order of their ids; empty where not task-routed."""
        names = dict.fromkeys(self.task_name(side, pair) for pair in self.pairs)
        return tuple(name for name in names if name is not None)

    def task_table(self, side: str) -> np.ndarray | None:
        """Task id of each pair on one side: [len(pairs)] i32; None where not task-routed."""
        tasks = self.tasks(side)
        if not tasks:
            return None
        ids = [tasks.index(str(self.task_name(side, pair))) for pair in self.pairs]
        return np.array(ids, np.int32)


def check_languages(config: ModelConfig, pair: str) -> None:
    """Raise InputError where a direction's languages are not the model's: it may join them anew."""
    source, target = split_pair(pair)
    targets = {split_pair(p)[1] for p in config.pairs}
    if target not in targets or source not in targets | {split_pair(p)[0] for p in config.pairs}:
        raise InputError(f"pair {pair}: the model knows only {', '.join(config.pairs)}")


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Json):
    """How a model is trained.

    steps: optimiser steps in all.
    batch_tokens: source plus target positions of one step's batch, padding included.
    buckets: padded sentence lengths in tokens; longer sentences are left out (and counted).
    row_multiple: every part of a batch has a multiple of so many sentences, for devices to share
      evenly.
    temperature: T of p ~ size^(1/T) over directions (the paper: 5).
    max_sentences: of each direction and source, the first so many; None is all.
    max_characters, max_ratio, drop_copied, deduplicate, drop_held_out: what training text is left
      out, see `taskmoe.wmt.text.cleaning`.
    vocab_sentences: sentences that the vocabulary is trained on, drawn as directions are.
    schedule: "inverse_sqrt" after `warmup_steps` (the paper), or "cosine" down to 0 at `steps`.
    optimizer: "adafactor" (the paper) or "adamw". learning_rate: its peak, after warm-up.
    weight_decay: share of every weight that a step takes off, times the learning rate.
    beta2, epsilon: AdamW's decay of the squares' mean, and what is added to its root.
    clip_norm: largest global gradient norm.
    warmup_steps: over which the learning rate rises. label_smoothing: share of the wanted
      distribution that is spread over all words.
    compute_dtype: of activations and of the weights as they are multiplied; the weights that the
      optimiser keeps are float32 always, and so are norms, routing, logits and losses.
    accumulate: parts that a batch is cut into by rows, one after the other, whose gradients are
      added up: less memory, the same step.
    remat: recompute each layer while gradients are taken instead of keeping its activations.
    checkpoint_every, keep_checkpoints: steps between checkpoints, and how many stay.
    seed: of parameters, dropout and the order of text.
    max_skipped: steps in a row whose gradients are not finite; each is left out, more end the run.
    """

    steps: int = 1000
    batch_tokens: int = 8192
    buckets: tuple[int, ...] = (16, 32, 64, 128)
    row_multiple: int = 1
    temperature: float = 5.0
    max_sentences: int | None = None
    max_characters: int = 1000
    max_ratio: float = 3.0
    drop_copied: bool = True
    deduplicate: bool = True
    drop_held_out: bool = True
    vocab_sentences: int = 200_000
    optimizer: Literal["adafactor", "adamw"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    schedule: Literal["inverse_sqrt", "cosine"] = "inverse_sqrt"
    label_smoothing: float = 0.1
    weight_decay: float = 0.0
    beta2: float = 0.98
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    accumulate: int = 1
    remat: bool = False
    max_skipped: int = 10
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_types()
        counts = (
            "row_multiple",
            "max_characters",
            "max_sentences",
            "vocab_sentences",
            "accumulate",
        )
        steps = ("batch_tokens", "checkpoint_every", "keep_checkpoints", "warmup_steps")
        for name in (*steps, *counts):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, got {self.steps}")
        rising = sorted(set(self.buckets)) == list(self.buckets)
        if not self.buckets or not rising or self.buckets[0] < 1:
            raise ValueError(f"buckets must be rising lengths, got {self.buckets}")
        rows = self.row_multiple * self.accumulate
        if 2 * self.buckets[-1] * rows > self.batch_tokens:
            words = "one pair" if rows == 1 else f"row_multiple={self.row_multiple} pairs"
            words += "" if self.accumulate == 1 else f" in each of {self.accumulate} parts"
            raise ValueError(
                f"batch_tokens must hold {words} of the longest bucket, "
                f"{2 * self.buckets[-1] * rows}, got {self.batch_tokens}"
            )
        if self.max_ratio < 1:
            raise ValueError(f"max_ratio must be at least 1, got {self.max_ratio}")
        if self.temperature < 0.05:  # sizes to the power of 1/T stay numbers
            raise ValueError(f"temperature must be at least 0.05, got {self.temperature}")
        for name in ("learning_rate", "clip_norm", "epsilon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "seed", "max_skipped"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("label_smoothing", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    def batch_rows(self, length: int) -> int:
        """Sentences in a batch of a bucket: `batch_tokens` source plus target positions.

        Rounded down so that each of `accumulate` parts has a multiple of `row_multiple`.
        """
        multiple = self.row_multiple * self.accumulate
        return self.batch_tokens // (2 * length) // multiple * multiple


# Named sizes: overrides of the two dataclasses' defaults.
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        {
            "vocab_size": 4000,
            "d_model": 128,
            "d_ff": 256,
            "num_heads": 4,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "num_experts": 8,
            "tie_embeddings": True,
            "dropout": 0.0,
        },
        {"batch_tokens": 4096, "buckets": (16, 32, 64), "learning_rate": 3e-3},
    ),
    "small": (
        {
            "vocab_size": 8000,
            "d_model": 256,
            "d_ff": 1024,
            "num_heads": 4,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "num_experts": 16,
            "tie_embeddings": True,
        },
        {},
    ),
    "base": (
        {"vocab_size": 64000, "encoder_wide_d_ff": 2048, "decoder_wide_d_ff": 2048},
        {
            "batch_tokens": 65536,
            "optimizer": "adafactor",
            "learning_rate": 0.015,  # 3.0 / sqrt(warm-up)
            "warmup_steps": 40000,
            "vocab_sentences": 2_000_000,
            "checkpoint_every": 1000,
            "steps": 200000,
        },
    ),
    "big": (
        {
            "vocab_size": 64000,
            "d_model": 1024,
            "d_ff": 8192,
            "num_heads": 16,
            "num_experts": 128,
            "encoder_wide_d_ff": 8192,
            "decoder_wide_d_ff": 8192,
        },
        {
            "batch_tokens": 262144,
            "optimizer": "adafactor",
            "learning_rate": 0.015,  # 3.0 / sqrt(warm-up)
            "warmup_steps": 40000,
            "vocab_sentences": 2_000_000,
            "checkpoint_every": 1000,
            "steps": 200000,
        },
    ),
}
