"""Every kernel, forward and backward, compiled ahead of time for six TPU generations.

Needs libtpu (`pip install "jax[tpu]"`), and no TPU: its compiler runs anywhere. All ops of one
chip, dtype and size go into one program, which takes a third of the time of one program each; when
it does not compile, each op is compiled by itself, so that the error names the op.
"""

import functools
import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taskmoe import moe
from taskmoe.kernels import (
    ROUTERS,
    Quantized,
    combine,
    dequantize,
    dispatch,
    expert_ffn,
    gmm,
    gmm_kernel,
    hidden_gradients_kernel,
    row_plan,
    tgmm,
    tgmm_kernel,
    top_k_gating,
)
from taskmoe.kernels.ffn_backward_kernel import expert_ffn_backward_mosaic
from taskmoe.kernels.groups import Groups
from taskmoe.kernels.hidden_gradients_kernel import expert_ffn_backward_split
from taskmoe.kernels.options import Experts, FFNOptions
from taskmoe.kernels.tiling import Tiling

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
TOPOLOGIES = {
    "v3": "v3:4x8",
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
CHIPS = [
    (chip, dtype)
    for chip in TOPOLOGIES
    for dtype in (jnp.float32, jnp.bfloat16)
    if (chip, dtype) != ("v3", jnp.bfloat16)  # Mosaic takes no bfloat16 there
]
#: (T, D, F, E, k): sizes that nothing divides, the paper's WMT model, and decoding with it.
AWKWARD, WMT, DECODING = (37, 131, 261, 5, 3), (8192, 512, 2048, 32, 2), (32, 512, 2048, 32, 2)
#: Mosaic's rules about alignment are met by every chip and dtype at awkward sizes; tiles are chosen
#: by what fits the chip, so each is tried at WMT's size in the dtype that is used there. What is
#: left out compiles with `python -m taskmoe.bench tpu --kernels`.
CASES = [
    *((chip, dtype, AWKWARD) for chip, dtype in CHIPS),
    *((chip, jnp.float32 if chip == "v3" else jnp.bfloat16, WMT) for chip in TOPOLOGIES),
    ("v5e", jnp.float32, WMT),
    *((chip, jnp.bfloat16, DECODING) for chip in ("v4", "v5e", "tpu7x")),
]


@functools.cache
def devices(chip: str) -> Any:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name = TOPOLOGIES[chip]
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def compiled(chip: str, f: Callable[..., Any], *shapes: Any, count: int = 1) -> str:
    """HLO of f compiled for this chip, all arguments whole on every one of `count` devices."""
    axes: Any = {"axis_types": (AxisType.Auto,)}
    mesh = Mesh(np.array(devices(chip)[:count]), ("data",), **axes)
    with jax.set_mesh(mesh):
        args = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, P())),
            shapes,
        )
        return jax.jit(f).lower(*args).compile().as_text()


def cases(size: tuple[int, ...], dtype: Any) -> dict[str, tuple[Any, Any, int]]:
    """Name of each op: itself, its arguments and how many of them carry gradients."""
    t, d, f, e, k = size
    array = jax.ShapeDtypeStruct
    m = t * k
    sizes, rows = array((e,), jnp.int32), array((t, k), jnp.int32)
    wide, up, down = array((m, d), dtype), array((e, d, f), dtype), array((e, f, d), dtype)

    def gating(logits: Any) -> Any:
        found = top_k_gating(logits, k)
        return found.weights, found.mean_probs, found.z_loss

    def gated(x: Any, w_in: Any, w_out: Any, w_gate: Any, sizes: Any) -> Any:
        return expert_ffn(x, w_in, w_out, sizes, activation="silu", w_gate=w_gate)

    weights = array((t, k), jnp.float32)
    return {
        "top_k_gating": (gating, [array((t, e), dtype)], 1),
        "dispatch": (lambda x, r: dispatch(x, r, m), [array((t, d), dtype), rows], 1),
        "combine": (lambda y, w, r: combine(y, r, w), [wide, weights, rows], 2),
        "gmm": (gmm, [wide, up, sizes], 2),
        "tgmm": (tgmm, [wide, array((m, f), dtype), sizes], 2),
        "expert_ffn": (lambda *a: expert_ffn(*a, activation="gelu"), [wide, up, down, sizes], 3),
        "expert_ffn gated": (gated, [wide, up, down, up, sizes], 4),
    }


