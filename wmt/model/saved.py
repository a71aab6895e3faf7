"""A model on disk: a folder with `config.json`, `params.safetensors` and `spm.model`.

Of a quantised model each matrix is two arrays, `NAME/values` in int8 and `NAME/scales`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from taskmoe.cli.command_line import check_new
from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.quantization import quantized
from taskmoe.wmt.model.transformer import Params, init
from taskmoe.wmt.text.tokenizer import Tokenizer

CONFIG, PARAMS, VOCABULARY = "config.json", "params.safetensors", "spm.model"


@dataclasses.dataclass(frozen=True)
class Model:
    """All that translating needs: parameters, configuration and vocabulary."""

    params: Params
    config: ModelConfig
    tokenizer: Tokenizer


def save_model(
    model: Model, folder: Path, *, replace: bool = False, more: Mapping[str, bytes] | None = None
) -> None:
    """Write a model folder: beside it first, then renamed, so that it is whole or not there.

    replace: an older model in that folder gives way; without it InputError is raised where the
    folder already holds something. more: other files to lie in the folder.
    """
    with whole_folder(folder, replace=replace) as beside:
        (beside / CONFIG).write_text(model.config.to_json() + "\n", encoding="utf-8")
        (beside / VOCABULARY).write_bytes(model.tokenizer.model)
        save_file({k: np.asarray(v) for k, v in flatten(model.params).items()}, beside / PARAMS)
        for name, data in (more or {}).items():
            (beside / name).write_bytes(data)
        (beside / PARAMS).chmod(0o644)  # safetensors makes files that their owner alone reads


@contextlib.contextmanager
def whole_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` once all is written.

    replace: as in `save_model`. An error inside leaves what was there; what cannot be written is an
    OSError that names `folder`.
    """
    if not replace:
        check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield beside
        beside.chmod(0o755)
        if replace and folder.exists():
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
            os.replace(beside, folder)
            shutil.rmtree(old)
        else:
            os.replace(beside, folder)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(folder)) from None
        if isinstance(error, SafetensorError):  # so it tells of a full disk
            raise OSError(errno.EIO, str(error), str(folder)) from None
        raise


def load_model(folder: Path) -> Model:
    """Read a model folder; raises InputError that names the file that is missing or damaged."""
    for name in (CONFIG, PARAMS, VOCABULARY):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is no model folder: it has no {name}")
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config = ModelConfig.from_dict(fields)
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / CONFIG} is damaged: {error}") from None
    try:
        arrays = load_file(folder / PARAMS)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / PARAMS} is damaged: {error}") from None
    return with_arrays(arrays, config, Tokenizer.load(folder / VOCABULARY), folder / PARAMS)


def with_arrays(
    arrays: Mapping[str, np.ndarray], config: ModelConfig, tokenizer: Tokenizer, where: Path | str
) -> Model:
    """A model of arrays by their names; raises InputError that names the first that does not fit.

    where: the arrays are from, for that error.
    """
    template = structure_of(config, int8="embedding/values" in arrays)
    wanted = flatten(template)
    for name, leaf in wanted.items():
        got = arrays[name].shape if name in arrays else None
        if got != leaf.shape:
            raise InputError(
                f"{where}: {name} should be {list(leaf.shape)}, "
                + ("is missing" if got is None else f"is {list(got)}")
            )
        of_bytes = [dtype == np.int8 for dtype in (leaf.dtype, arrays[name].dtype)]
        if of_bytes[0] != of_bytes[1]:
            raise InputError(f"{where}: {name} should be {leaf.dtype}, is {arrays[name].dtype}")
    leaves = [jax.numpy.asarray(arrays[name]) for name in wanted]
    params = jax.tree.unflatten(jax.tree.structure(template), leaves)
    return Model(params, config, tokenizer)


def structure_of(config: ModelConfig, *, int8: bool) -> Params:
    """Shapes and dtypes of a model's parameters. int8: of a quantised one's."""
    template: Params = jax.eval_shape(lambda key: init(key, config), jax.random.key(0))
    return jax.eval_shape(quantized, template) if int8 else template


def flatten(params: Params) -> dict[str, jax.Array]:
    """Path with slashes -> array, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
