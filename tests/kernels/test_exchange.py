"""exchange_rows over eight devices: rows arrive exactly, both ways, and so do their gradients."""

import functools
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taskmoe.kernels import exchange_kernel
from taskmoe.kernels.exchange_ffn_kernel import exchange_ffn
from taskmoe.kernels.exchange_kernel import exchange_rows, exchange_rows_reference
from taskmoe.kernels.exchange_tiling import ExchangeTiling
from taskmoe.kernels.options import Experts
from taskmoe.tests.kernels import support

ROWS, WIDTH = 13, 5


def mesh_of(*shape: int, devices: Any = None) -> Mesh:
    devices = jax.devices() if devices is None else devices
    axes: Any = {"axis_types": (AxisType.Auto,) * len(shape)}
    grid = np.array(devices[: int(np.prod(shape))]).reshape(shape)
    return Mesh(grid, ("data", "expert")[-len(shape) :], **axes)


def there_and_gradient(there: int) -> Any:
    """Rows there, and the gradient's way back, on one device of a `shard_map`."""

    def f(x: Any, y: Any, counts: Any) -> Any:
        out, pull = jax.vjp(lambda x: exchange_rows(x, counts, there), x)
        return out, pull(y)[0]

    return f


def mapped(mesh: Mesh, f: Any, check_vma: bool = False) -> Any:
    rows, counts = P(mesh.axis_names), P("data" if "data" in mesh.axis_names else None)
    return jax.shard_map(
        f, mesh=mesh, in_specs=(rows, rows, counts), out_specs=rows,
        check_vma=check_vma,  # JAX's interpreter does not know varying axes
    )  # fmt: skip


def sent(x: np.ndarray, counts: np.ndarray, num_rows: int, back: bool) -> np.ndarray:
    """[n, M, W] to [n, num_rows, W] row by row."""
    peers, experts = counts.shape
    packed = num_rows if back else x.shape[1]
    out = np.zeros((peers, num_rows, x.shape[2]), x.dtype)
    owners = [
        [e for e in range(experts) for _ in range(counts[f, e])][:packed] for f in range(peers)
    ]
    local = experts // peers
    for t in range(peers):
        mine = [
            (f % peers, i)
            for mine in range(t * local, (t + 1) * local)
            for f in range(t, t + peers)
            for i, e in enumerate(owners[f % peers])
            if e == mine
        ]
        for place, (f, i) in enumerate(mine):
            if back and place < x.shape[1]:
                out[f, i] = x[t, place]
            elif not back and place < num_rows:
                out[t, place] = x[f, i]
    return out


