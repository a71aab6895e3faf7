"""A task's sub-network: the model with each task-routed mixture replaced by one dense layer."""

from __future__ import annotations

import dataclasses

import numpy as np

from taskmoe import moe
from taskmoe.wmt.config import ModelConfig, split_pair
from taskmoe.wmt.errors import InputError
from taskmoe.wmt.model import Model
from taskmoe.wmt.transformer import Params, Tasks


def one_task(
    params: Params, config: ModelConfig, tasks: Tasks
) -> tuple[Params, ModelConfig, Tasks]:
    """Replace the mixtures of each side whose task is a scalar by that task's dense layers.

    Returns parameters, configuration and what is left of the tasks; sides with [B] tasks, and
    those that are not task-routed, stay as they are. Works under jit with traced tasks.
    """
    params = dict(params)
    left = {}
    for side, task in tasks._asdict().items():
        left[side] = task
        mixture = config.moe(side)
        if task is None or np.ndim(task) or mixture is None:
            continue
        params[side] = [
            layer | {"feed_forward": _dense(layer["feed_forward"], mixture, task)}
            for layer in params[side]
        ]
        config = dataclasses.replace(config, **{side: "dense", f"{side}_wide_d_ff": None})
        left[side] = None
    return params, config, Tasks(**left)


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
    pairs = config.pairs
    if "-" in task:
        split_pair(task)
        pairs = (task,)
    else:
        pairs = tuple(p for p in pairs if all(config.task_name(s, p) == task for s in routed))
    known = sorted({name for side in routed for name in config.tasks(side)})
    ids = {}
    for side in routed:
        name = config.task_name(side, pairs[0]) if pairs else None
        if name not in config.tasks(side):
            raise InputError(f"task {task!r} is not the model's; it has {', '.join(known)}")
        ids[side] = np.int32(config.tasks(side).index(name))
    tasks = Tasks(ids.get("encoder"), ids.get("decoder"))
    params, config, _ = one_task(model.params, config, tasks)
    return Model(params, dataclasses.replace(config, pairs=pairs), model.tokenizer)


def _dense(feed_forward: Params, mixture: moe.MoEConfig, task: np.ndarray) -> Params:
    if "moe" not in feed_forward:
        return feed_forward
    ffn = moe.extract(feed_forward["moe"], mixture, task)
    return {"norm": feed_forward["norm"], "ffn": ffn}
