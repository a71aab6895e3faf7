"""A layer's parameters: which there are, of what shape, and how they begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from taskmoe.kernels.checks import check_floats
from taskmoe.kernels.platforms import with_plain_settings
from taskmoe.kernels.quantized import Quantized
from taskmoe.moe.config import MoEConfig

Params = dict[str, jax.Array]

#: An expert's own parameters, but for its scale; they are spread over the experts' axis of a mesh.
EXPERT_PARAMS = ("w_in", "w_out", "w_gate", "b_in", "b_out", "b_gate")
#: Of the expert that every token passes; every device has it.
SHARED_PARAMS = ("shared_in", "shared_out", "shared_gate_in", "shared_gate")
#: Of a gate that looks at tokens.
_OF_GATES = ("gate", "gate_bias", "gate_scale", "choice_bias")
#: Sizes of each: num_experts E, d_model D, d_ff F, shared S, num_tasks T.
_SIZES = {
    "gate": "DE",
    "w_in": "EDF",
    "w_out": "EFD",
    "w_gate": "EDF",
    "task_embedding": "TD",
    "gate_bias": "E",
    "choice_bias": "E",
    "b_in": "EF",
    "b_out": "ED",
    "b_gate": "EF",
    "gate_scale": "D",
    "expert_scale": "E",
    "shared_in": "DS",
    "shared_out": "SD",
    "shared_gate_in": "DS",
    "shared_gate": "D1",
}


def shapes(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter that a layer has."""
    gated, shared = config.gated, config.shared > 0
    has = {
        "gate": config.routing not in ("static", "given"),
        "w_gate": gated,
        "task_embedding": config.routing == "task",
        "gate_bias": config.gate_bias,
        "choice_bias": config.choice_bias,
        "b_in": config.biases,
        "b_out": config.biases,
        "b_gate": config.biases and gated,
        "gate_scale": config.gate_norm is not None,
        "expert_scale": config.expert_scale,
        "shared_in": shared,
        "shared_out": shared,
        "shared_gate_in": shared and gated,
        "shared_gate": config.shared_gate,
    }
    sizes = _sizes(config)
    return {
        name: tuple(sizes[letter] for letter in letters)
        for name, letters in _SIZES.items()
        if has.get(name, True)
    }


@with_plain_settings
def init(key: jax.Array, config: MoEConfig, dtype: Any = jnp.float32) -> Params:
    """Fresh parameters of one layer.

    Returns gate [D, E] (not with routing "static" and "given"), w_in [E, D, F], w_out [E, F, D];
    with `gated` w_gate [E, D, F]; with routing "task" task_embedding [num_tasks, D]; gate_bias and
    choice_bias [E], and of biased experts b_in [E, F], b_out [E, D] and b_gate [E, F], zeros;
    gate_scale [D] with `gate_norm` and expert_scale [E], ones; of a shared expert shared_in
    [D, shared], shared_out [shared, D], with `gated` shared_gate_in [D, shared] and with
    `shared_gate` shared_gate [D, 1].
    Experts are drawn with variance 1/fan_in.
    """
    routed = ("gate", "w_in", "w_out", "w_gate", "task_embedding")
    wanted = shapes(config)
    shared = [name for name in SHARED_PARAMS if name in wanted]
    of_shared = jax.random.split(jax.random.fold_in(key, 1), max(len(shared), 1))
    keys = dict(zip(routed, jax.random.split(key, len(routed)), strict=True))
    keys |= dict(zip(shared, of_shared, strict=False))
    params: Params = {}
    for name, shape in wanted.items():
        if name in keys:
            # Unit variance gives gate logits of unit variance, as normalised tokens have.
            scale = 1.0 if name == "task_embedding" else shape[-2] ** -0.5
            params[name] = jax.random.normal(keys[name], shape, dtype) * scale
        else:
            ones = name in ("gate_scale", "expert_scale")
            params[name] = jnp.ones(shape, dtype) if ones else jnp.zeros(shape, dtype)
    return params


def check_params(params: Any, config: MoEConfig, experts_cut: int = 1, hidden_cut: int = 1) -> None:
    """ValueError or TypeError that names a parameter that is not as the configuration has it.

    With routing "given" a gate may be there, of which nothing is looked at; so may be what is no
    parameter of a layer.
    experts_cut, hidden_cut: devices of the caller's own `jax.shard_map` over which experts may be
    spread, and hidden units are.
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a dict as `init` makes it, got {type(params).__name__}")
    wanted = shapes(config)
    if missing := [name for name in wanted if name not in params]:
        raise ValueError(f"params must hold {', '.join(missing)} by the configuration")
    unused = _OF_GATES if config.routing == "given" else ()
    if extra := [n for n in _SIZES if n in params and n not in wanted and n not in unused]:
        raise ValueError(
            f"params must not hold {', '.join(extra)}, which the configuration does not have"
        )
    sizes = _sizes(config)
    sizes |= {letter: sizes[letter] // hidden_cut for letter in "FS"}
    held = sizes["E"]
    if experts_cut > 1 and jnp.shape(params["w_in"])[:1] == (held // experts_cut,):
        held //= experts_cut
    for name in wanted:
        own = sizes | {"E": held} if name in EXPERT_PARAMS else sizes
        shape, found = tuple(own[letter] for letter in _SIZES[name]), params[name]
        if not hasattr(found, "shape") or tuple(found.shape) != shape:
            got = list(found.shape) if hasattr(found, "shape") else type(found).__name__
            raise ValueError(
                f"params[{name!r}] must be [{', '.join(_SIZES[name])}] = {list(shape)} by the "
                f"configuration, got {got}"
            )
        if not isinstance(found, Quantized):
            check_floats(f"params[{name!r}]", found.dtype)


def _sizes(config: MoEConfig) -> dict[str, int]:
    return {
        "E": config.num_experts,
        "D": config.d_model,
        "F": config.d_ff,
        "S": config.shared,
        "T": config.num_tasks,
        "1": 1,
    }
