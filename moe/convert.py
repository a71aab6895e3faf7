"""Mixture-of-Experts layers of transformers' checkpoints, in and out, bit for bit.

    config = moe.MoEConfig(4096, 14336, 8, router="mixtral", gated=True, activation="silu")
    params = convert.read("mixtral/", "mixtral", config, layer=3)
    convert.write("mixtral/", "mixtral", {3: params}, "tuned/")

A checkpoint is a folder of safetensors files. Its tensors are read one at a time, and only those of
the layer; `write` copies the folder and puts a layer's tensors into the copy, one at a time.
Models and the names of their tensors: `taskmoe.moe.layouts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from taskmoe.moe.config import MoEConfig
from taskmoe.moe.layouts import EXPERT, LAYOUTS, Layout, Stored
from taskmoe.moe.parameters import Params, shapes
from taskmoe.moe.tensor_files import TensorFolder


def layers(source: str | Path | Mapping[str, np.ndarray], model: str) -> list[str]:
    """What the names of each layer's tensors begin with, in order.

    source: a checkpoint's folder, or tensors by name. model: one of `taskmoe.kernels.ROUTERS`, or
      "phimoe". Raises ValueError where there is no layer, or model is another.
    """
    tensors = _tensors(source)
    layout = _layout(model)
    found = layout.layers(tensors)
    if not found:
        raise ValueError(
            f"{_where(tensors)} must hold a layer of {model}, and has no tensor whose name ends in "
            f"{layout.block}{layout.tensors[0].name}"
        )
    return found


def read(
    source: str | Path | Mapping[str, np.ndarray],
    model: str,
    config: MoEConfig,
    layer: int | str = 0,
) -> Params:
    """Parameters of one layer, for `moe.apply`, in the dtypes that the checkpoint has.

    source, model: as in `layers`.
    config: of the layer; it says which parameters there are and of what shape.
    layer: its place among `layers`, or what the names of its tensors begin with.

    Raises ValueError that names file, tensor and what would fit, where a tensor is missing or not
    of the configuration's shape, or the configuration has parameters that the model has not.
    """
    tensors, layout = _tensors(source), _layout(model)
    start = _start(tensors, model, layer)
    wanted = shapes(config)
    params: Params = {}
    for stored in layout.tensors:
        if not set(stored.ours) <= set(wanted):
            if start + stored.names(1)[0] in tensors:
                raise ValueError(
                    f"{_where(tensors, start + stored.names(1)[0])}: "
                    f"{start}{stored.names(1)[0]} is {' and '.join(stored.ours)}, which the "
                    "configuration has not"
                )
            continue
        params |= _read(tensors, stored, start, wanted, config.num_experts)
    if missing := sorted(set(wanted) - set(params)):
        raise ValueError(f"config must have nothing that {model} has not, got {', '.join(missing)}")
    return params


def tensors_of(params: Params, model: str, layer: str) -> Iterator[tuple[str, np.ndarray]]:
    """A layer's tensors as the checkpoint has them, one at a time: names and arrays.

    layer: what their names begin with.
    """
    for stored in _layout(model).stored(params):
        parts = [params[name] for name in stored.ours]
        if EXPERT not in stored.name:
            yield layer + stored.name, stored.join([np.asarray(part) for part in parts])
            continue
        for e, name in enumerate(stored.names(parts[0].shape[0])):
            yield layer + name, stored.join([np.asarray(part[e]) for part in parts])


def write(
    source: str | Path, model: str, params: Mapping[int | str, Params], target: str | Path
) -> None:
    """A copy of a checkpoint with the tensors of some layers in place of its own.

    source: the checkpoint's folder. params: of layers, by place or name as in `read`.
    target: another folder, which is made where it is not there. What `read` gave is written back
      bit for bit: the files are identical.

    Raises ValueError that names file, tensor and what would fit; then no file is written.
    """
    folder, target = TensorFolder(source), Path(target)
    if target.exists() and target.samefile(folder.path):
        raise ValueError(f"target must be another folder than source, got {target} for both")
    starts = {key: _start(folder, model, key) for key in params}

    def changed() -> Iterator[tuple[str, np.ndarray]]:
        for key, start in starts.items():
            for name, tensor in tensors_of(params[key], model, start):
                if name not in folder:
                    raise ValueError(f"{folder.path} has no tensor {name} to be replaced")
                yield name, tensor

    folder.copy_to(target, changed())


def _read(
    tensors: Mapping[str, np.ndarray],
    stored: Stored,
    start: str,
    shapes: Mapping[str, tuple[int, ...]],
    num_experts: int,
) -> Params:
    """Our parameters that a tensor, or one of each expert, holds."""
    want = stored.shape(shapes)
    if stored.optional and start + stored.name not in tensors:
        return {}
    ours: list[np.ndarray] = []
    for e, name in enumerate(stored.names(num_experts)):
        if start + name not in tensors:
            raise ValueError(f"{_where(tensors)} has no tensor {start + name}, of {list(want)}")
        tensor = tensors[start + name]
        if tensor.shape != want:
            raise ValueError(
                f"{_where(tensors, start + name)}: {start + name} must be {list(want)} by the "
                f"configuration, got {list(tensor.shape)}"
            )
        parts = stored.split(tensor)
        if EXPERT not in stored.name:
            ours = parts
            continue
        if not ours:
            ours = [np.empty(shapes[name], tensor.dtype) for name in stored.ours]
        for whole, part in zip(ours, parts, strict=True):
            whole[e] = part
    if EXPERT in stored.name and start + stored.name.replace(EXPERT, str(num_experts)) in tensors:
        raise ValueError(
            f"{_where(tensors)} has a tensor {start + stored.names(num_experts + 1)[-1]}: config "
            f"must have more than num_experts={num_experts}"
        )
    # A copy, lest an array lie in the file itself.
    return {
        name: jnp.asarray(np.array(value, order="C"))
        for name, value in zip(stored.ours, ours, strict=True)
    }


def _tensors(source: str | Path | Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    return source if isinstance(source, Mapping) else TensorFolder(source)


def _layout(model: str) -> Layout:
    if model not in LAYOUTS:
        raise ValueError(f"model must be one of {', '.join(LAYOUTS)}, got {model!r}")
    return LAYOUTS[model]


def _start(tensors: Mapping[str, np.ndarray], model: str, layer: int | str) -> str:
    found = layers(tensors, model)
    if isinstance(layer, str):
        if layer not in found:
            raise ValueError(f"layer must be one of {', '.join(found)}, got {layer!r}")
        return layer
    if not 0 <= layer < len(found):
        raise ValueError(f"layer must be in [0, {len(found)}), got {layer}")
    return found[layer]


def _where(tensors: Mapping[str, np.ndarray], name: str | None = None) -> str:
    """The file or folder, where tensors lie in one."""
    if not isinstance(tensors, TensorFolder):
        return "source"
    return str(tensors.path if name is None else tensors.entries[name].path)
