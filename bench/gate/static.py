"""What `check` knows without a clock: kernels as compiled for TPU, and what steps exchange.

    kernels     a fixed set of cases of the compile lab (`kernel_cases`), v5e and v6e, bf16
    steps       one decoding step of the paper's models compiled for 64 cores of v5e
    exchange    the optimised HLO of a small layer on 8 host devices, each strategy, and of a task's
                sub-network; the same for a decoding program

Facts are numbers by name, of subjects by name; of all but `verdicts.MORE_IS_BETTER` less is better.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from taskmoe import moe
from taskmoe.bench.harness.collectives import collective_bytes, count_collectives
from taskmoe.bench.serving import systems as serving
from taskmoe.bench.tpu.cases import Case
from taskmoe.bench.tpu.compiler import Compiled, compile_all
from taskmoe.bench.tpu.model import search as tpu_model_search
from taskmoe.bench.tpu.model.step import CORES
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model import subnetwork, transformer

Facts = dict[str, dict[str, float | str]]

DEVICES = 8
#: Chip -> op, direction and shape. Few, so that all compile within a minute on two cores.
KERNELS = {
    "v5e": (
        ("top_k_gating", "forward", "wmt"),
        ("dispatch", "forward", "wmt"),
        ("combine", "forward", "wmt"),
        ("gmm", "forward", "wmt"),
        ("gmm", "backward", "wmt"),
        ("gmm", "forward", "decode"),
        ("tgmm", "forward", "wmt"),
        ("expert_ffn", "forward", "wmt"),
        ("expert_ffn", "forward", "decode"),
    ),
    "v6e": (
        ("gmm", "forward", "wmt"),
        ("tgmm", "forward", "wmt"),
        ("expert_ffn", "forward", "wmt"),
        ("expert_ffn", "backward", "wmt"),
        ("expert_ffn", "forward", "decode"),
        ("exchange_ffn", "forward", "wmt"),
    ),
}
CASES = tuple(
    Case(op, "taskmoe", direction, chip, "bf16", shape)
    for chip, cases in KERNELS.items()
    for op, direction, shape in cases
)
#: System and batch of the steps that are compiled for 64 cores of v5e.
STEPS = (("token-MoE", 1024), ("sub-network", 64))
#: Layer -> capacity factor and strategy.
LAYERS: dict[str, tuple[float | None, str]] = {
    "all_to_all": (None, "all_to_all"),
    "all_to_all, capacity 1.25": (1.25, "all_to_all"),
    "ragged": (None, "ragged"),
    "all_gather": (None, "all_gather"),
}
WITH_GRADIENTS = ("all_to_all", "all_gather")
TOKENS, EXPERTS, D_MODEL, D_FF = 64, 16, 64, 128


def collect(chips: Iterable[str] = tuple(KERNELS)) -> Facts:
    """All facts, kernels' for these chips; needs libtpu and 8 host devices (or ValueError)."""
    mesh = serving.device_mesh(DEVICES)
    with ThreadPoolExecutor(1) as beside:
        steps = beside.submit(step_facts)
        here = {**layer_facts(mesh), **decoding_facts(mesh)}
        cases = tuple(case for case in CASES if case.chip in chips)
        return {**kernel_facts(cases), **steps.result(), **here}


def kernel_facts(cases: tuple[Case, ...]) -> Facts:
    """Facts of each case, its kernels added up; `error` where one did not compile."""
    found: Facts = {}
    for case, result in zip(cases, compile_all(list(cases)), strict=True):
        name = f"{case.op} {case.direction} {case.chip} {case.dtype} {case.shape}"
        found[name] = _added_up(result)
    return found


def _added_up(result: Compiled) -> dict[str, float | str]:
    if result.error is not None:
        return {"error": result.error}
    return {
        "bundles of main loop": result.main_bundles,
        "bundles run": result.bundles_run or 0,
        "MXU slots filled": round(result.filled, 4),
        "spills": result.spills,
        "VMEM bytes": result.vmem_bytes,
        "HBM bytes (modelled)": result.moved_bytes or 0,
        "cycles outside kernels": result.outside_cycles or 0,
        "us, all regions (modelled)": round(result.modelled_us or 0.0, 3),
    }


