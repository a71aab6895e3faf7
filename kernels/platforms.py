"""Which implementation of an op runs: decided by the platform that is lowered for, not by the host.

An op is one equation in a jaxpr. Its implementation is chosen and traced when that is lowered:

    tpu          "mosaic"       Pallas kernels
    cuda, rocm   "mosaic_gpu"   products by Pallas kernels, on Hopper in bfloat16, or
                 "ragged_dot"   by `jax.lax.ragged_dot`; all else as "xla"
    elsewhere    "xla"          loops over tiles of rows

"tokamax" is the same with the products of that package, and is for the caller to choose.

So one traced function, exported for several platforms, holds each platform's own way, and tracing
costs one equation an op. To see what runs, look for `taskmoe` in the jaxpr, and for
`tpu_custom_call` or `ragged_dot` in the lowered module.

Ops are lowered as functions of plain arrays: what they are traced under (a mesh, manual axes, the
caller's settings of dtype and rank promotion, 64-bit mode) does not reach into kernels.

Kernels choose their tiles for the chip of the mesh that is in use, or of the default device. Where
neither is a TPU they are made for TPU v4, whose tiles every later generation takes too (16 MiB of
VMEM); `for_chip` names another.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

from taskmoe.kernels.checks import result_like

IMPLEMENTATIONS = ("mosaic", "mosaic_gpu", "ragged_dot", "tokamax", "xla", "reference")
#: What None stands for; other platforms take "xla". On GPUs `ragged_products` chooses by itself.
DEFAULTS = {"tpu": "mosaic", "cuda": "ragged_dot", "rocm": "ragged_dot"}
#: Device kinds as JAX names them, by the name of the chip.
CHIPS = {
    "v3": "TPU v3",
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
}


#: Whether what is traced is a `jax.vmap` of kernels, and whether it is one for the interpreter.
lowering_a_batch = contextvars.ContextVar("lowering_a_batch", default=False)
interpreting_a_batch = contextvars.ContextVar("interpreting_a_batch", default=False)
#: The platform that an op is traced for, as JAX's lowering names it.
lowered_for: contextvars.ContextVar[str] = contextvars.ContextVar("lowered_for", default="")


def check_implementation(implementation: str | None) -> None:
    """ValueError unless this names an implementation, or is None; or its package is missing."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(map(repr, IMPLEMENTATIONS))} or None, "
            f"got {implementation!r}"
        )
    if implementation == "tokamax" and importlib.util.find_spec("tokamax") is None:
        raise ModuleNotFoundError(
            "implementation='tokamax' needs the package tokamax: pip install 'taskmoe[gpu]'"
        )


def for_chip(name: str) -> contextlib.AbstractContextManager[Any]:
    """Within it kernels are lowered for this chip, on a host and a mesh that have none.

    name: "v3", "v4", "v5e", "v5p", "v6e" or "tpu7x". It is JAX's own context, an empty abstract
    mesh with a device, so that jitted functions are traced anew for another chip. A mesh of TPUs
    tells its chip by itself and must not be entered beside this. ValueError for another name.
    """
    if name not in CHIPS:
        raise ValueError(f"name must be one of {', '.join(CHIPS)}, got {name!r}")
    return jax.sharding.use_abstract_mesh(_empty_mesh(CHIPS[name]))


def chip() -> pltpu.TpuInfo:
    """The TPU core that kernels lowered here are for."""
    if pltpu.is_tpu_device():
        return pltpu.get_tpu_info()
    return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V4, 1)


def _empty_mesh(device_kind: str, num_cores: int = 1) -> AbstractMesh:
    return AbstractMesh((), (), abstract_device=AbstractDevice(device_kind, num_cores, "tpu"))


def _local_mesh() -> AbstractMesh:
    """A mesh without axes whose device is the TPU that is lowered for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform != "tpu":
        if jax.default_backend() != "tpu":
            return _empty_mesh(CHIPS["v4"])
        default: Any = jax.devices()[0]
        return _empty_mesh(default.device_kind, default.num_cores)
    return _empty_mesh(device.device_kind, device.num_cores)


class Interpreter(NamedTuple):
    """How Pallas TPU kernels are interpreted, and JAX's effects of that."""

    params: Any
    effects: frozenset[Any]


