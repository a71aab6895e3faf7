"""Compiles kernels for one TPU chip, without a TPU: cases in, results out, as JSON lines.

It must be started with LIBTPU_INIT_ARGS naming the folder that is its one argument: the flags of
`schedule.dump_flags` count only before JAX starts.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taskmoe.bench.harness.worker import serve
from taskmoe.bench.tpu import across, inner_walk, schedule
from taskmoe.bench.tpu import cases as kernel_cases
from taskmoe.bench.tpu.cases import Case
from taskmoe.bench.tpu.compiler import NO_KERNEL, TOO_LARGE
from taskmoe.bench.tpu.grid_walk import KernelCall, recording, unwritten_zeros
from taskmoe.bench.tpu.regions import Bundles
from taskmoe.kernels.tiling import sublanes


@functools.cache
def chip_mesh(chip: str) -> Mesh:
    """One device of the chip; Pallas asks the current mesh which chip it compiles for."""
    name = kernel_cases.CHIPS[chip][0]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    axes: Any = {"axis_types": (AxisType.Auto,)}
    return Mesh(np.array(topology.devices[:1]), ("one",), **axes)


def refusal(error: Exception) -> str:
    """The error on one line, cut off, with files of installed packages named from these on."""
    return re.sub(r"/\S*/site-packages/", "", " ".join(str(error).split()))[:500]


def compile_case(case: Case, mesh: Mesh, dumps: Path) -> dict[str, Any]:
    """What the compiler makes of the case: `error`, or seconds and each kernel's schedule."""
    for path in dumps.iterdir():
        path.unlink()
    across_chips = case.op in kernel_cases.EXCHANGES
    needed = across.held_bytes(case) if across_chips else held_bytes(case)
    there = kernel_cases.chip_info(case.chip).hbm_capacity_bytes
    if needed > there:
        sizes = f"take {needed / 1e9:.1f} GB, its HBM is {there / 1e9:.1f} GB"
        return {"error": f"{TOO_LARGE}: arguments and results {sizes}"}
    start = time.perf_counter()
    try:
        # Pallas asks the mesh which chip it compiles for, tokamax the default device.
        with jax.set_mesh(mesh), jax.default_device(mesh.devices.flat[0]):
            if across_chips:
                jitted, arguments = across.program(case, mesh)
            else:
                function, arguments = kernel_cases.program(case).directed(case.direction)
                whole = NamedSharding(mesh, P())
                results = kernel_cases.result_shapes(function, arguments)
                formats, out = _formats(arguments, whole), _formats(results, whole)
                jitted = jax.jit(function, in_shardings=tuple(formats), out_shardings=out)
            compiled = jitted.lower(*arguments).compile()
    except Exception as error:  # a refusal, the compiler's or the library's, is a result
        return {"error": refusal(error)}
    seconds = time.perf_counter() - start
    hlo, memory = compiled.as_text() or "", compiled.memory_analysis()
    vmem = schedule.kernel_vmem_bytes(hlo)
    if not vmem:
        return {"error": NO_KERNEL}
    kernels = [dataclasses.asdict(kernel) for kernel in schedule.read_schedules(dumps, set(vmem))]
    return {
        "compile_s": seconds,
        "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
        "outside_cycles": schedule.outside_cycles(hlo),
        "kernels": [kernel | {"vmem_bytes": vmem[kernel["kernel"]]} for kernel in kernels],
    }


def _formats(shapes: Any, whole: NamedSharding) -> Any:
    """How arrays lie in a model that has its parameters as `row_major` puts them.

    Rows and logits are results there of what runs before: the compiler lays them out.
    """
    return jax.tree.map(
        lambda s: Format(Layout(tuple(range(s.ndim))) if s.ndim > 2 else Layout.AUTO, whole), shapes
    )


def model(
    chip: str, calls: list[KernelCall], floor: int, kernels: list[dict[str, Any]], outside: int
) -> dict[str, Any]:
    """Modelled bytes and times of these kernel calls, with the schedules that were compiled.

    A kernel takes as long as the larger of its bytes at the HBM's bandwidth and its work. Work is
    the larger of the bundles that its regions run, one a cycle, and the FLOPs that it executes, of
    rows that it multiplies twice included, at the bf16 peak times the share of MXU slots that its
    main loop fills: chips with narrow MXUs issue bundles faster than these take products. Of a
    kernel without known regions the second counts alone. What runs outside adds its cycles.
    The roofline has the least bytes, the declared FLOPs and every slot filled.

    bundles_run: of all regions; of a kernel without known ones its main loop times grid steps.
    """
    info = kernel_cases.chip_info(chip)
    bandwidth, peak = info.mem_bw_bytes_per_second, info.bf16_ops_per_second
    clock = kernel_cases.clock_hz(info)
    multiplies = any(kernel["filled"]["MXU"] > 0 for kernel in kernels)
    flops = sum(call.cost.flops for call in calls if call.cost is not None)

    def compiled_as(call: KernelCall) -> dict[str, Any] | None:
        """The call's kernel: of several under its name, the last with as many sizes of parts."""
        named = [kernel for kernel in kernels if kernel["kernel"] == call.name]
        parts = len(call.trips.parts) if call.trips else 0
        alike = [k for k in named if not k["regions"] or len(k["regions"]["parts"]) == parts]
        return next(reversed(alike or named), None)

    def bundles(call: KernelCall, kernel: dict[str, Any]) -> int | None:
        regions = kernel["regions"]
        if regions is None or call.trips is None:
            return None
        return Bundles(**regions).run(call.trips)

    def seconds(call: KernelCall) -> float:
        least, kernel = call.moved_bytes / bandwidth, compiled_as(call)
        if kernel is None:
            return least
        work, share = 0.0, kernel["filled"]["MXU"]
        if call.cost is not None and share:
            work = call.cost.flops * call.rows_share / (peak * share)
        return max(least, work, (bundles(call, kernel) or 0) / clock)

    pairs = ((call, kernel) for call in calls if (kernel := compiled_as(call)) is not None)
    return {
        "bundles_run": sum(
            bundles(call, kernel) or call.steps * kernel["main_bundles"] for call, kernel in pairs
        ),
        "moved_bytes": sum(call.moved_bytes for call in calls),
        "floor_bytes": floor,
        "flops": flops,
        "outside_cycles": outside,
        "modelled_us": 1e6 * (sum(map(seconds, calls)) + outside / clock),
        "roofline_us": 1e6 * max(floor / bandwidth, flops / peak if multiplies else 0.0),
    }