def step_facts() -> Facts:
    """What one decoding step of the paper's models needs and exchanges on each core."""
    found: Facts = {}
    with tpu_model_search.compiler() as ask:
        for system, batch in STEPS:
            step = ask(system, "v5e", batch)
            name = f"{system}, step of {batch} on {CORES[system]} v5e"
            if step.error is not None:
                found[name] = {"error": step.error}
                continue
            found[name] = {
                "HBM bytes": step.hbm_bytes,
                "all-to-all bytes sent": step.exchange_bytes,
                **{f"collectives: {kind}": n for kind, n in step.collectives.items()},
            }
    return found


def layer_facts(mesh: Mesh) -> Facts:
    """Collectives and their bytes in a layer, forward and with its gradients, and a sub-network."""
    found: Facts = {}
    x: Any = jax.ShapeDtypeStruct((TOKENS, 1, D_MODEL), np.float32)
    x = serving.place_shapes(mesh, x, P(serving.AXIS))
    for name, (factor, strategy) in LAYERS.items():
        config = moe.MoEConfig(D_MODEL, D_FF, EXPERTS, capacity_factor=factor)
        params = jax.eval_shape(functools.partial(moe.init, jax.random.key(0), config))
        params = serving.place_shapes(mesh, params, moe.param_specs(params))

        def forward(params: Any, x: Any, config: Any = config, how: str = strategy) -> Any:
            return moe.apply(params, config, x, mesh=mesh, strategy=how)[0]

        for way, function in _directions(forward):
            if way == "forward" or name in WITH_GRADIENTS:
                found[f"layer, {name}, {way}, {DEVICES} devices"] = exchanged(
                    _hlo(function, params, x)
                )
    task = moe.MoEConfig(D_MODEL, D_FF, EXPERTS, routing="task", num_tasks=4)

    def extracted() -> Any:
        return moe.extract(moe.init(jax.random.key(0), task), task, 1)

    small = serving.place_shapes(mesh, jax.eval_shape(extracted), P())
    name = f"layer, sub-network, forward, {DEVICES} devices"
    return found | {name: exchanged(_hlo(moe.ffn, small, x))}


def decoding_facts(mesh: Mesh) -> Facts:
    """Collectives of whole decoding, token-routed expert-parallel and a sub-network a device."""
    sizes: dict[str, Any] = {
        "vocab_size": 64, "d_model": 32, "d_ff": 32, "num_heads": 2, "num_experts": DEVICES,
        "encoder_layers": 1, "decoder_layers": 2, "tie_embeddings": True, "dropout": 0.0,
    }  # fmt: skip
    token = ModelConfig(pairs=("en-de",), encoder="dense", decoder="token", **sizes)
    task = ModelConfig(pairs=("en-de", "de-en"), encoder="dense", decoder="target", **sizes)
    params = transformer.init(jax.random.key(0), task)
    params, small, _ = subnetwork.one_task(params, task, transformer.Tasks(None, np.int32(1)))
    systems = {
        "token-MoE": serving.expert_parallel(
            transformer.init(jax.random.key(0), token), token, mesh
        ),
        "sub-networks": serving.sub_networks([params] * DEVICES, small, mesh),
    }
    return {
        f"decoding, {name}, {DEVICES} devices": exchanged(serving.serve(system, DEVICES).hlo)
        for name, system in systems.items()
    }


def exchanged(hlo: str) -> dict[str, float | str]:
    """Facts of the collectives in an optimised HLO text; their sum is there where it is 0 too."""
    counts = count_collectives(hlo)
    return {
        "collectives: all": sum(counts.values()),
        **{f"collectives: {kind}": number for kind, number in counts.items()},
        **{f"collective bytes: {kind}": size for kind, size in collective_bytes(hlo).items()},
    }


def _hlo(function: Callable[..., Any], *shapes: Any) -> str:
    """The optimised HLO; the code that is made of it is not, which would take most of the time."""
    quickly: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function).lower(*shapes).compile(compiler_options=quickly).as_text() or ""


def _directions(forward: Callable[..., Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
    yield "forward", forward

    def both(params: Any, x: Any) -> Any:
        y, pull = jax.vjp(forward, params, x)
        return pull(y)

    yield "forward and backward", both
