"""exchange_ffn over four devices equals expert_ffn on one, and so do its gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from taskmoe.kernels import exchange_ffn_kernel, exchange_walk, expert_ffn, words_kernel
from taskmoe.kernels.exchange_ffn_kernel import exchange_ffn, room_for, tiling_for
from taskmoe.kernels.exchange_plan import to_words
from taskmoe.kernels.exchange_tiling import (
    ExchangeTiling,
    check_tiling,
    exchange_tiling,
    vmem_bytes,
)
from taskmoe.kernels.options import Experts
from taskmoe.kernels.tiling import vmem_budget_bytes
from taskmoe.tests.kernels import support
from taskmoe.tests.kernels.test_exchange import mesh_of

PEERS, EXPERTS, ROWS = 4, 8, 24
UNEVEN = np.array(
    [
        [3, 0, 3, 1, 0, 3, 7, 5],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [2, 0, 9, 3, 1, 4, 2, 3],
        [4, 0, 3, 2, 1, 4, 6, 2],
    ],
    np.int32,
)
ONE_TAKES_ALL, EMPTY = np.zeros_like(UNEVEN), np.zeros_like(UNEVEN)
ONE_TAKES_ALL[:, 1] = ROWS
#: Blocks of 8 rows, of which two stay while matrices pass by in three blocks, the last one short.
CUT = {"d": 131, "f": 300, "tiling": ExchangeTiling(8, 2, 128)}


def arguments(dtype: Any, counts: np.ndarray, d: int, f: int) -> tuple[Any, ...]:
    """x [peers * ROWS, D] with NaN where no row counts, a cotangent, all `Experts`, counts."""
    x, grad = (support.normal(i, (PEERS, ROWS, d), dtype) for i in (0, 1))
    held = np.arange(ROWS) < counts.sum(1, keepdims=True)
    x = jnp.where(held[..., None], x, jnp.nan)
    shapes = ((d, f), (f, d), (d, f), (f,), (d,), (f,))
    experts = Experts(
        *((0.1 * support.normal(2 + i, (EXPERTS, *s))).astype(dtype) for i, s in enumerate(shapes))
    )
    return x.reshape(-1, d), grad.reshape(-1, d), experts, jnp.asarray(counts)


def network(experts: Experts, kind: str) -> dict[str, Any]:
    """Which of the experts' parts there are: "plain", "gated" or "biased", which is gated too."""
    named: dict[str, Any] = experts._asdict() | {"activation": "silu"}
    absent = {"plain": ("w_gate", "b_in", "b_out", "b_gate"), "gated": ("b_in", "b_out", "b_gate")}
    return named | dict.fromkeys(absent.get(kind, ()))


def run(fused: Any, kind: str, backward: bool) -> Any:
    def f(x: Any, grad: Any, experts: Experts, counts: Any) -> Any:
        def forward(x: Any, experts: Experts) -> Any:
            return fused(x, counts, network(experts, kind))

        if not backward:
            return forward(x, experts)
        out, pull = jax.vjp(forward, x, experts)
        return out, pull(grad)

    return f


def together(kind: str, backward: bool, tiling: ExchangeTiling | None = None) -> Any:
    """On four devices: results [peers * ROWS, D], and gradients."""

    def fused(x: Any, counts: Any, named: Any) -> Any:
        return exchange_ffn(x, counts, num_rows=PEERS * ROWS, tiling=tiling, **named)

    own = P("expert")
    return jax.shard_map(
        run(fused, kind, backward), mesh=mesh_of(PEERS), in_specs=(own, own, own, P()),
        out_specs=own, check_vma=False,  # JAX's interpreter does not know varying axes
    )  # fmt: skip


def alone(kind: str) -> Any:
    """On one device: the same results, each device's rows in turn through all experts."""

    def plain(x: Any, counts: Any, named: Any) -> Any:
        rows = [
            expert_ffn(part, group_sizes=sizes, **named)
            for part, sizes in zip(x.reshape(PEERS, ROWS, -1), counts, strict=True)
        ]
        return jnp.concatenate(rows)

    return run(plain, kind, backward=True)


@functools.cache
def forward(kind: str, tiling: ExchangeTiling | None) -> tuple[Any, Any]:
    """Jitted once: on four devices, and on one."""
    return jax.jit(together(kind, False, tiling)), jax.jit(alone(kind))


