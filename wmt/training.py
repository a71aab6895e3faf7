"""The training loop, from a work directory's newest checkpoint to a model folder."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskmoe import moe
from taskmoe.wmt.checkpoints import Checkpoints
from taskmoe.wmt.command_line import write_text
from taskmoe.wmt.config import ModelConfig, TrainConfig
from taskmoe.wmt.data import Batch, TrainingData
from taskmoe.wmt.errors import InputError
from taskmoe.wmt.model import Model, save_model
from taskmoe.wmt.tokenizer import PAD, Tokenizer
from taskmoe.wmt.transformer import Params, decode, encode, init

# Fields that a run may change when it goes on: they do not change what a step computes.
_FREE = ("steps", "checkpoint_every", "keep_checkpoints")


class State(NamedTuple):
    """What a checkpoint holds. step: [] i32, optimiser steps taken."""

    params: Params
    optimizer: Any
    step: jax.Array


class Progress(NamedTuple):
    """What the loop reports: means since the last report.

    loss: nats per target token, label smoothing and auxiliary losses left out.
    tokens_per_s: source and target tokens, padding left out.
    dropped: share of assignments that found no room; busiest: largest load of an expert times E.
    """

    step: int
    steps: int
    loss: float
    tokens_per_s: float
    dropped: float
    busiest: float


def train(
    workdir: Path,
    model_config: ModelConfig,
    config: TrainConfig,
    data: TrainingData,
    tokenizer: Tokenizer,
    *,
    source: str,
    report: Callable[[Progress], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
    report_every: int = 20,
) -> Model:
    """Train up to `config.steps` in all, going on from the work directory's newest checkpoint.

    model_config: its vocab_size is what the vocabulary was asked for; the model gets the
      tokenizer's, which is smaller where the text is poor.
    source: name of the data, kept with the configuration; a work directory serves one of each.
    report: called about every `report_every` steps. note: called with lines worth knowing, such as
    where it resumes and which checkpoint was damaged.
    Returns the model, which is also written to `workdir/model`.
    Raises InputError if the work directory belongs to another configuration, FloatingPointError if
    the loss stops being finite (checkpoints stay as they are).
    """
    claim_workdir(workdir, model_config, config, source)
    model_config = dataclasses.replace(model_config, vocab_size=tokenizer.vocab_size)
    optimizer = make_optimizer(config)
    state = jax.jit(functools.partial(_init_state, model_config, optimizer))(
        jax.random.key(config.seed)
    )
    checkpoints = Checkpoints(workdir / "checkpoints", config.keep_checkpoints)
    try:
        step, state, problems = checkpoints.restore(state)
        for problem in problems:
            note(f"{problem}; " + (f"using the one of step {step}" if step else "starting anew"))
        if step:
            note(f"resuming at step {step} of {config.steps}")
        train_step = make_train_step(model_config, config, optimizer)
        log = (workdir / "log.jsonl").open("a", encoding="utf-8")
        with log:
            pending: list[dict[str, jax.Array]] = []
            tokens, since = 0, time.perf_counter()
            while step < config.steps:
                batch = data.batch(step)
                state, sums = train_step(state, batch)
                pending.append(sums)
                tokens += int((batch.source != PAD).sum() + (batch.target_out != PAD).sum())
                step += 1
                save = step % config.checkpoint_every == 0 or step == config.steps
                if save or len(pending) == report_every:
                    progress = _summarise(step, config.steps, pending, tokens, since)
                    _check_finite(step, progress.loss, state.params if save else None, checkpoints)
                    log.write(json.dumps(progress._asdict()) + "\n")
                    log.flush()
                    report(progress)
                    if save:
                        checkpoints.save(step, state)
                    pending, tokens, since = [], 0, time.perf_counter()
    finally:
        checkpoints.close()
    model = Model(state.params, model_config, tokenizer)
    save_model(model, workdir / "model", replace=True)
    return model


def claim_workdir(
    workdir: Path, model_config: ModelConfig, config: TrainConfig, source: str
) -> None:
    """Write the configuration into a new work directory, or check that it is the same.

    Raises InputError as `check_workdir` does.
    """
    if check_workdir(workdir, model_config, config, source):
        return
    write_text(
        workdir / "config.json",
        json.dumps(_description(model_config, config, source), indent=2) + "\n",
    )


def check_workdir(
    workdir: Path, model_config: ModelConfig, config: TrainConfig, source: str
) -> bool:
    """Whether a work directory is there and belongs to this configuration; False where it is new.

    Raises InputError that names the first field that differs. How checkpoints are kept may change,
    and `steps` under a schedule that does not look at them.
    """
    path = workdir / "config.json"
    if path.is_file():
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is damaged: {error}") from None
        a, b = _flat(theirs), _flat(_description(model_config, config, source))
        for name in sorted(a.keys() | b.keys()):
            if a.get(name) != b.get(name):
                raise InputError(
                    f"work directory {workdir} belongs to another configuration: {name} is "
                    f"{a.get(name)!r} there and {b.get(name)!r} here; name another --workdir"
                )
        return True
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"work directory {workdir} is a file")
    if workdir.is_dir() and any(workdir.glob("checkpoints/*")):
        raise InputError(f"{workdir} has checkpoints but no config.json; name another --workdir")
    return False


def _description(model_config: ModelConfig, config: TrainConfig, source: str) -> dict[str, Any]:
    """What a work directory's config.json holds."""
    free = _FREE if config.schedule == "inverse_sqrt" else _FREE[1:]  # cosine looks at steps
    fields = dataclasses.asdict(config)
    whole = {
        "data": source,
        "model": dataclasses.asdict(model_config),
        "train": {name: value for name, value in fields.items() if name not in free},
    }
    described: dict[str, Any] = json.loads(json.dumps(whole))  # lists for tuples, as in the file
    return described