def interpret_mode() -> Interpreter | None:
    """How Pallas TPU kernels traced here would be interpreted; None where they would not."""

    def copy(x_ref: Any, o_ref: Any) -> None:
        o_ref[...] = x_ref[...]

    def probe(x: jax.Array) -> jax.Array:
        return pl.pallas_call(copy, out_shape=result_like(x, x.shape, x.dtype))(x)

    jaxpr = jax.make_jaxpr(probe)(jax.ShapeDtypeStruct((8, 128), jnp.float32))
    for eqn in jaxpr.eqns:
        if eqn.params.get("interpret"):
            return Interpreter(eqn.params["interpret"], frozenset(jaxpr.effects))
    return None


@contextlib.contextmanager
def plain_settings() -> Iterator[None]:
    """JAX's default promotion of dtypes and ranks, whatever the caller has chosen for own code."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def with_plain_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced with `plain_settings`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with plain_settings():
            return function(*args, **kwargs)

    return run


def with_kernel_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced as kernels want it: `plain_settings` and 32-bit indices."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with plain_settings(), jax.enable_x64(False):
            return function(*args, **kwargs)

    return run


class Op:
    """An op: its name and its implementations, functions of options and arrays.

    run(options, *arrays): options hashable, arrays with None where an optional one is missing. An
    implementation that is not named is "xla"'s.
    """

    def __init__(self, name: str, xla: Callable[..., Any], **others: Callable[..., Any]) -> None:
        self.name = name
        self.implementations = {"xla": xla, **others}

    def __repr__(self) -> str:
        return f"taskmoe_{self.name}"

    def __call__(self, options: Any, implementation: str | None, results: Any, *arrays: Any) -> Any:
        """Apply it.

        arrays: trees of arrays. results: tree of `jax.ShapeDtypeStruct`, what every implementation
        returns. All arrays vary over the same manual mesh axes, and so do the results.
        """
        config: Any = jax.config
        leaves, in_tree = jax.tree.flatten(arrays)
        if any(x.dtype.itemsize > 4 for x in leaves):
            if implementation == "mosaic":
                raise TypeError(
                    f"implementation='mosaic' of {self.name} takes bfloat16 or float32, got float64"
                )
            implementation = implementation or "xla"
        shapes, out_tree = jax.tree.flatten(results)
        call = Call(
            op=self,
            options=options,
            implementation=implementation,
            in_tree=in_tree,
            results=tuple((tuple(s.shape), jnp.dtype(s.dtype)) for s in shapes),
            precision=config.jax_default_matmul_precision,
            interpret=interpret_mode() if implementation == "mosaic" else None,
        )
        return jax.tree.unflatten(out_tree, taskmoe_op.bind(*leaves, call=call))


@dataclasses.dataclass(frozen=True)
class Call:
    """One application of an op, as what its primitive is told; `batches` are vmapped axes."""

    op: Op
    options: Any
    implementation: str | None
    in_tree: Any
    results: tuple[tuple[tuple[int, ...], Any], ...]
    precision: Any
    interpret: Interpreter | None
    batches: tuple[tuple[int | None, ...], ...] = ()

    def function(self, platform: str) -> Callable[..., list[jax.Array]]:
        """The call as a function of flat arrays, for lowering on this platform."""
        name = self.implementation or DEFAULTS.get(platform, "xla")
        if name == "mosaic" and platform != "tpu" and self.interpret is None:
            raise ValueError(
                f"implementation='mosaic' of {self.op.name} runs on TPU, or inside "
                "jax.experimental.pallas.tpu.force_tpu_interpret_mode(); this is lowered for "
                f"{platform!r}: use None, 'xla' or 'reference'"
            )
        if name == "mosaic_gpu" and platform not in ("cuda", "gpu"):
            raise ValueError(
                f"implementation='mosaic_gpu' of {self.op.name} runs on NVIDIA GPUs; this is "
                f"lowered for {platform!r}: use None or 'ragged_dot'"
            )
        shapes = [shape for shape, _ in self.results]
        if name == "mosaic" and not all(isinstance(n, int) for shape in shapes for n in shape):
            raise ValueError(
                f"implementation='mosaic' of {self.op.name} takes no symbolic dimensions, got "
                f"results of {shapes}: export for fixed sizes, or choose 'xla'"
            )
        run = self.op.implementations.get(name, self.op.implementations["xla"])

        def flat(*leaves: jax.Array) -> list[jax.Array]:
            results = run(self.options, *jax.tree.unflatten(self.in_tree, leaves))
            declared = [dtype for _, dtype in self.results]
            # Sums of int32 are int64 in 64-bit mode.
            return [x.astype(d) for x, d in zip(jax.tree.leaves(results), declared, strict=True)]

        for axes in self.batches:
            flat = jax.vmap(flat, axes)
        return flat

    @contextlib.contextmanager
    def settings(self, platform: str) -> Iterator[None]:
        """What it is traced and lowered under."""
        kernels = self.interpret is not None or (
            platform == "tpu" and self.implementation in (None, "mosaic")
        )
        with contextlib.ExitStack() as stack:
            stack.callback(lowered_for.reset, lowered_for.set(platform))
            stack.callback(lowering_a_batch.reset, lowering_a_batch.set(bool(self.batches)))
            stack.enter_context(plain_settings())
            stack.enter_context(jax.default_matmul_precision(self.precision))
            if kernels:
                stack.enter_context(jax.enable_x64(False))  # Mosaic knows 32-bit indices only
            if self.interpret is not None:
                stack.enter_context(pltpu.force_tpu_interpret_mode(self.interpret.params))
                token = interpreting_a_batch.set(bool(self.batches))
                stack.callback(interpreting_a_batch.reset, token)
            mesh = _local_mesh() if kernels else AbstractMesh((), ())
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
            yield


taskmoe_op = Primitive("taskmoe")
taskmoe_op.multiple_results = True


@taskmoe_op.def_impl
def _run(*arrays: jax.Array, call: Call) -> list[jax.Array]:
    config: Any = jax.config
    if not config.jax_disable_jit:
        return _jitted(*arrays, call=call)
    platform = jax.default_backend()
    with call.settings(platform):
        return call.function(platform)(*arrays)


@functools.partial(jax.jit, static_argnames="call")
def _jitted(*arrays: jax.Array, call: Call) -> list[jax.Array]:
    return taskmoe_op.bind(*arrays, call=call)


@taskmoe_op.def_effectful_abstract_eval
def _result_types(*avals: Any, call: Call) -> tuple[list[Any], frozenset[Any]]:
    like = avals[0]
    mesh = like.sharding.mesh
    types = [
        like.update(
            shape=shape,
            dtype=dtype,
            weak_type=False,
            sharding=NamedSharding(mesh, PartitionSpec(*[None] * len(shape))),
        )
        for shape, dtype in call.results
    ]
    return types, frozenset() if call.interpret is None else call.interpret.effects


def _batched(arrays: Any, axes: Any, *, call: Call) -> tuple[list[jax.Array], list[int]]:
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    batched = dataclasses.replace(
        call,
        results=tuple(((size, *shape), dtype) for shape, dtype in call.results),
        batches=(*call.batches, tuple(axes)),
    )
    return taskmoe_op.bind(*arrays, call=batched), [0] * len(call.results)


batching.primitive_batchers[taskmoe_op] = _batched


def _no_derivative(*arrays: Any, call: Call) -> Any:
    """What JAX asks for beyond the gradients, which each op has by `jax.custom_vjp`."""
    raise TypeError(
        f"{call.op.name} has no derivative: ops have gradients of reverse mode (jax.grad); "
        "derivatives of these, and forward mode, want implementation='reference'"
    )


ad.primitive_jvps[taskmoe_op] = _no_derivative


def _lower(platform: str, context: Any, *operands: Any, call: Call) -> Any:
    plain = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in context.avals_in]
    local = context.replace(avals_in=plain)
    with call.settings(platform):
        traced = jax.make_jaxpr(call.function(platform))(*plain)
    results = mlir.lower_fun(jaxpr_as_fun(traced), multiple_results=True)(local, *operands)
    if local.tokens_out is not None:  # the interpreter's calls to the host keep their order
        context.set_tokens_out(local.tokens_out)
    return results


for _platform in ("cpu", "tpu", "cuda", "rocm"):
    mlir.register_lowering(taskmoe_op, functools.partial(_lower, _platform), platform=_platform)
