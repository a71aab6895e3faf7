"""The Transformer: padding, batch mates and the future change nothing; steps equal the whole."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.tests.wmt import support
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.transformer import decode, decode_step, encode, start_cache
from taskmoe.wmt.text.tokenizer import BOS, PAD

ROUTINGS = [("dense", "dense"), ("token", "target"), ("sentence", "sentence"), ("pair", "token")]
SOURCE = np.array([[9, 8, 7, 6, 3], [10, 11, 3, 0, 0], [12, 3, 0, 0, 0]], np.int32)
TARGET = np.array([[20, 21, 22, 23], [24, 25, 26, 27], [28, 29, 30, 31]], np.int32)
PAIR = np.array([0, 2, 1], np.int32)


def config_of(encoder: Any, decoder: Any) -> ModelConfig:
    return support.model_config(encoder=encoder, decoder=decoder)


def tasks(config: ModelConfig, pair: Any = PAIR) -> list[Any]:
    tables = (config.task_table(side) for side in ("encoder", "decoder"))
    return [None if table is None else table[pair] for table in tables]


@functools.cache
def compiled(config: ModelConfig) -> Any:
    def run(params: Any, source: Any, target: Any, ids: Any, valid: Any) -> Any:
        memory, _ = encode(params, config, source, source != PAD, ids[0])
        start = jnp.full((len(target), 1), BOS)
        inputs = jnp.concatenate([start, target[:, :-1]], axis=1)
        return decode(params, config, memory, source != PAD, inputs, valid, ids[1])[0]

    return jax.jit(run)


def logits(
    config: ModelConfig, source: Any, target: Any, pair: Any = PAIR, valid: Any = None
) -> np.ndarray:
    valid = np.ones(target.shape, bool) if valid is None else valid
    run = compiled(config)(support.params(config), source, target, tasks(config, pair), valid)
    return np.asarray(run)


def assert_same(have: Any, want: Any) -> None:
    np.testing.assert_allclose(have, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(("encoder", "decoder"), ROUTINGS)
def test_padding_changes_nothing(encoder: str, decoder: str) -> None:
    config = config_of(encoder, decoder)
    narrow = logits(config, SOURCE, TARGET)
    assert narrow.dtype == np.float32
    wide = logits(config, np.pad(SOURCE, ((0, 0), (0, 3))), np.pad(TARGET, ((0, 0), (0, 2))))
    assert_same(wide[:, :4], narrow)


@pytest.mark.parametrize(("encoder", "decoder"), ROUTINGS)
def test_batch_mates_change_nothing(encoder: str, decoder: str) -> None:
    config = config_of(encoder, decoder)
    want = logits(config, SOURCE, TARGET)
    others = np.array([[5, 3, 0, 0, 0], [10, 11, 3, 0, 0], [7, 7, 7, 7, 3]], np.int32)
    target = TARGET[[2, 1, 0]]
    have = logits(config, others, target, np.array([2, 2, 0]))
    assert_same(have[1], want[1])
    assert np.abs(have[0] - want[0]).max() > 1e-2


@pytest.mark.parametrize(("encoder", "decoder"), ROUTINGS)
def test_no_position_sees_those_to_come(encoder: str, decoder: str) -> None:
    config = config_of(encoder, decoder)
    want = logits(config, SOURCE, TARGET)
    changed = TARGET.copy()
    changed[:, 2:] = 40  # position 3 is the first to read what stands at 2
    have = logits(config, SOURCE, changed)
    assert_same(have[:, :3], want[:, :3])
    assert (np.abs(have[:, 3] - want[:, 3]).max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize(("encoder", "decoder"), ROUTINGS)
def test_steps_with_a_cache_equal_the_whole(encoder: str, decoder: str) -> None:
    config = config_of(encoder, decoder)
    params, ids = support.params(config), tasks(config)
    valid = SOURCE != PAD

    @jax.jit
    def steps(target: Any) -> Any:
        memory, _ = encode(params, config, SOURCE, valid, ids[0])
        cache = start_cache(params, config, memory, valid, 6)
        found, token = [], jnp.full(3, BOS)
        for position in range(4):
            step, cache = decode_step(
                params, config, cache, valid, token, jnp.int32(position), ids[1]
            )
            found.append(step)
            token = target[:, position]
        return jnp.stack(found, axis=1)

    want = logits(config, SOURCE, TARGET)
    assert_same(steps(TARGET), want)
    other = np.where(np.arange(4) == 1, 40, TARGET)  # another token fed at position 2
    assert np.abs(steps(other)[:, 2:] - want[:, 2:]).max() > 1e-3


def test_a_task_decides_who_computes() -> None:
    config = config_of("token", "target")
    other = logits(config, SOURCE, TARGET, np.array([1, 2, 1]))
    want = logits(config, SOURCE, TARGET)
    assert np.abs(other[0] - want[0]).max() > 1e-3
    assert_same(other[1:], want[1:])


def test_dropout_needs_a_key_and_follows_it() -> None:
    config = support.model_config(encoder="dense", decoder="dense", dropout=0.5)
    params = support.params(config)
    valid = SOURCE != PAD

    @jax.jit
    def memory(seed: Any) -> Any:
        return encode(params, config, SOURCE, valid, None, key=jax.random.key(seed))[0]

    still = encode(params, config, SOURCE, valid, None)[0]
    first, again, second = memory(0), memory(0), memory(1)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-2
    assert np.abs(first - still).max() > 1e-2


def test_embeddings_are_dropped_too() -> None:
    config = support.model_config(encoder="dense", decoder="dense", dropout=0.5)
    # Layers that add nothing: what is left is the embeddings, normed.
    layers = jax.tree.map(lambda leaf: leaf * 0, support.params(config)["encoder"])
    params = support.params(config) | {"encoder": layers}
    memory = encode(params, config, SOURCE, SOURCE != PAD, None, key=jax.random.key(0))[0]
    assert 0.4 < np.mean(np.asarray(memory)[np.asarray(SOURCE != PAD)] == 0) < 0.6
