"""The ops as PyTorch runs them on a GPU: `torch.nn.functional.grouped_mm`, and autograd.

Each function here takes the arguments of a case as JAX arrays, `count` of them the op's own, and
returns a call without arguments that works on the same memory. A further array is the gradient of
the result; then gradients are returned too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


class Result:
    """What a call of PyTorch returned, for `jax.block_until_ready` and for a look at the values."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def block_until_ready(self) -> Result:
        """Wait for the GPU."""
        _torch().cuda.synchronize()
        return self

    def arrays(self) -> Any:
        """The values as JAX arrays."""
        self.block_until_ready()
        return jax.tree.map(lambda x: jnp.from_dlpack(x.detach().contiguous()), self.values)


def is_present() -> bool:
    """Whether PyTorch is installed and has a GPU, and JAX uses it."""
    if jax.default_backend() != "gpu" or importlib.util.find_spec("torch") is None:
        return False
    return bool(_torch().cuda.is_available())


def release() -> None:
    """Give memory that PyTorch keeps for later back to the GPU."""
    if is_present():
        _torch().cuda.empty_cache()


def gmm(count: int, sizes: jax.Array, *arrays: Any) -> Callable[[], Result]:
    """gmm [M, N] of x [M, K] and w [E, K, N]."""
    return _bound(functools.partial(_grouped, _ends(sizes)), count - 1, arrays)


def tgmm(count: int, sizes: jax.Array, *arrays: Any) -> Callable[[], Result]:
    """tgmm [E, K, N] of x [M, K] and g [M, N]."""
    ends = _ends(sizes)
    return _bound(lambda x, g: _grouped(ends, x.t(), g), count - 1, arrays)


def expert_ffn(count: int, sizes: jax.Array, *arrays: Any) -> Callable[[], Result]:
    """expert_ffn [M, D] of x, w_in, w_out and, if gated, w_gate."""
    return _bound(functools.partial(_ffn, _ends(sizes)), count - 1, arrays)


def layer(top_k: int, count: int, *arrays: Any) -> Callable[[], Result]:
    """The whole layer [T, D] of x, the gate and the experts: sort, multiply, add up."""
    torch = _torch()

    def run(x: Any, gate: Any, *weights: Any) -> Any:
        values, experts = torch.topk(x.float() @ gate.float(), top_k)
        order = torch.argsort(experts.flatten(), stable=True)
        sizes = torch.bincount(experts.flatten(), minlength=gate.shape[1])
        token = order // top_k
        ends = torch.cumsum(sizes, 0).to(torch.int32)
        out = _ffn(ends, x[token], *weights)
        shares = torch.softmax(values, 1).flatten()[order].to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, out * shares[:, None])

    return _bound(run, count, arrays)


def _torch() -> Any:
    return importlib.import_module("torch")


def _ends(sizes: jax.Array) -> Any:
    return _torch().from_dlpack(jnp.cumsum(sizes).astype(jnp.int32))


def _grouped(ends: Any, a: Any, b: Any) -> Any:
    return _torch().nn.functional.grouped_mm(a, b, offs=ends)


def _ffn(ends: Any, x: Any, w_in: Any, w_out: Any, *w_gate: Any) -> Any:
    functional = _torch().nn.functional
    up = _grouped(ends, x, w_in)
    gated = functional.silu(_grouped(ends, x, w_gate[0])) * up if w_gate else functional.relu(up)
    return _grouped(ends, gated, w_out)


def _bound(run: Callable[..., Any], count: int, arrays: tuple[Any, ...]) -> Callable[[], Result]:
    """`run` on the first `count` arrays, with gradients where there is one more."""
    torch = _torch()
    jax.block_until_ready(arrays)
    tensors = [torch.from_dlpack(array) for array in arrays]
    if len(tensors) == count:

        def forward() -> Result:
            with torch.no_grad():
                return Result(run(*tensors))

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:count]]

    def both() -> Result:
        out = run(*leaves)
        return Result((out, torch.autograd.grad(out, leaves, tensors[count])))

    return both