def patterns(peers: int, experts: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(peers)
    empty = np.zeros((peers, experts), np.int32)
    uneven = rng.multinomial(ROWS, rng.dirichlet(np.full(experts, 0.3)), size=peers)
    uneven[1] = 0
    one = empty.copy()
    one[:, experts - 2] = ROWS
    wrong = rng.integers(-3, ROWS, (peers, experts))
    return {"uneven": uneven, "one takes all": one, "empty": empty, "too many": wrong}


def inputs(mesh: Mesh, there: int, counts: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """x [devices, ROWS, W] and y [devices, there, W], NaN where no row counts."""
    data = mesh.size // mesh.shape["expert"]
    x = support.normal(0, (data, mesh.shape["expert"], ROWS, WIDTH), dtype)
    y = support.normal(1, (data, mesh.shape["expert"], there, WIDTH), dtype)
    used = sent(np.ones(y.shape[1:]), counts, ROWS, back=True)[None] > 0
    got = sent(np.ones(x.shape[1:]), counts, there, back=False)[None] > 0
    return np.asarray(jnp.where(used, x, jnp.nan)), np.asarray(jnp.where(got, y, jnp.nan))


@functools.cache
def compiled(shape: tuple[int, ...], there: int) -> Any:
    return jax.jit(mapped(mesh_of(*shape), there_and_gradient(there)))


def exchange(mesh: Mesh, there: int, x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> Any:
    """Rows there and those sent back, [data, n, rows, W] each; counts are the same along "data"."""
    tables = jnp.asarray(np.tile(counts, (x.shape[0], 1)), jnp.int32)
    flat = [jnp.asarray(v.reshape(-1, WIDTH)) for v in (x, y)]
    with support.running("mosaic"):
        out = compiled(tuple(mesh.devices.shape), there)(*flat, tables)
        return [np.asarray(v).reshape(*x.shape[:2], -1, WIDTH) for v in out]


defined_by = jax.jit(exchange_rows_reference, static_argnums=(2, 3, 4))


@pytest.mark.parametrize(
    ("dtype", "shape", "there"),
    [(jnp.float32, (8,), 8 * ROWS), (jnp.bfloat16, (2, 4), 30)],
    ids=["float32", "bfloat16, too little room"],
)
def test_rows_and_gradients_arrive_exactly(dtype: Any, shape: tuple[int, ...], there: int) -> None:
    mesh = mesh_of(*shape)
    peers = mesh.shape["expert"]
    for name, counts in patterns(peers, 2 * peers).items():
        if name == ("too many" if there == peers * ROWS else "empty"):
            continue  # once is enough
        x, y = inputs(mesh, there, counts, dtype)
        have = exchange(mesh, there, x, y, counts)
        for data in range(x.shape[0]):
            for back, value in enumerate(have):
                size = ROWS if back else there
                source = (y if back else x)[data]
                want = sent(source, counts, size, bool(back))
                np.testing.assert_array_equal(value[data], want, err_msg=f"{name}, {back=}")
                defined = defined_by(jnp.asarray(source), jnp.asarray(counts), size, bool(back))
                np.testing.assert_array_equal(defined, want, err_msg=f"definition, {name}, {back=}")


def wrong_target(found: Any) -> Any:
    return found._replace(targets=found.targets.at[-1].add(1))


def no_wait(found: Any) -> Any:
    return found._replace(arrivals=jnp.zeros_like(found.arrivals))


def no_zeros(found: Any) -> Any:
    return found._replace(hole_sizes=jnp.zeros_like(found.hole_sizes))


@pytest.mark.parametrize("fault", [wrong_target, no_wait, no_zeros])
def test_a_planted_fault_is_caught(fault: Any) -> None:
    right = exchange_kernel.segments_there
    mesh, there = mesh_of(4), 3 * ROWS
    counts = np.random.default_rng(3).integers(1, 2, (4, 4))
    x = support.normal(0, (4, ROWS, WIDTH))
    f = jax.shard_map(
        lambda x, c: exchange_rows(x, c, there), mesh=mesh, in_specs=(P("expert"), P()),
        out_specs=P("expert"), check_vma=False,
    )  # fmt: skip
    with (
        support.planted(exchange_kernel, "segments_there", lambda *args: fault(right(*args))),
        pytest.raises(Exception, match=r"RACE DETECTED|not equal|semaphore"),
    ):
        np.testing.assert_array_equal(
            support.call("mosaic", f, x.reshape(-1, WIDTH), jnp.asarray(counts)),
            sent(np.asarray(x), counts, there, back=False).reshape(-1, WIDTH),
        )


def test_no_copy_starts_before_all_devices_have_entered() -> None:
    # The interpreter lets all devices enter together, so that it cannot miss the handshake.
    x, counts, weights = (
        jnp.zeros((32, 128)),
        jnp.zeros((4, 8), jnp.int32),
        jnp.zeros((8, 128, 128)),
    )
    for fused in (False, True):
        arguments = (x, counts, weights, weights, weights) if fused else (x, counts)
        own = P("expert")
        f = jax.shard_map(
            lambda *args, fused=fused: forward_and_backward(fused, 32)(*args)[0],
            mesh=mesh_of(4), in_specs=(own, P(), own, own, own)[: len(arguments)], out_specs=own,
            check_vma=False,
        )  # fmt: skip
        with support.running("mosaic"):
            text = str(jax.make_jaxpr(f)(*arguments))
        told, heard, copied = map(text.index, ("semaphore_signal", "semaphore_wait", "dma_start"))
        assert told < heard < copied


def test_off_tpu_it_is_an_error() -> None:
    x, y, counts = jnp.zeros((4 * ROWS, 5)), jnp.zeros((4 * 9, 5)), jnp.zeros((4, 8), jnp.int32)
    with pytest.raises(ValueError, match=r"exchange_rows runs on TPU, or inside .*'cpu'"):
        mapped(mesh_of(4), there_and_gradient(9))(x, y, counts)


@pytest.mark.parametrize(
    ("x", "counts", "num_rows", "error", "message"),
    [
        ((4, 2, 3), (4, 8), 9, ValueError, r"x must have shape \[M, W\], got \[1, 2, 3\]"),
        ((4, 2), (3, 8), 9, ValueError, r"counts must have shape \[4, E\], got \[3, 8\]"),
        ((4, 2), (4, 6), 9, ValueError, r"counts must have a multiple of 4 experts .*got 6"),
        ((4, 2), (4, 8), 0, ValueError, "num_rows must be an int of at least 1, got 0"),
        ((4, 0), (4, 8), 9, ValueError, r"x must not be empty, got shape \[1, 0\]"),
    ],
)
def test_wrong_arguments_are_named(
    x: Any, counts: Any, num_rows: Any, error: Any, message: str
) -> None:
    f = jax.shard_map(
        lambda x, c: exchange_rows(x, c, num_rows), mesh=mesh_of(4),
        in_specs=(P("expert"), P()), out_specs=P("expert"),
    )  # fmt: skip
    with pytest.raises(error, match=message):
        f(jnp.zeros(x), jnp.zeros(counts, jnp.int32))


def test_wrong_dtypes_are_named() -> None:
    f = jax.shard_map(
        lambda x, c: exchange_rows(x, c, 9), mesh=mesh_of(4),
        in_specs=(P("expert"), P()), out_specs=P("expert"),
    )  # fmt: skip
    with pytest.raises(TypeError, match="x must be bfloat16 or float32, got int32"):
        f(jnp.zeros((4, 2), jnp.int32), jnp.zeros((4, 8), jnp.int32))
    with pytest.raises(TypeError, match="counts must be of an integer dtype"):
        f(jnp.zeros((4, 2)), jnp.zeros((4, 8)))


def test_experts_may_begin_at_multiples() -> None:
    counts = patterns(4, 8)["uneven"]
    mesh, there = mesh_of(4), 4 * ROWS + 16
    x = support.normal(0, (4, ROWS, WIDTH))

    def f(x: Any, counts: Any) -> Any:
        return exchange_rows(x, counts, there, align=8)

    f = jax.shard_map(
        f, mesh=mesh, in_specs=(P("expert"), P()), out_specs=P("expert"), check_vma=False
    )
    have = support.call("mosaic", f, x.reshape(-1, WIDTH), jnp.asarray(counts))
    have = have.reshape(4, there, WIDTH)
    np.testing.assert_array_equal(have, defined_by(x, jnp.asarray(counts), there, False, 8))
    packed = sent(np.asarray(x), counts, there, back=False)
    for device in range(4):
        first, second = counts.sum(0)[2 * device : 2 * device + 2]
        start = -(-first // 8) * 8
        np.testing.assert_array_equal(have[device, :first], packed[device, :first])
        np.testing.assert_array_equal(
            have[device, start : start + second], packed[device, first : first + second]
        )
        assert not have[device, first:start].any()
        assert not have[device, start + second :].any()


def forward_and_backward(fused: bool, there: int) -> Any:
    """exchange_rows, or exchange_ffn with gates, and all gradients."""

    def f(x: Any, counts: Any, *weights: Any) -> Any:
        def run(x: Any, *weights: Any) -> Any:
            if not fused:
                return exchange_rows(x, counts, there)
            w_in, w_gate, w_out = weights
            return exchange_ffn(x, counts, w_in, w_out, there, activation="silu", w_gate=w_gate)

        out, pull = jax.vjp(run, x, *weights)
        return out, pull(out)

    return f


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_experts_in_blocks_of_any_width_compile_for_a_mesh_of_eight(
    topology: str, dtype: Any
) -> None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh, (d, f), own = mesh_of(8, devices=found), (331, 691), P("expert")
    shapes = [(16, d, f), (16, f, d), (16, d, f), (16, f), (16, d), (16, f)]

    def run(x: Any, counts: Any, experts: Experts) -> Any:
        def network(x: Any, experts: Experts) -> Any:
            options: Any = {"tiling": ExchangeTiling(32, 2, 256), "activation": "gpt_oss"}
            return exchange_ffn(x, counts, num_rows=400, **experts._asdict(), **options)

        out, pull = jax.vjp(network, x, experts)
        return out, pull(out)

    def array(shape: tuple[int, ...], spec: P, kind: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        mapped = jax.shard_map(run, mesh=mesh, in_specs=(own, P(), own), out_specs=own)
        arguments = array((8 * 97, d), own), array((8, 16), P(), jnp.int32)
        experts = Experts(*(array(shape, own) for shape in shapes))
        text = jax.jit(mapped).lower(*arguments, experts).compile().as_text()
    calls = [line.split(" = ")[0] for line in text.splitlines() if "tpu_custom_call" in line]
    for kernel, times in {"pack": 3, "exchange_ffn": 1, "exchange_rows": 2, "unpack": 4}.items():
        assert sum(f"taskmoe_{kernel}" in name for name in calls) == times, kernel


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_rows_as_wide_as_sentences_compile() -> None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh, own = mesh_of(8, devices=found), P("expert")
    x = jax.ShapeDtypeStruct((8 * 32, 1 << 18), jnp.bfloat16, sharding=NamedSharding(mesh, own))
    counts = jax.ShapeDtypeStruct((8, 8), jnp.int32, sharding=NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        run = jax.shard_map(
            lambda x, c: exchange_rows(x, c, 64), mesh=mesh, in_specs=(own, P()), out_specs=own
        )
        text = jax.jit(run).lower(x, counts).compile().as_text()
    assert "taskmoe_exchange_rows" in text


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x4", "v6e:2x4"])
def test_compiles_for_a_mesh_of_eight(topology: str) -> None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    assert len(found) == 8
    # float32 on one axis, bfloat16 on two.
    for fused, dtype, shape in ((False, jnp.float32, (8,)), (True, jnp.bfloat16, (2, 4))):
        mesh = mesh_of(*shape, devices=found)
        peers, experts, rows, d, f = mesh.shape["expert"], 32, 2048, 512, 1024
        everywhere, over_experts = P(mesh.axis_names), P("expert")
        shapes = [
            ((mesh.size * rows, d), dtype, everywhere),
            ((mesh.size, experts), jnp.int32, P(mesh.axis_names[:-1] or None)),
        ]
        if shape == (8,):
            shapes[1] = ((peers, experts), jnp.int32, P())
        if fused:
            matrices = [(experts, d, f), (experts, d, f), (experts, f, d)]
            shapes += [(matrix, dtype, over_experts) for matrix in matrices]
        with jax.set_mesh(mesh):
            arguments = [
                jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec))
                for shape, kind, spec in shapes
            ]
            run = jax.shard_map(
                forward_and_backward(fused, peers * rows),
                mesh=mesh,
                in_specs=tuple(spec for _, _, spec in shapes),
                out_specs=(everywhere, (everywhere, *(over_experts for _ in shapes[2:]))),
            )
            text = jax.jit(run).lower(*arguments).compile().as_text()
        lines = [line.split(" = ") for line in text.splitlines() if "tpu_custom_call" in line]
        calls = {name: call[0] for name, *call in lines if "taskmoe_exchange" in name}
        assert sum("taskmoe_exchange_rows" in name for name in calls) == 2
        assert sum("taskmoe_exchange_ffn" in name for name in calls) == fused
        # Operands and results that DMAs work on stay in HBM.
        for call in calls.values():
            assert "S(1)" not in call.split(" custom-call(")[0], call
