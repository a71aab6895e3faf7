"""The workloads whose speed `check` guards: a training step and decoding of a small fixed model.

Paper's best routing (token-routed encoder, target-routed decoder), random parameters, one CPU
device. Sizes are frozen: a stored ratio belongs to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from taskmoe.bench.gate import calibration
from taskmoe.wmt.config import ModelConfig, TrainConfig
from taskmoe.wmt.model import decoding, transformer
from taskmoe.wmt.text.data import Batch
from taskmoe.wmt.text.tokenizer import PAD
from taskmoe.wmt.training.step import init_state, make_train_step

PAIRS = ("en-de", "de-en", "en-fr", "fr-en")
MODEL = ModelConfig(
    pairs=PAIRS,
    vocab_size=1024,
    d_model=64,
    d_ff=128,
    num_heads=4,
    encoder_layers=2,
    decoder_layers=4,
    encoder="token",
    decoder="target",
    num_experts=8,
    tie_embeddings=True,
    dropout=0.0,
)
SENTENCES, SOURCE_LENGTH, POSITIONS = 32, 16, 24
TRAIN_SENTENCES, TRAIN_LENGTH = 8, 16


class Workload(NamedTuple):
    """run: starts it once. calibration: starts what stands beside it. tokens: of one run."""

    run: Callable[[], Any]
    calibration: Callable[[], Any]
    tokens: int


def decode() -> Workload:
    """Greedy search of a batch of mixed directions; tokens are those decoded."""
    params = transformer.init(jax.random.key(0), MODEL)
    source = _ids(SENTENCES, SOURCE_LENGTH)
    table = MODEL.task_table("decoder")
    assert table is not None
    tasks = transformer.Tasks(None, jnp.asarray(table)[np.arange(SENTENCES) % len(PAIRS)])

    def program(params: Any, source: jax.Array, tasks: Any) -> Any:
        return decoding.search(params, MODEL, source, tasks, max_length=POSITIONS)

    inputs = params, source, tasks
    run = functools.partial(jax.jit(program).lower(*inputs).compile(), *inputs)
    tokens = int((np.asarray(run()[0]) != PAD).sum())
    return Workload(run, calibration.decoding(), tokens)


def train() -> Workload:
    """Optimiser steps one after another, each on the same batch; tokens are source and target."""
    config = TrainConfig(steps=1000, learning_rate=1e-3)
    step = make_train_step(MODEL, config)
    state = [init_state(MODEL, config, None)]
    source, target = _ids(TRAIN_SENTENCES, TRAIN_LENGTH), _ids(TRAIN_SENTENCES, TRAIN_LENGTH)
    batch = Batch(source, target, target, np.arange(TRAIN_SENTENCES, dtype=np.int32) % len(PAIRS))

    def run() -> Any:
        state[0], sums = step(state[0], batch)
        return sums["loss"]

    return Workload(run, calibration.training(), source.size + target.size)


def _ids(rows: int, length: int) -> np.ndarray:
    """Token ids without padding or any special one."""
    return np.random.default_rng(0).integers(8, MODEL.vocab_size, (rows, length), np.int32)


WORKLOADS = {"decode": decode, "train": train}
