"""Layers of models beside transformers' own modules: a line of configuration each, and errors.

    python -m taskmoe.tests.moe.parity

fills in the table of docs/models.md.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from taskmoe import moe
from taskmoe.moe import convert

GOLDEN = Path(__file__).parent / "golden"
D, F = 8, 12
SILU: dict[str, Any] = {"gated": True, "activation": "silu"}
V3: dict[str, Any] = {"top_k": 8, "choice_bias": True, **SILU, "shared": F}
V4: dict[str, Any] = {"gated": True, "activation": "deepseek_v4", "shared": F}
WIDER = functools.partial(moe.sparse_mixer, jitter=0.2)
RELU: dict[str, Any] = {"activation": "relu"}
#: Of each golden file, beside the sizes.
FIELDS: dict[str, dict[str, Any]] = {
    "mixtral": {"router": "mixtral", "top_k": 2, **SILU},
    "qwen2_moe": {"router": "qwen2_moe", "top_k": 4, **SILU, "shared": 10, "shared_gate": True},
    "qwen3_moe": {"router": "qwen3_moe", "top_k": 4, **SILU},
    "qwen3_moe_unnormalised": {"router": "qwen2_moe", "top_k": 4, **SILU},
    "olmoe": {"router": "olmoe", "top_k": 4, **SILU},
    "deepseek_v2": {"router": "deepseek_v2", "top_k": 4, **SILU, "shared": 2 * F},
    "deepseek_v3": {"router": "deepseek_v3", **V3},
    "kimi_k2": {"router": "kimi_k2", **V3},
    "deepseek_v4": {"router": "deepseek_v4", "top_k": 6, "choice_bias": True, **V4},
    "deepseek_v4_hash": {"router": "deepseek_v4", "top_k": 6, **V4},
    "gpt_oss": {
        "router": "gpt_oss", "top_k": 4, "gate_bias": True, "gated": True,
        "activation": "gpt_oss", "biases": True,
    },
    "llama4": {"router": "llama4", "top_k": 1, **SILU, "shared": F},
    "switch": {"router": "switch", "top_k": 1, **RELU},
    "switch_dropping": {
        "router": "switch", "top_k": 1, **RELU, "capacity_factor": 1.25, "group_size": 12,
    },
    "nllb_moe": {"router": "nllb_moe", "top_k": 2, **RELU, "biases": True},
    "nllb_moe_normalised_first": {
        "router": "nllb_moe", "top_k": 2, **RELU, "biases": True, "capacity_factor": 1.0,
    },
    "nllb_moe_normalised_last": {
        "router": "nllb_moe", "top_k": 2, **RELU, "biases": True, "capacity_factor": 1.0,
        "renormalise": True,
    },
    "jamba": {"router": "jamba", "top_k": 2, **SILU},
    "granite": {"router": "granite", "top_k": 2, **SILU},
    "phimoe": {"router": "phimoe", "top_k": 2, **SILU},
    "phimoe_wider": {"router": WIDER, "top_k": 2, **SILU},
    "gemma4": {
        "router": "gemma4", "top_k": 2, "gate_norm": 1e-6, "expert_scale": True, "gated": True,
        "activation": "gelu",
    },
}  # fmt: skip


class Errors(NamedTuple):
    """Largest differences relative to the largest value; dw is the worst of all parameters."""

    forward: float
    dx: float
    dw: float


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def model_of(name: str) -> str:
    """The model that a case is of."""
    known = [model for model in convert.LAYOUTS if name == model or name.startswith(model + "_")]
    return max(known, key=len)


def configuration(name: str, experts: int) -> moe.MoEConfig:
    return moe.MoEConfig(d_model=D, d_ff=F, num_experts=experts, **FIELDS[name])


def tensors(arrays: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """Of a golden file: "weights" or "grads"."""
    return {name[len(kind) + 1 :]: a for name, a in arrays.items() if name.startswith(kind + "/")}


def layer(name: str, arrays: dict[str, np.ndarray]) -> tuple[moe.MoEConfig, Any, Any]:
    """Configuration, parameters and their gradients, which choice biases have not."""
    model, weights = model_of(name), tensors(arrays, "weights")
    gate = next(n for n in weights if n.endswith(convert.LAYOUTS[model].tensors[0].name))
    config = configuration(name, len(weights[gate]))
    params = convert.read(weights, model, config)
    grads = convert.read(
        tensors(arrays, "grads")
        | {n: w for n, w in weights.items() if n.endswith(("correction_bias", "gate.bias"))},
        model,
        config,
    )
    grads.pop("choice_bias", None)
    return config, params, grads


def run(
    config: moe.MoEConfig, params: Any, arrays: dict[str, np.ndarray], jitted: bool = True
) -> tuple[Any, Any, Any]:
    """Our layer: out, dx and dw."""
    told: Any = {}
    table = next((a for n, a in arrays.items() if n.endswith("tid2eid")), None)
    x, upstream = (jnp.asarray(arrays[part]) for part in ("x", "upstream"))
    if table is not None:
        ids = np.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2]) % len(table)
        told = {"experts": jnp.asarray(table[ids], jnp.int32)}

    f = differentiated(config)
    (_, out), (dw, dx) = (f if jitted else f.__wrapped__)(params, x, upstream, told)
    dw.pop("choice_bias", None)
    return out, dx, dw


@functools.cache
def differentiated(config: moe.MoEConfig) -> Any:
    """A layer, jitted once for each configuration."""

    def loss(params: Any, x: Any, upstream: Any, told: Any) -> Any:
        out = moe.apply(params, config, x, **told)[0]
        return jnp.sum(out * upstream), out

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def errors(name: str, arrays: dict[str, np.ndarray], **changes: Any) -> Errors:
    """Of our layer. changes: parameters in place of the file's."""
    config, params, grads = layer(name, arrays)
    out, dx, dw = run(config, params | changes, arrays)
    assert sorted(dw) == sorted(grads)
    of = {n: relative(dw[n], grads[n]) for n in dw}
    return Errors(relative(out, arrays["out"]), relative(dx, arrays["dx"]), max(of.values()))


def relative(have: Any, want: Any) -> float:
    have, want = np.asarray(have, np.float64), np.asarray(want, np.float64)
    return float(np.abs(have - want).max() / np.abs(want).max())


def line(name: str) -> str:
    """The configuration as it is written, without the sizes."""
    shown = {n: repr(v) for n, v in FIELDS[name].items()}
    if FIELDS[name]["router"] is WIDER:
        shown["router"] = "functools.partial(moe.sparse_mixer, jitter=0.2)"
    return ", ".join(f"{n}={v}" for n, v in shown.items())


PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- begin parity -->", "<!-- end parity -->"


def table_lines(page: str) -> list[str]:
    """The rows of the table of docs/models.md."""
    inside = page.split(BEGIN)[1].split(END)[0].strip().splitlines()
    return [row for row in inside if row.startswith("| ") and "`" in row]


def main() -> None:
    rows = ["| case | configuration | out | dx | dw |", "| --- | --- | ---: | ---: | ---: |"]
    for name in FIELDS:
        found = errors(name, golden(name))
        shown = " | ".join(f"{error:.1e}" for error in found)
        rows.append(f"| {name} | `{line(name)}` | {shown} |")
    page = PAGE.read_text("utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    table = "\n".join(rows)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", "utf-8")
    print(table)


if __name__ == "__main__":
    main()