def visits_cycles(calls: list[KernelCall], kernels: list[dict[str, Any]]) -> int:
    """Cycles of the kernels that find the visits: their bundles, all on the scalar unit.

    A program may have several, under one name: each counts as the longest of them.
    """
    walks = [Bundles(**k["regions"]) for k in kernels if k["kernel"] == schedule.VISITS]
    found = [call.trips for call in calls if call.name == schedule.VISITS and call.trips]
    return sum(max((walk.run(trips) for walk in walks), default=0) for trips in found)


def walked_bundles(case: Case, kernels: list[dict[str, Any]]) -> int | None:
    """Bundles that tokamax's kernels run, None where one does not walk in the way that is known."""
    shape = kernel_cases.SHAPES[case.shape]
    sizes = kernel_cases.routed(shape.tokens, shape.experts, shape.top_k)
    height = sublanes(jnp.dtype(kernel_cases.DTYPES[case.dtype]).itemsize)
    if any(kernel["walked"] is None for kernel in kernels):
        return None
    return sum(
        inner_walk.run(k["kernel"], inner_walk.WalkBundles(**k["walked"]), sizes, height)
        for k in kernels
    )


def held_bytes(case: Case) -> int:
    """HBM that arguments and results of the case's op take at once, before any temporary."""
    ours = kernel_cases.program(dataclasses.replace(case, by="taskmoe"))
    function, arguments = ours.directed(case.direction)
    held = arguments, kernel_cases.result_shapes(function, arguments)
    return sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(held))


def walk(case: Case) -> tuple[list[KernelCall], int]:
    """The direction's kernel calls, and the least bytes: arguments and results once.

    Of experts' matrices that are read, those without rows count nothing.
    """
    program = kernel_cases.program(case)
    shape = kernel_cases.SHAPES[case.shape]
    sizes = kernel_cases.routed(shape.tokens, shape.experts, shape.top_k)
    function, arguments = program.directed(case.direction)
    touched = sum(size > 0 for size in sizes) / len(sizes)
    order = np.random.default_rng(0).permutation(shape.tokens * shape.top_k).astype(np.int32)

    def value(s: Any) -> Any:
        if s.dtype != jnp.int32:
            return unwritten_zeros(s.shape, s.dtype)
        is_sizes = s.shape == (shape.experts,)
        return np.asarray(sizes, np.int32) if is_sizes else order.reshape(s.shape)

    values, count = jax.tree.map(value, arguments), program.gradients
    with recording(case.chip) as calls:
        if case.direction == "backward" and count:
            rest = values[count:-1]
            _, pull = jax.vjp(lambda *first: program.function(*first, *rest), *values[:count])
            calls.clear()  # those of the forward pass
            pull(values[-1])
        else:
            function(*values)
    unread = kernel_cases.UNREAD_BACKWARD.get(case.op, 0) if case.direction == "backward" else 0
    read = [
        s.size * s.dtype.itemsize * (touched if s.ndim >= 3 else 1)
        for s in jax.tree.leaves(arguments[unread:])
    ]
    results = jax.tree.leaves(kernel_cases.result_shapes(function, arguments))
    return calls, int(sum(read) + sum(s.size * s.dtype.itemsize for s in results))


def answer(question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the compiler and the model say of a case, its fields in."""
    case = Case(**question | {"tiling": question["tiling"] and tuple(question["tiling"])})
    across_chips = case.op in kernel_cases.EXCHANGES
    mesh = across.mesh(case.chip) if across_chips else chip_mesh(case.chip)
    result = compile_case(case, mesh, Path(sys.argv[1]))
    if "error" in result or case.op == kernel_cases.LAYER:
        pass
    elif case.by != "tokamax":  # which runs nowhere but on TPU
        calls, floor = across.walk(case) if across_chips else walk(case)
        visits = visits_cycles(calls, result["kernels"])
        calls = [call for call in calls if call.name != schedule.VISITS]
        result["outside_cycles"] += visits
        names = {call.name for call in calls}  # of a gradient: without its forward kernels
        result["kernels"] = [k for k in result["kernels"] if k["kernel"] in names]
        result |= model(case.chip, calls, floor, result["kernels"], result["outside_cycles"])
    else:
        result["bundles_run"] = walked_bundles(case, result["kernels"])
    yield result


if __name__ == "__main__":
    sys.exit(serve(answer))
