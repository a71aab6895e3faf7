"""Steps of beam search, the steps alone, and the machine's ceilings, timed in turns."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.console import each
from taskmoe.bench.harness.results import Result, Spread
from taskmoe.bench.harness.timing import alternate
from taskmoe.bench.serving import systems as serving
from taskmoe.bench.serving.beam.spec import Spec
from taskmoe.cli.devices import use_present_devices
from taskmoe.wmt.config import PRESETS, ModelConfig
from taskmoe.wmt.model import transformer
from taskmoe.wmt.model.decoding import search
from taskmoe.wmt.model.transformer import Params, Tasks, param_count, start_cache, with_softmax
from taskmoe.wmt.text.tokenizer import BOS, EOS, PAD

SHORT, LONG = 8, 40  # target positions of the two searches
SOURCE = 32  # source positions


@dataclasses.dataclass(frozen=True)
class Row:
    """A batch: bytes that a step must read, seconds of a step and of what it is held against."""

    batch: int
    bytes: int
    bytes_per_s: Spread
    step_s: Spread
    alone_s: Spread
    floor_s: Spread
    arithmetic_s: Spread
    over_floor: Spread
    alone_over_floor: Spread


@dataclasses.dataclass(frozen=True)
class Searched(Result):
    """A row a batch; config: the preset. parameters: of the model."""

    command: str
    machine: dict[str, str]
    config: str
    parameters: int
    beam: int
    rounds: int
    rows: list[Row]


def measure(spec: Spec) -> Searched:
    """Time every batch."""
    use_present_devices()
    config = sub_network_config(spec.config)
    params = jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), config)
    rows = []
    for batch in each("beam search", "batch sizes", spec.batches):
        rows.append(one_batch(params, config, batch, spec.beam, spec.rounds))
    return Searched(
        "beam", machine.describe(), spec.config, param_count(params), spec.beam, spec.rounds, rows
    )


def sub_network_config(preset: str) -> ModelConfig:
    """What a task's sub-network of a preset's target/target model is."""
    sizes = PRESETS[preset][0] | {"encoder_wide_d_ff": None, "decoder_wide_d_ff": None}
    return ModelConfig(pairs=("en-de",), encoder="dense", decoder="dense", **sizes)


def bytes_a_step(params: Params, config: ModelConfig, batch: int, beam: int) -> int:
    """Bytes that a step must read at least: the decoder's weights, softmax, and cache, once each.

    Keys and values of the source were projected before the first step, so their weights are not
    read. The cache holds as many positions as there are halfway from the short to the long search.
    """
    layers = [
        layer | {"cross": {k: v for k, v in layer["cross"].items() if k != "kv"}}
        for layer in params["decoder"]
    ]
    memory = jax.ShapeDtypeStruct((batch, SOURCE, config.d_model), jnp.float32)
    valid = jax.ShapeDtypeStruct((batch, SOURCE), jnp.bool_)
    make = functools.partial(start_cache, length=(SHORT + LONG) // 2, beam=beam)
    cache = jax.eval_shape(lambda p, m, v: make(p, config, m, v), params, memory, valid)
    softmax = with_softmax(params)["softmax"]
    leaves = jax.tree.leaves((layers, softmax, cache._replace(ancestors=None)))
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def one_batch(params: Params, config: ModelConfig, batch: int, beam: int, rounds: int) -> Row:
    """Time search, steps alone and the machine's ceilings in turns."""
    rng = np.random.default_rng(0)
    source = jnp.asarray(rng.integers(4, config.vocab_size, (batch, SOURCE)), jnp.int32)
    memory = jnp.asarray(rng.standard_normal((batch * beam, SOURCE, config.d_model)), jnp.float32)
    token = jnp.full((batch * beam,), BOS, jnp.int32)
    params = with_softmax(params)
    # A search that ends early would look fast: `</s>` is made as likely as the average word.
    params = params | {"softmax": params["softmax"].at[:, EOS].set(0)}
    large = jnp.ones((8192, 8192))
    row, square = jnp.ones((1, 8192)), jnp.ones((2048, 2048))

    def searching(length: int) -> Any:
        f = jax.jit(
            lambda p, s: search(p, config, s, Tasks(None, None), max_length=length, beam=beam)
        )
        return lambda: f(params, source)

    def stepping(length: int) -> Any:
        f = jax.jit(lambda p, m, t: serving.decode(p, config, m, t, length)[0])
        return lambda: f(params, memory, token)

    found = np.asarray(searching(LONG)()[0])
    if ((found == EOS) | (found == PAD)).any():
        raise RuntimeError("the search ended before its last position: its steps cannot be counted")
    product, copy = jax.jit(jnp.matmul), jax.jit(jnp.copy)
    seconds = alternate(
        {
            "search, short": searching(SHORT),
            "search, long": searching(LONG),
            "steps, short": stepping(SHORT),
            "steps, long": stepping(LONG),
            "copy": lambda: copy(large),
            "one row": lambda: product(row, large),
            "product": lambda: product(square, square),
        },
        rounds=rounds,
    )
    step = (seconds["search, long"] - seconds["search, short"]) / (LONG - SHORT)
    alone = (seconds["steps, long"] - seconds["steps, short"]) / (LONG - SHORT)
    bandwidth = np.maximum(2 * large.nbytes / seconds["copy"], large.nbytes / seconds["one row"])
    moved = bytes_a_step(params, config, batch, beam)
    floor = moved / bandwidth  # of each round: the machine's speed changes between rounds
    weights = sum(x.size for x in jax.tree.leaves((params["decoder"], params["softmax"])))
    arithmetic = 2 * weights * batch * beam * seconds["product"] / (2 * 2048**3)

    of = Spread.of
    return Row(
        batch, moved, of(bandwidth), of(step), of(alone), of(floor), of(arithmetic),
        of(step / floor), of(alone / floor),
    )  # fmt: skip