@functools.cache
def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Adafactor or AdamW with clipping, linear warm-up and the configured decay."""
    peak, warmup = config.learning_rate, config.warmup_steps

    def inverse_sqrt(step: Any) -> Any:
        step = jnp.maximum(step + 1, 1)
        return peak * jnp.minimum(step / warmup, jnp.sqrt(warmup / step))

    rate = (
        inverse_sqrt
        if config.schedule == "inverse_sqrt"
        else optax.warmup_cosine_decay_schedule(
            0.0, peak, min(warmup, config.steps), max(config.steps, warmup + 1)
        )
    )
    if config.optimizer == "adafactor":
        rule = optax.adafactor(
            rate,
            momentum=0.9,
            multiply_by_parameter_scale=True,
            weight_decay_rate=config.weight_decay or None,
        )
    else:
        rule = optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


@functools.cache  # runs of one configuration in one process compile once
def make_train_step(
    model_config: ModelConfig, config: TrainConfig, optimizer: optax.GradientTransformation
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """A compiled step: (state, batch) -> (new state, sums); the old state is given up."""
    tables = [model_config.task_table(side) for side in ("encoder", "decoder")]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        source, target_in, target_out, pair = (jnp.asarray(part) for part in batch)
        encoder, decoder = (None if t is None else jnp.asarray(t)[pair] for t in tables)
        valid, wanted = source != PAD, target_out != PAD

        def objective(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
            memory, first = encode(params, model_config, source, valid, encoder, key=keys[0])
            logits, second = decode(
                params, model_config, memory, valid, target_in, wanted, decoder, key=keys[1]
            )
            smoothed, plain = cross_entropy(logits, target_out, config.label_smoothing)
            return smoothed + _auxiliary(first + second), {
                "loss": plain * wanted.sum(),
                "tokens": wanted.sum(),
                **_router_sums(first + second),
            }

        grads, sums = jax.grad(objective, has_aux=True)(state.params)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, optimizer_state, state.step + 1), sums

    return step


def cross_entropy(
    logits: jax.Array, target: jax.Array, smoothing: float
) -> tuple[jax.Array, jax.Array]:
    """Mean loss over positions that are not padding: (label-smoothed, plain), nats, f32.

    logits: [B, L, V] f32; target: [B, L] i32. With smoothing e the wanted distribution is
    `(1 - e)` on the target and `e / V` everywhere (Szegedy et al. 2016, section 7).
    """
    valid = target != PAD
    log_total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    count = jnp.maximum(valid.sum(), 1)
    plain = jnp.sum(jnp.where(valid, log_total - chosen, 0)) / count
    uniform = jnp.sum(jnp.where(valid, log_total - logits.mean(axis=-1), 0)) / count
    return (1 - smoothing) * plain + smoothing * uniform, plain


def _init_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array
) -> State:
    params = init(key, config)
    return State(params, optimizer.init(params), jnp.int32(0))


def _check_finite(step: int, loss: float, params: Params | None, checkpoints: Checkpoints) -> None:
    """Stop before parameters that a last update has spoilt become a checkpoint."""
    if not np.isfinite(loss):
        problem = f"the loss is {loss}"
    elif params is not None and not all(jnp.isfinite(p).all() for p in jax.tree.leaves(params)):
        problem = "a parameter is not finite"
    else:
        return
    good = checkpoints.steps()
    raise FloatingPointError(
        f"at step {step} {problem}; "
        + (f"the checkpoint of step {good[-1]} is good" if good else "there is no checkpoint yet")
    )


def _auxiliary(reports: list[moe.Metrics]) -> jax.Array:
    return sum((r.aux_loss for r in reports), start=jnp.float32(0))


def _router_sums(reports: list[moe.Metrics]) -> dict[str, jax.Array]:
    if not reports:
        return {"dropped": jnp.float32(0), "busiest": jnp.float32(0)}
    busiest = [r.load.max() * r.load.shape[0] for r in reports]
    return {
        "dropped": jnp.stack([r.dropped for r in reports]).mean(),
        "busiest": jnp.stack(busiest).max(),
    }


def _summarise(
    step: int, steps: int, pending: list[dict[str, jax.Array]], tokens: int, since: float
) -> Progress:
    sums = {k: np.array([float(s[k]) for s in pending]) for k in pending[0]}
    return Progress(
        step,
        steps,
        loss=float(sums["loss"].sum() / max(sums["tokens"].sum(), 1)),
        tokens_per_s=tokens / (time.perf_counter() - since),
        dropped=float(sums["dropped"].mean()),
        busiest=float(sums["busiest"].mean()),
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
