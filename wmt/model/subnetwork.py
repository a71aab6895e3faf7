"""A task's sub-network: the model with each task-routed mixture replaced by one dense layer."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from taskmoe import moe
from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import ModelConfig, check_languages, split_pair
from taskmoe.wmt.model.saved import Model
from taskmoe.wmt.model.transformer import Params, Tasks


def one_task(
    params: Params, config: ModelConfig, tasks: Tasks
) -> tuple[Params, ModelConfig, Tasks]:
    """Replace the mixtures of each side whose task is a scalar by that task's dense layers.

    Returns parameters, configuration and what is left of the tasks; sides with [B] tasks, and
    those that are not task-routed, stay as they are. Works under jit with traced tasks.
    """
    params = dict(params)
    for side, task in _of_one(config, tasks).items():
        mixture = config.moe(side)
        assert mixture is not None
        params[side] = [
            layer | {"feed_forward": _dense(layer["feed_forward"], mixture, task)}
            for layer in params[side]
        ]
    return params, *without_tasks(config, tasks)


def without_tasks(config: ModelConfig, tasks: Tasks) -> tuple[ModelConfig, Tasks]:
    """Configuration and tasks of what `one_task` makes of parameters."""
    for side in _of_one(config, tasks):
        if side == "encoder":
            config = dataclasses.replace(config, encoder="dense", encoder_wide_d_ff=None)
            tasks = tasks._replace(encoder=None)
        else:
            config = dataclasses.replace(config, decoder="dense", decoder_wide_d_ff=None)
            tasks = tasks._replace(decoder=None)
    return config, tasks


def _of_one(config: ModelConfig, tasks: Tasks) -> dict[str, ArrayLike]:
    """The sides with mixtures that run one task's, and that task."""
    return {
        side: task
        for side, task in tasks._asdict().items()
        if task is not None and not jnp.ndim(task) and config.moe(side) is not None
    }


def extract(model: Model, task: str) -> Model:
    """The sub-network of one task as a model of its own.

    task: a language, as target-routed (or source-routed) sides name their tasks, or a direction
    like "en-de", which fits every level. The result knows the directions that the task serves.
    Raises InputError where no side is task-routed or the task is not the model's.
    """
    config = model.config
    routed = [side for side in ("encoder", "decoder") if config.tasks(side)]
    if not routed:
        raise InputError(
            "nothing to extract: no side of the model is task-routed "
            f"(encoder is {config.encoder}, decoder is {config.decoder})"
        )
    if "-" in task:
        try:
            split_pair(task)
        except ValueError as error:
            raise InputError(str(error)) from None
        pairs: tuple[str, ...] = (task,)
    else:
        serves = {p: {config.task_name(side, p) for side in routed} for p in config.pairs}
        pairs = tuple(pair for pair, names in serves.items() if names == {task})
        if not pairs and any(task in names for names in serves.values()):
            raise InputError(
                f"task {task!r} leaves a side open (encoder is {config.encoder}, decoder is "
                f"{config.decoder}); name a direction: {', '.join(config.pairs)}"
            )
    if not pairs or any(config.task_name(s, pairs[0]) not in config.tasks(s) for s in routed):
        known = sorted({name for side in routed for name in config.tasks(side)})
        raise InputError(f"task {task!r} is not the model's; it has {', '.join(known)}")
    check_languages(config, pairs[0])
    tasks = Tasks(*(_task_id(config, side, pairs[0]) for side in ("encoder", "decoder")))
    params, config, _ = one_task(model.params, config, tasks)
    return Model(params, dataclasses.replace(config, pairs=pairs), model.tokenizer)


def _task_id(config: ModelConfig, side: str, pair: str) -> np.int32 | None:
    name = config.task_name(side, pair)
    return None if name is None else np.int32(config.tasks(side).index(name))


def _dense(feed_forward: Params, mixture: moe.MoEConfig, task: ArrayLike) -> Params:
    if "moe" not in feed_forward:
        return feed_forward
    ffn = moe.extract(feed_forward["moe"], mixture, task)
    return {"norm": feed_forward["norm"], "ffn": ffn}