def check_forward(counts: np.ndarray, kind: str, d: int, f: int, tiling: Any = None) -> None:
    args = arguments(jnp.float32, counts, d, f)
    ours, plain = forward(kind, tiling)
    with support.running("mosaic"):
        have = np.asarray(ours(*args))
    want, _ = plain(jnp.nan_to_num(args[0]), *args[1:])
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("gated", {"d": 256, "f": 128, "tiling": None}), ("biased", CUT | {"d": 200})],
    ids=["whole", "cut"],
)
def test_results_and_gradients_equal_one_device(kind: str, sizes: dict[str, Any]) -> None:
    tiling = sizes["tiling"] and ExchangeTiling(16, 2, 128)
    args = arguments(jnp.bfloat16, UNEVEN, sizes["d"], sizes["f"])
    clean = (jnp.nan_to_num(args[0]), *args[1:])
    truth = support.in_float64(alone(kind), *clean)
    plain = support.call("xla", alone(kind), *clean)
    ours = support.call("mosaic", together(kind, True, tiling), *args)
    support.assert_as_good(ours, plain, truth)


@pytest.mark.parametrize("counts", [UNEVEN, ONE_TAKES_ALL, EMPTY], ids=["uneven", "one", "none"])
@pytest.mark.parametrize("sizes", [{"d": 128, "f": 128}, CUT], ids=["whole", "cut"])
def test_whatever_the_experts_share_of_rows(counts: np.ndarray, sizes: dict[str, Any]) -> None:
    check_forward(counts, "plain", **sizes)


def test_rows_without_room_are_dropped_last_peers_first() -> None:
    d, f, tiling = CUT["d"], CUT["f"], CUT["tiling"]
    args = arguments(jnp.float32, ONE_TAKES_ALL, d, f)
    num_rows, own = 11, P("expert")
    places, _ = room_for(tiling, EXPERTS // PEERS, num_rows)
    assert ROWS < places < 2 * ROWS

    def local(x: Any, experts: Experts, counts: Any) -> Any:
        return exchange_ffn(
            x, counts, num_rows=num_rows, tiling=tiling, **network(experts, "plain")
        )

    x, _, experts, counts = args
    ours = jax.shard_map(
        local, mesh=mesh_of(PEERS), in_specs=(own, own, P()), out_specs=own, check_vma=False
    )
    with support.running("mosaic"):
        have = np.asarray(jax.jit(ours)(x, experts, counts))
    want = np.array(forward("plain", tiling)[1](*args)[0])
    want[places:] = 0
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.data())
def test_any_width_and_any_blocks(data: Any) -> None:
    d, f = (data.draw(st.integers(1, most), name) for name, most in (("D", 300), ("F", 500)))
    hidden = data.draw(st.sampled_from([*range(128, f, 128), f]), "hidden")
    rows, held = data.draw(st.sampled_from([8, 16]), "rows"), data.draw(st.integers(1, 3), "held")
    kind = data.draw(st.sampled_from(["plain", "gated", "biased"]), "kind")
    counts = [data.draw(support.group_patterns(ROWS, EXPERTS), f"{i}") for i in range(PEERS)]
    check_forward(np.array(counts, np.int32), kind, d, f, ExchangeTiling(rows, held, hidden))


def too_few(self: Any, units: int, cut: Any, tile: int) -> int:
    return min(units, tile)


def keep_last(self: Any, index: Any) -> Any:
    return jax.tree.map(lambda ref: ref.at[0], self._buffers)


@pytest.mark.parametrize(
    ("target", "name", "fault"),
    [
        (exchange_ffn_kernel.Copies, "wait_arrived", lambda self, segment: None),
        (exchange_walk.Matrices, "wait", lambda self, index: None),
        (exchange_walk.Matrices, "_in_tiles", too_few),
        (exchange_walk.Matrices, "held", keep_last),
        (exchange_walk.Buffered, "slot", lambda self, index: 0),
    ],
    ids=["arrivals", "matrices", "units", "which matrices", "which rows"],
)
def test_a_planted_fault_is_caught(target: Any, name: str, fault: Any) -> None:
    d, f, tiling = CUT["d"], CUT["f"], CUT["tiling"]
    args = arguments(jnp.float32, UNEVEN, d, f)
    want, _ = support.call("xla", alone("plain"), jnp.nan_to_num(args[0]), *args[1:])
    ours = together("plain", False, tiling)
    with (
        support.planted(target, name, fault),
        pytest.raises(Exception, match=r"RACE DETECTED|Not equal|emaphore"),
    ):
        np.testing.assert_allclose(support.call("mosaic", ours, *args), want, rtol=1e-5)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(0, 9))
