"""The training loop, from a work directory's newest checkpoint to a model folder."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from taskmoe.cli.command_line import remove_folder
from taskmoe.cli.errors import InputError, exhausted
from taskmoe.wmt.config import ModelConfig, TrainConfig
from taskmoe.wmt.model.saved import Model, save_model
from taskmoe.wmt.model.transformer import Params
from taskmoe.wmt.text.data import TrainingData
from taskmoe.wmt.text.tokenizer import Tokenizer
from taskmoe.wmt.training import parallel
from taskmoe.wmt.training.checkpoints import Checkpoints, intact_steps
from taskmoe.wmt.training.logs import Logs
from taskmoe.wmt.training.step import Sums, init_state, make_train_step
from taskmoe.wmt.training.stopping import Stop, Stopped
from taskmoe.wmt.training.validation import History, Validation
from taskmoe.wmt.training.workdir import TEXT, alone_in, claim_workdir


class Progress(NamedTuple):
    """What the loop reports: means since the last report.

    loss: nats per target token, label smoothing and auxiliary losses left out; nan where no step
      was taken.
    sentences, tokens, seconds: in all since the last report. Tokens are source and target tokens,
      padding left out; both are those of all processes. tokens_per_s: one over the other.
    padding: share of the positions of batches that hold none. waits: share of the time that the
      loop waited for a batch.
    dropped: share of assignments that found no room; busiest: largest load of an expert times E;
    entropy: nats, of the mean gate probabilities, over layers; load: [layers][E], share of the
      assignments that each expert got.
    skipped: steps left out so far because their gradients were not finite.
    """

    step: int
    steps: int
    loss: float
    sentences: int
    tokens: int
    seconds: float
    tokens_per_s: float
    padding: float
    waits: float
    dropped: float
    busiest: float
    entropy: float
    load: list[list[float]]
    skipped: int


def train(
    workdir: Path,
    model_config: ModelConfig,
    config: TrainConfig,
    data: TrainingData,
    tokenizer: Tokenizer,
    *,
    source: str,
    mesh: Mesh | None = None,
    strategy: str = "auto",
    params: Params | None = None,
    validation: Validation | None = None,
    tensorboard: bool = False,
    report: Callable[[Progress], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
    report_every: int = 20,
    allowed: Collection[str] | None = None,
    stop: Stop = lambda: 0,
) -> Model:
    """Train up to `config.steps` in all, going on from the work directory's newest checkpoint.

    model_config: its vocab_size is what the vocabulary was asked for; the model gets the
      tokenizer's, which is smaller where the text is poor.
    source: name of the data, kept with the configuration; a work directory serves one of each.
    mesh: devices to train on, from `parallel.make_mesh`; None is one device. The mesh may change
      when a run goes on. With several processes all call this with the same arguments.
    strategy: how rows travel to their experts on a mesh, as in `moe.apply`; it may change too.
    params: to begin with; None draws them from the seed.
    validation: how the run is scored on the way; the best model is kept in `workdir/best`.
    tensorboard: write event files to `workdir/tensorboard` too.
    report: called about every `report_every` steps. note: called with lines worth knowing, such as
    where it resumes and which checkpoint was damaged.
    allowed: fields of TrainConfig that a run may go on with another value of, "text" among them;
      None where the command has no --allow for errors to name.
    stop: asked after each step, see `taskmoe.wmt.training.stopping`; where it names a signal, the
      step is kept as a checkpoint and Stopped is raised.
    Returns the model, which is also written to `workdir/model`. One that is there goes when the run
    goes on from a checkpoint: it is of fewer steps.
    Raises InputError if the work directory belongs to another configuration, does not fit the mesh,
    has another run in it or cannot be written, FloatingPointError where too many steps in a row had
    to be left out or a parameter is not finite (checkpoints stay as they are).
    """
    parallel.check_mesh(mesh, model_config, config)
    with contextlib.ExitStack() as held:
        held.enter_context(alone_in(workdir))
        if parallel.is_writer():
            claim_workdir(workdir, model_config, config, source, allowed)
        parallel.wait_for_all("work directory")
        model_config = dataclasses.replace(model_config, vocab_size=tokenizer.vocab_size)
        state = init_state(model_config, config, mesh, params)
        shard = (jax.process_index(), jax.process_count())
        batches = data.iterator(0, shard)
        checkpoints = held.enter_context(
            contextlib.closing(Checkpoints(workdir / "checkpoints", config.keep_checkpoints))
        )
        held.enter_context(_saying_what_is_whole(checkpoints))
        step, (state, place), problems = checkpoints.restore((state, batches.get_state()))
        way = "" if allowed is None else "go on with this one by --allow text, "
        batches.set_state(place, any_text=TEXT in (allowed or ()), way=way)
        for problem in problems:
            note(f"{problem}; " + (f"using the one of step {step}" if step else "starting anew"))
        if step:
            note(
                f"resuming at step {step} of {config.steps}"
                if step < config.steps
                else f"nothing to train: step {step} is done, and steps={config.steps} is the total"
            )
        train_step = make_train_step(model_config, config, mesh, strategy)
        history = History(workdir, step, validation.text if validation else None)
        with batches, Logs(workdir, tensorboard, step) as logs:
            pending: list[Sums] = []
            sentences, places, waited = 0, 0, 0.0
            compiled: set[tuple[int, ...]] = set()
            since = time.perf_counter()
            over = _is_over(validation, history)
            if 0 < step < config.steps and not over and parallel.is_writer():
                remove_folder(workdir / "model")  # that of a run of fewer steps
            while step < config.steps and not over:
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                sentences += len(batch.pair) * shard[1]
                places += (batch.source.size + batch.target_out.size) * shard[1]
                if batch.source.shape not in compiled:
                    compiled.add(batch.source.shape)
                    note(f"compiling the step for sentences of {batch.source.shape[1]} tokens")
                state, sums = train_step(state, parallel.share(batch, mesh))
                pending.append(sums)
                step += 1
                told = stop()
                save = step % config.checkpoint_every == 0 or step == config.steps or told > 0
                due = validation is not None and validation.is_due(step, config.steps)
                if not (save or due or len(pending) == report_every):
                    continue
                progress = _summarise(step, config.steps, pending, since, sentences, places, waited)
                _check(progress, pending, config, state.params if save else None, checkpoints)
                logs.write(step, progress._asdict())
                report(progress)
                if due:
                    assert validation is not None
                    model = _on_host(state.params, model_config, tokenizer)
                    if parallel.is_writer():
                        score = validation.score(model)
                        best = history.add(step, score, model)
                        logs.write(step, {"score": score})
                        note(f"step {step}  score {score:.2f}" + (", the best" if best else ""))
                        over = _is_over(validation, history)
                    over = bool(parallel.agree(int(over)))
                if save or over:
                    checkpoints.save(step, (state, batches.get_state()))
                if told and step < config.steps:
                    checkpoints.wait()
                    raise Stopped(told, f"step {step} of {config.steps} is kept in {workdir}")
                pending, since = [], time.perf_counter()
                sentences, places, waited = 0, 0, 0.0
            if over:
                note(
                    f"ended at step {step}: no gain in {history.without_gain()} scores; "
                    f"the best, {history.best[1]:.2f}, was at step {history.best[0]}"
                )
        checkpoints.wait()
        model = _on_host(state.params, model_config, tokenizer)
        if parallel.is_writer():
            save_model(model, workdir / "model", replace=True)
        parallel.wait_for_all("model")
        return model


@contextlib.contextmanager
def _saying_what_is_whole(checkpoints: Checkpoints) -> Iterator[None]:
    """Where a file cannot be written, or read, InputError says from which step the run goes on."""
    try:
        yield
    except OSError as error:
        if exhausted(error):
            raise
        checkpoints.wait()
        whole = intact_steps(checkpoints.folder, 1)
        safe = f"the checkpoint of step {whole[0]} is whole" if whole else "there is no checkpoint"
        name = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise InputError(f"{name}; {safe}. With that mended the same command goes on") from None


def _on_host(params: Params, config: ModelConfig, tokenizer: Tokenizer) -> Model:
    return Model(jax.tree.map(jnp.asarray, parallel.to_host(params)), config, tokenizer)


def _is_over(validation: Validation | None, history: History) -> bool:
    if validation is None or validation.patience is None:
        return False
    return history.without_gain() >= validation.patience


def _check(
    progress: Progress,
    pending: list[Sums],
    config: TrainConfig,
    params: Params | None,
    checkpoints: Checkpoints,
) -> None:
    """Stop a run that gains nothing, and before spoilt parameters become a checkpoint."""
    in_row = max(int(sums["skipped_in_row"]) for sums in pending)
    if in_row > config.max_skipped:
        problem = f"{in_row} steps in a row had a loss or gradients that are not finite"
    elif params is not None and not all(jnp.isfinite(p).all() for p in jax.tree.leaves(params)):
        problem = "a parameter is not finite"
    else:
        return
    checkpoints.wait()
    good = checkpoints.steps()
    raise FloatingPointError(
        f"at step {progress.step} {problem}; "
        + (f"the checkpoint of step {good[-1]} is good" if good else "there is no checkpoint yet")
    )


def _summarise(
    step: int,
    steps: int,
    pending: list[Sums],
    since: float,
    sentences: int,
    places: int,
    waited: float,
) -> Progress:
    """sentences, places: of the batches, their rows and positions. waited: seconds for them."""
    host: list[dict[str, Any]] = [jax.device_get(sums) for sums in pending]
    counted = sum(float(s["tokens"]) for s in host)
    loss = sum(float(s["loss"]) for s in host)
    tokens, seconds = sum(int(s["positions"]) for s in host), time.perf_counter() - since

    def mean(name: str) -> Any:
        return np.mean([s[name] for s in host], axis=0)

    return Progress(
        step,
        steps,
        loss=loss / counted if counted else float("nan"),
        sentences=sentences,
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        padding=1 - tokens / places,
        waits=waited / seconds,
        dropped=float(mean("dropped")),
        busiest=float(mean("busiest")),
        entropy=float(mean("entropy")),
        load=np.round(mean("load"), 4).tolist(),
        skipped=int(host[-1]["skipped"]),
    )