def forward_and_backward(f: Callable[..., Any], args: Any, count: int) -> tuple[Any, Any]:
    """f's result and its gradients for its first `count` arguments, as a function, and its args."""

    def run(grad: Any, *args: Any) -> Any:
        out, pull = jax.vjp(lambda *first: f(*first, *args[count:]), *args[:count])
        return out, pull(grad)

    return run, (jax.eval_shape(f, *args), *args)


@pytest.mark.parametrize(("chip", "dtype", "size"), CASES)
def test_compiles_forward_and_backward(chip: str, dtype: Any, size: tuple[int, ...]) -> None:
    programs = {op: forward_and_backward(*case) for op, case in cases(size, dtype).items()}

    def together(args: dict[str, Any]) -> Any:
        return {op: run(*args[op]) for op, (run, _) in programs.items()}

    try:
        text = compiled(chip, together, {op: args for op, (_, args) in programs.items()})
    except Exception as error:
        failures = [f"{op}: {why}" for op, why in each_failure(chip, programs)]
        raise AssertionError("\n".join(failures) or f"only together: {error}") from error
    movers = ("gather_rows", "row_dots") if chip == "v3" else ("take_rows", "add_rows")
    for kernel in ("top_k_gating_backward", *movers, "visits", "gmm", "tgmm"):
        assert f"taskmoe_{kernel}" in text


@pytest.mark.parametrize(("tokens", "experts", "k"), [(4096, 32, 2), (300, 300, 11), (700, 300, 1)])
@pytest.mark.parametrize("chip", sorted({chip for chip, _ in CHIPS}))
def test_queues_are_found_in_kernels(chip: str, tokens: int, experts: int, k: int) -> None:
    logits = jax.ShapeDtypeStruct((tokens, experts), jnp.float32)
    text = compiled(chip, lambda x: top_k_gating(x, k), logits)
    looks_up = chip != "v3"  # which has XLA's gating
    assert bool(re.search(r"taskmoe_top_k_gating\b", text)) == looks_up
    assert ("taskmoe_queue_slots" in text) == (looks_up and k > 1)


@pytest.mark.parametrize("chip", ["v4", "v5e"])
def test_rows_of_more_tokens_than_vmem_holds_are_gathered_one_by_one(chip: str) -> None:
    tokens = 1 << 18
    for op in ("dispatch", "combine"):
        f, args, count = cases((tokens, 256, 128, 4, 2), jnp.bfloat16)[op]
        run, args = forward_and_backward(f, args, count)
        text = compiled(chip, run, *args)
        assert "taskmoe_gather_rows" in text
        assert "taskmoe_take_rows" not in text
        assert "taskmoe_add_rows" not in text


def each_failure(chip: str, programs: dict[str, tuple[Any, Any]]) -> list[tuple[str, str]]:
    """Which ops do not compile by themselves, and why."""
    failures = []
    for op, (run, args) in programs.items():
        try:
            compiled(chip, run, *args)
        except Exception as error:
            failures.append((op, str(error)))
    return failures


def test_routers_and_activations_of_models_compile() -> None:
    array = jax.ShapeDtypeStruct

    def gating(router: str, k: int) -> Any:
        def run(logits: Any, bias: Any) -> Any:
            found = top_k_gating(logits, k, router=ROUTERS[router], bias=bias)
            return found.weights, found.mean_probs, found.z_loss

        return run

    def gated(x: Any, w_in: Any, w_out: Any, w_gate: Any, up: Any, down: Any, sizes: Any) -> Any:
        biases: Any = {"b_in": up, "b_gate": 2 * up, "b_out": down}
        return expert_ffn(x, w_in, w_out, sizes, activation="gpt_oss", w_gate=w_gate, **biases)

    biases = array((4, 512), jnp.bfloat16), array((4, 256), jnp.bfloat16)
    up, down = array((4, 256, 512), jnp.bfloat16), array((4, 512, 256), jnp.bfloat16)
    logits = {e: (array((512, e), jnp.float32), array((e,), jnp.float32)) for e in (160, 256)}
    programs = {
        "deepseek_v2": forward_and_backward(gating("deepseek_v2", 6), logits[160], 1),
        "deepseek_v3": forward_and_backward(gating("deepseek_v3", 8), logits[256], 1),
        "deepseek_v4": forward_and_backward(gating("deepseek_v4", 6), logits[256], 1),
        "gpt_oss": forward_and_backward(
            gated,
            (array((64, 256), jnp.bfloat16), up, down, up, *biases, array((4,), jnp.int32)),
            6,
        ),
    }
    assert each_failure("v5e", programs) == []