def test_visits_cover_all_blocks_in_order(blocks: list[int], span: int) -> None:
    found = exchange_walk.visit_experts(jnp.asarray(blocks), sum(blocks), span or None)
    expert, first, (num,) = map(np.asarray, found)
    sizes = np.diff(first[: num + 1])
    assert len(first) == len(expert) + 1
    assert (sizes > 0).all()
    assert (sizes <= (span or 20)).all()
    walked = np.repeat(expert[:num], sizes)
    np.testing.assert_array_equal(walked, np.repeat(np.arange(len(blocks)), blocks))
    least = [-(-b // (span or 20)) for b in blocks]
    assert num == sum(least)


def one_column_off(words_ref: Any, x_ref: Any, padded_ref: Any) -> None:
    words_kernel.unpack_block(words_ref, padded_ref, on_tpu=True)
    x_ref[...] = jnp.roll(padded_ref[...], 1, axis=1)[:, : x_ref.shape[1]]


@pytest.mark.parametrize("dtype", support.DTYPES)
def test_rows_are_unpacked_as_defined(dtype: Any) -> None:
    # On a TPU refs are reshaped, which JAX's plain interpreter knows, for reading alone.
    x, plain = (
        support.normal(0, (24, 700), dtype),
        functools.partial(pl.pallas_call, interpret=True),
    )
    with (
        support.planted(words_kernel, "interpret_mode", lambda: None),
        support.planted(pl, "pallas_call", plain),
    ):
        words = to_words(x)
        np.testing.assert_array_equal(words_kernel.unpack_rows(words, 700, dtype), x)
        with support.planted(words_kernel, "unpack_kernel", one_column_off):
            assert (np.asarray(words_kernel.unpack_rows(words, 700, dtype)) != x).any()


class View:
    """What a kernel does with a ref, done with a NumPy array."""

    def __init__(self, array: np.ndarray, is_ref: bool = False) -> None:
        self.array, self._is_ref = array, is_ref
        self.shape, self.dtype = array.shape, array.dtype

    @property
    def at(self) -> "View":
        return View(self.array, is_ref=True)

    def reshape(self, *shape: int) -> "View":
        view = self.array.reshape(shape)
        assert np.shares_memory(view, self.array)
        return View(view)

    def _index(self, index: Any) -> Any:
        def plain(part: Any) -> Any:
            if not isinstance(part, pl.Slice):
                return part
            return slice(part.start, part.start + (part.size - 1) * part.stride + 1, part.stride)

        return tuple(map(plain, index)) if isinstance(index, tuple) else plain(index)

    def __getitem__(self, index: Any) -> Any:
        found = self.array[self._index(index)]
        return View(found) if self._is_ref else found

    def __setitem__(self, index: Any, values: Any) -> None:
        self.array[self._index(index)] = values


@pytest.mark.parametrize("on_tpu", [False, True])
@pytest.mark.parametrize("dtype", support.DTYPES)
def test_rows_are_packed_where_they_are_unpacked(dtype: Any, on_tpu: bool) -> None:
    x = support.normal(0, (24, 768), dtype)
    words = np.asarray(to_words(x))
    packed, back = np.zeros_like(words), np.zeros(x.shape, x.dtype)
    words_kernel.pack_block(View(np.asarray(x)), View(packed), dtype, on_tpu)
    np.testing.assert_array_equal(packed, words)
    words_kernel.unpack_block(View(packed), View(back), on_tpu)
    np.testing.assert_array_equal(back, x)


#: (D, F, E, matrices) of models, and rows that come to one of eight devices.
MODELS = {
    "mixtral": ((4096, 14336, 8, 3), 16384),
    "qwen3": ((2048, 768, 128, 3), 32768),
    "deepseek-v3": ((7168, 2048, 256, 3), 8192),
    "gpt-oss": ((2880, 2880, 128, 3), 16384),
    "olmoe": ((2048, 1024, 64, 3), 32768),
    "nllb": ((2048, 8192, 128, 2), 16384),
}


def test_experts_of_models_fit_and_stay_whole_where_they_can() -> None:
    whole = set()
    for version in ("v5e", "v6e", "7x"):
        info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(version), 1)
        for name, ((d, f, e, matrices), rows) in MODELS.items():
            tiling = exchange_tiling(rows, d, f, e // 8, matrices, 2, info)
            assert tiling is not None, name
            assert vmem_bytes(tiling, d, f, matrices, 2) <= vmem_budget_bytes(info)
            if tiling.hidden == f:
                whole.add((version, name))
    narrow = {(chip, name) for chip in ("v5e", "v6e", "7x") for name in ("qwen3", "olmoe")}
    assert whole == narrow | {("v6e", "gpt-oss")}


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("own", [1, 2, 8])
def test_blocks_that_are_chosen_may_be_given(own: int, itemsize: int) -> None:
    for version in ("v5e", "v6e", "7x"):
        info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(version), 1)
        for rows in (1, 8, 24, 40, 48, 100, 200, 208, 4096):
            tiling = exchange_tiling(rows, 512, 2048, own, 3, itemsize, info)
            assert tiling is not None
            check_tiling(tiling, 2048, itemsize)


def test_what_the_kernel_does_not_take() -> None:
    def fits(d: int, f: int, experts: int) -> bool:
        x, counts, w_in = (
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (
                ((ROWS, d), jnp.bfloat16),
                ((PEERS, experts), jnp.int32),
                ((experts // PEERS, d, f), jnp.bfloat16),
            )
        )
        arrays: Any = (x, counts, Experts(w_in, None))
        return tiling_for(*arrays, PEERS * ROWS) is not None

    assert fits(256, 512, 8)
    assert fits(200, 500, 8)
    assert fits(4096, 14336, 8)
    assert not fits(65536, 512, 8)
    assert not fits(256, 512, 512)


def test_wrong_arguments_are_named() -> None:
    x, counts = jnp.zeros((4 * ROWS, 128)), jnp.zeros((4, 8), jnp.int32)
    w_in, w_out, bias = jnp.zeros((8, 128, 128)), jnp.zeros((8, 128, 128)), jnp.zeros((8, 64))
    many = jnp.zeros((512, 8, 128)), jnp.zeros((512, 128, 8))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ((x, counts, w_in[:, :64], w_out), {}, r"w_in must have shape \[2, 128, F\]"),
        ((x, counts, w_in, w_out[:, :64]), {}, r"w_out must have shape \[2, 128, 128\]"),
        ((x, counts, w_in, w_out), {"activation": "tanh"}, "activation must be one of 'relu'"),
        ((x, counts, w_in, w_out), {"b_in": bias[:2]}, r"b_in must have shape \[2, 128\]"),
        ((x, counts, w_in, w_out), {"b_gate": bias[:2]}, "b_gate must be None without w_gate"),
        ((x[:, :8], jnp.zeros((4, 512), jnp.int32), *many), {}, "at most 256 experts, got 512"),
        (
            (x[:, :8], jnp.zeros((4, 512), jnp.int32), *many),
            {"tiling": ExchangeTiling(8, 1, 128)},
            "at most 256 experts, got 512",
        ),
        (
            (x, counts, w_in[..., :0], w_out[:, :0]),
            {},
            r"w_in must not be empty, got \[2, 128, 0\]",
        ),
        (
            (x, counts, w_in, w_out),
            {"tiling": ExchangeTiling(8.0, 1, 128)},  # type: ignore[arg-type]
            r"tiling.rows must be an int, got 8.0",
        ),
        (
            (x, counts, w_in, w_out),
            {"tiling": ExchangeTiling(8, 1, 64)},
            r"tiling.hidden must be 128 \(all\) or a smaller multiple of 128, got 64",
        ),
        (
            (x, counts, w_in, w_out),
            {"tiling": ExchangeTiling(12, 1, 128)},
            "tiling.rows must be a power of two of at least 8, got 12",
        ),
        ((x, counts, w_in, w_out), {"tiling": ExchangeTiling(8, 0, 128)}, "tiling.held must be"),
    ]
    own = P("expert")
    for args, options, message in cases:

        def local(*args: Any, options: Any = options) -> Any:
            return exchange_ffn(*args, 96, **options)

        f = jax.shard_map(local, mesh=mesh_of(4), in_specs=(own, P(), own, own), out_specs=own)
        with (
            support.running("mosaic"),
            pytest.raises((TypeError, ValueError), match=message),
        ):
            f(*args)
