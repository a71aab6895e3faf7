"""A new run that begins from a trained model: its weights and vocabulary, and what is new in it."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.saved import Model, flatten
from taskmoe.wmt.model.transformer import Params, init
from taskmoe.wmt.text.languages import codes_of
from taskmoe.wmt.text.tokenizer import Tokenizer, language_token

#: Axis of a parameter along which it has a row a piece of the vocabulary.
_BY_PIECE = {"embedding": 0, "target_embedding": 0, "softmax": 1}


def initial_vocabulary(model: Model, pairs: tuple[str, ...]) -> Tokenizer:
    """The model's vocabulary, with a token for each target language that it has none for."""
    targets = sorted({pair.partition("-")[2] for pair in pairs})
    return model.tokenizer.with_languages(targets)


def initial_params(
    model: Model, config: ModelConfig, tokenizer: Tokenizer, like: Mapping[str, str]
) -> Params:
    """Parameters for a configuration of the model's sizes, with other directions.

    like: new task -> the old one that it begins from; without that, from the mean of all. A new
    language's token begins from the mean of the others'. Raises InputError that names a task that
    is not there, or the first parameter of another shape.
    """
    known = {name for side in ("encoder", "decoder") for name in model.config.tasks(side)}
    new = {name for side in ("encoder", "decoder") for name in config.tasks(side)}
    for task, old in like.items():
        if task not in new or old not in known:
            raise InputError(
                f"--init-task {task}={old}: the new model has tasks {', '.join(sorted(new))}, the "
                f"old one {', '.join(sorted(known))}"
            )
    template = jax.eval_shape(lambda key: init(key, config), jax.random.key(0))
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(model.params).items()}
    tags = [
        model.tokenizer.piece_id(language_token(language))
        for language in sorted({pair.partition("-")[2] for pair in model.config.pairs})
    ]
    leaves = []
    for name, leaf in flatten(template).items():
        array = arrays.get(name)
        if array is not None and name in _BY_PIECE:
            array = _with_pieces(array, _BY_PIECE[name], tags, tokenizer.vocab_size)
        elif array is not None and name.endswith("task_embedding"):
            side = name.partition("/")[0]
            array = _with_tasks(array, model.config.tasks(side), config.tasks(side), like)
        if array is None or array.shape != leaf.shape:
            was = "is missing" if array is None else f"is {list(array.shape)}"
            raise InputError(
                f"--init: {name} {was} in that model and should be {list(leaf.shape)}; leave "
                "sizes and routing as they are there"
            )
        leaves.append(jnp.asarray(array))
    params: Params = jax.tree.unflatten(jax.tree.structure(template), leaves)
    return params


def _with_pieces(array: np.ndarray, axis: int, tags: list[int], size: int) -> np.ndarray:
    more = size - array.shape[axis]
    mean = array.take(tags, axis).mean(axis, keepdims=True)
    return np.concatenate([array, *[mean] * more], axis) if more > 0 else array


def _with_tasks(
    array: np.ndarray, old: tuple[str, ...], new: tuple[str, ...], like: Mapping[str, str]
) -> np.ndarray:
    """array: [tasks, D], in the old order."""
    rows = [like.get(task, task) for task in new]
    return np.stack([array[old.index(x)] if x in old else array.mean(0) for x in rows])


def new_parts(model: Model, config: ModelConfig) -> list[str]:
    """What the configuration has that the model has not: tasks and target languages, by name."""
    found = []
    for side in ("encoder", "decoder"):
        tasks = [task for task in config.tasks(side) if task not in model.config.tasks(side)]
        found += [f"{side} task {task}" for task in tasks]
    languages = codes_of(config.pairs) - codes_of(model.config.pairs)
    return found + [f"language {language}" for language in sorted(languages)]