def frozen(
    shape: tuple[int, int, int], kind: Any, block: int | None, activations: str | None
) -> Quantized:
    (e, k, n), array = shape, jax.ShapeDtypeStruct
    values: Any = array(shape, kind)
    scales: Any = array((e, k // (block or k), 1, n), jnp.float32)
    return Quantized(values, scales, activations)


#: (T, D, F, E, k), block, dtype of the rows.
QUANTISED = [
    (AWKWARD, None, jnp.float32),
    ((32, 256, 512, 4, 2), 128, jnp.bfloat16),
    (DECODING, None, jnp.bfloat16),
]


@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
@pytest.mark.parametrize(("size", "block", "dtype"), QUANTISED)
def test_quantised_experts_compile_and_are_never_made_larger(
    chip: str, size: tuple[int, ...], block: int | None, dtype: Any
) -> None:
    t, d, f, e, k = size
    array = jax.ShapeDtypeStruct
    rows, sizes = array((t * k, d), dtype), array((e,), jnp.int32)
    kinds = [(jnp.int8, None), (jnp.int8, "int8"), (jnp.float8_e4m3fn, None)]
    if size == DECODING:
        kinds = kinds[:1]  # the others' code is the same at any size

    def networks(of: Any) -> Any:
        def run(x: Any, up: Any, down: Any, sizes: Any) -> Any:
            return expert_ffn(x, of(up), of(down), sizes, activation="silu", w_gate=of(up))

        return run

    whole = f"{'f32' if dtype == jnp.float32 else 'bf16'}[{e},{d},{f}]"
    for kind, activations in kinds:
        up, down = (frozen(s, kind, block, activations) for s in ((e, d, f), (e, f, d)))
        args = rows, up, down, sizes
        run, args = forward_and_backward(networks(lambda w: w), args, 1)
        text = compiled(chip, run, *args)
        assert ("taskmoe_expert_ffn" in text) == (activations is None)
        assert "taskmoe_gmm" in text
        assert whole not in text
    if size == DECODING:  # what the same program has where matrices are made larger first
        run, args = forward_and_backward(networks(lambda w: dequantize(w, dtype)), args[1:], 1)
        assert whole in compiled(chip, run, *args)


@pytest.mark.parametrize(
    ("chip", "d", "f", "backwards"),
    [
        ("tpu7x", 512, 4096, (expert_ffn_backward_mosaic, expert_ffn_backward_split)),
        ("tpu7x", 1024, 4096, (expert_ffn_backward_mosaic,)),
        ("v6e", 1024, 8192, (expert_ffn_backward_mosaic,)),
    ],
)
def test_the_backward_of_wide_experts_fits_in_vmem(
    chip: str, d: int, f: int, backwards: tuple[Any, ...]
) -> None:
    (m, e), array = (32768, 8), jax.ShapeDtypeStruct
    rows, sizes = array((m, d), jnp.bfloat16), array((e,), jnp.int32)
    weights = [array(shape, jnp.bfloat16) for shape in ((e, d, f), (e, f, d))]
    for backward in backwards:
        text = compiled(chip, of_experts(backward, "gelu"), rows, *weights, sizes)
        several = backward is expert_ffn_backward_split
        name = "hidden_gradients" if several else "backward"
        assert f"taskmoe_expert_ffn_{name}" in text


def of_experts(backward: Any, activation: str, how: Any = None) -> Callable[..., Any]:
    """That backward as a function of rows, matrices, group sizes and biases; dy is the rows."""

    def run(x: Any, w_in: Any, w_out: Any, sizes: Any, w_gate: Any = None, *biases: Any) -> Any:
        experts = Experts(w_in, w_out, w_gate, *biases)
        options = FFNOptions(activation, False, "mosaic")
        return backward(options, x, experts, Groups(sizes, jnp.int32(0)), x, how)

    return run


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_a_backward_in_several_kernels_compiles(chip: str) -> None:
    array, dtype = jax.ShapeDtypeStruct, jnp.float32 if chip == "v3" else jnp.bfloat16
    # Hidden units that are cut, and overhang; that are not; experts with biases.
    for (m, d, f, e), how in (
        ((1024, 512, 900, 3), (Tiling(256, 512, 384), True)),
        ((1024, 512, 900, 3), (Tiling(256, 512, 384), False)),
        ((512, 256, 384, 4), (Tiling(128, 256, 384), True)),
        ((512, 512, 1900, 4), (Tiling(256, 512, 1900), True)),  # in one piece
    ):
        if chip in ("v3", "v4") and f == 1900:
            continue  # VMEM has no room for it
        run = of_experts(expert_ffn_backward_split, "silu", how)
        rows, sizes = array((m, d), dtype), array((e,), jnp.int32)
        up, down, wide = array((e, d, f), dtype), array((e, f, d), dtype), array((e, f), dtype)
        for biases in ((), (wide, array((e, d), dtype), wide)):
            text = compiled(chip, run, rows, up, down, sizes, up, *biases)
            assert "taskmoe_expert_ffn_hidden_gradients" in text
            assert ("taskmoe_gmm" in text) != how[1]


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_loops_over_pieces_compile(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that sizes are small, and compiled soon.
    for module in (gmm_kernel, tgmm_kernel, hidden_gradients_kernel):
        monkeypatch.setattr(module, "WRITTEN", 1)
    jax.clear_caches()
    (m, d, f, e), array = (2048, 512, 1024, 4), jax.ShapeDtypeStruct
    dtype = jnp.float32 if chip == "v3" else jnp.bfloat16
    rows, wide, sizes = array((m, d), dtype), array((m, f), dtype), array((e,), jnp.int32)
    programs: dict[str, tuple[Any, Any]] = {
        "gmm": forward_and_backward(gmm, (rows, array((e, d, f), dtype), sizes), 2),
        "tgmm": forward_and_backward(tgmm, (rows, wide, sizes), 2),
    }
    if chip not in ("v3", "v4"):
        for block in (None, 128):
            for activations in (None, "int8"):
                held = frozen((e, d, f), jnp.int8, block, activations)
                name = f"gmm, int8 in blocks of {block} by rows of {activations}"
                programs[name] = forward_and_backward(gmm, (rows, held, sizes), 1)
    how = Tiling(128, d, 512), True
    up, down = array((e, d, f), dtype), array((e, f, d), dtype)
    biases = [array((e, n), dtype) for n in (f, d, f)]
    backward = of_experts(expert_ffn_backward_split, "silu", how)
    programs["backward of expert_ffn"] = backward, (rows, up, down, sizes, up, *biases)
    assert each_failure(chip, programs) == []


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_compiles_inside_shard_map(chip: str) -> None:
    x, logits = jnp.zeros((64, 256)), jnp.zeros((64, 8))
    w_in, w_out = jnp.zeros((8, 256, 512)), jnp.zeros((8, 512, 256))

    def local(x: Any, logits: Any, w_in: Any, w_out: Any) -> Any:
        gating = top_k_gating(logits)
        plan = row_plan(gating)
        rows = expert_ffn(dispatch(x, plan.rows, plan.num_rows), w_in, w_out, plan.group_sizes)
        return jnp.sum(jax.lax.psum(combine(rows, plan.rows, gating.weights) ** 2, "data"))

    mapped = jax.shard_map(local, in_specs=(P("data"), P("data"), P(), P()), out_specs=P())
    assert "taskmoe_" in compiled(
        chip, jax.grad(mapped, argnums=(0, 1, 2, 3)), x, logits, w_in, w_out, count=4
    )


def test_experts_that_lie_row_major_are_not_copied() -> None:
    """XLA puts 128 experts last, where widths are no multiples of 128, and copies them then."""
    axes: Any = {"axis_types": (AxisType.Auto,)}
    mesh = Mesh(np.array(devices("v6e")[:1]), ("data",), **axes)
    config = moe.MoEConfig(d_model=192, d_ff=160, num_experts=128, gated=True, activation="silu")
    shapes = jax.eval_shape(lambda: moe.init(jax.random.key(0), config, jnp.bfloat16))
    whole = NamedSharding(mesh, P())
    place = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    params = {name: place(s.shape, sharding=whole) for name, s in shapes.items()}
    formats = moe.row_major(params)
    row_major = {name: place(s.shape, sharding=formats[name]) for name, s in shapes.items()}
    x = place((1, 256, 192), sharding=whole)

    def copies(params: Any, out: Any) -> int:
        def gradients(params: Any, x: Any) -> Any:
            return jax.grad(lambda p: moe.apply(p, config, x)[0].astype(jnp.float32).sum())(params)

        with jax.set_mesh(mesh):
            compiled = jax.jit(gradients, out_shardings=out).lower(params, x).compile()
        lines = (compiled.as_text() or "").splitlines()
        return sum(" copy(" in line and "= bf16[128,1" in line for line in lines)

    assert copies(row_major, formats) == 0
    assert copies(params, dict.fromkeys(params, whole)) >= 3
