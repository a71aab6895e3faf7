"""exchange_ffn over four devices equals expert_ffn on one, and so do its gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from taskmoe.kernels import exchange_ffn_kernel, expert_ffn
from taskmoe.kernels.exchange_ffn_kernel import can_fuse, exchange_ffn
from taskmoe.tests.kernels import support
from taskmoe.tests.kernels.test_exchange import mesh_of

PEERS, EXPERTS, ROWS, F = 4, 8, 24, 128
UNEVEN = np.array(
    [
        [3, 0, 3, 1, 0, 3, 7, 5],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [2, 0, 9, 3, 1, 4, 2, 3],
        [4, 0, 3, 2, 1, 4, 6, 2],
    ],
    np.int32,
)


def arguments(dtype: Any, counts: np.ndarray) -> tuple[Any, ...]:
    """x [peers * ROWS, D] with NaN where no row counts, a cotangent, all matrices, counts."""
    d = 512 // jnp.dtype(dtype).itemsize
    x, grad = (support.normal(i, (PEERS, ROWS, d), dtype) for i in (0, 1))
    held = np.arange(ROWS) < counts.sum(1, keepdims=True)
    x = jnp.where(held[..., None], x, jnp.nan)
    shapes = ((EXPERTS, d, F), (EXPERTS, d, F), (EXPERTS, F, d))
    weights = tuple((0.1 * support.normal(2 + i, s)).astype(dtype) for i, s in enumerate(shapes))
    return x.reshape(-1, d), grad.reshape(-1, d), weights, jnp.asarray(counts)


def run(fused: Any, gated: bool, backward: bool) -> Any:
    def f(x: Any, grad: Any, weights: Any, counts: Any) -> Any:
        def forward(x: Any, weights: Any) -> Any:
            w_in, w_gate, w_out = weights
            return fused(x, counts, w_in, w_out, w_gate if gated else None)

        if not backward:
            return forward(x, weights)
        out, pull = jax.vjp(forward, x, weights)
        return out, pull(grad)

    return f


def together(gated: bool, backward: bool) -> Any:
    """On four devices: results [peers * ROWS, D], and gradients."""

    def fused(x: Any, counts: Any, w_in: Any, w_out: Any, w_gate: Any) -> Any:
        room = PEERS * ROWS
        assert can_fuse(x, counts, w_in, w_gate, room)
        options: Any = {"activation": "silu", "w_gate": w_gate}
        return exchange_ffn(x, counts, w_in, w_out, room, **options)

    own = P("expert")
    return jax.shard_map(
        run(fused, gated, backward), mesh=mesh_of(PEERS), in_specs=(own, own, own, P()),
        out_specs=own, check_vma=False,  # JAX's interpreter does not know varying axes
    )  # fmt: skip


def alone(gated: bool) -> Any:
    """On one device: the same results, each device's rows in turn through all experts."""

    def plain(x: Any, counts: Any, w_in: Any, w_out: Any, w_gate: Any) -> Any:
        rows = [
            expert_ffn(part, w_in, w_out, sizes, activation="silu", w_gate=w_gate)
            for part, sizes in zip(x.reshape(PEERS, ROWS, -1), counts, strict=True)
        ]
        return jnp.concatenate(rows)

    return run(plain, gated, backward=True)


def test_results_and_gradients_equal_one_device() -> None:
    args = arguments(jnp.bfloat16, UNEVEN)
    clean = (jnp.nan_to_num(args[0]), *args[1:])
    truth = support.in_float64(alone(gated=True), *clean)
    plain = support.call("xla", alone(gated=True), *clean)
    ours = support.call("mosaic", together(gated=True, backward=True), *args)
    support.assert_as_good(ours, plain, truth)


def test_whatever_the_experts_share_of_rows() -> None:
    one, none = np.zeros_like(UNEVEN), np.zeros_like(UNEVEN)
    one[:, 1] = ROWS
    ours, plain = jax.jit(together(gated=False, backward=False)), jax.jit(alone(gated=False))
    for counts in (UNEVEN, one, none):
        args = arguments(jnp.float32, counts)
        with support.running("mosaic"):
            have = np.asarray(ours(*args))
        want, _ = plain(jnp.nan_to_num(args[0]), *args[1:])
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


def test_multiplying_before_rows_have_arrived_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_ffn_kernel.Copies, "wait_arrived", lambda self, segment: None)
    jax.clear_caches()  # the right kernel may have been traced
    args = arguments(jnp.float32, UNEVEN)
    want, _ = support.call("xla", alone(False), jnp.nan_to_num(args[0]), *args[1:])
    try:
        with pytest.raises(Exception, match=r"RACE DETECTED|Not equal|emaphore"):
            np.testing.assert_allclose(
                support.call("mosaic", together(False, backward=False), *args), want, rtol=1e-5
            )
    finally:
        pltpu.reset_tpu_interpret_mode_state()
        jax.clear_caches()  # nor may the wrong one stay


def test_shapes_that_do_not_fit_are_not_fused() -> None:
    def fits(d: int, f: int, experts: int) -> bool:
        x, counts, w_in = (
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (
                ((ROWS, d), jnp.bfloat16),
                ((PEERS, experts), jnp.int32),
                ((experts // PEERS, d, f), jnp.bfloat16),
            )
        )
        arrays: Any = (x, counts, w_in)
        return can_fuse(*arrays, None, PEERS * ROWS)

    assert fits(256, 512, 8)
    assert not fits(200, 512, 8)
    assert not fits(256, 500, 8)
    assert not fits(8192, 65536, 8)
    assert not fits(256, 512, 512)


def test_wrong_arguments_are_named() -> None:
    x, counts = jnp.zeros((4 * ROWS, 128)), jnp.zeros((4, 8), jnp.int32)
    w_in, w_out = jnp.zeros((8, 128, 128)), jnp.zeros((8, 128, 128))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ((x, counts, w_in[:, :64], w_out), {}, r"w_in must have shape \[2, 128, F\]"),
        ((x, counts, w_in, w_out[:, :64]), {}, r"w_out must have shape \[2, 128, 128\]"),
        ((x, counts, w_in, w_out), {"activation": "tanh"}, "activation must be one of 'relu'"),
        ((x[:, :64], counts, w_in[:, :64], w_out[..., :64]), {}, "D a multiple of 128"),
    ]
    own = P("expert")
    for args, options, message in cases:

        def local(*args: Any, options: Any = options) -> Any:
            return exchange_ffn(*args, 96, **options)

        f = jax.shard_map(local, mesh=mesh_of(4), in_specs=(own, P(), own, own), out_specs=own)
        with support.running("mosaic"), pytest.raises(ValueError, match=message):
            f(*args)
