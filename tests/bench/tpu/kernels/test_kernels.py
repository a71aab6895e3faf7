"""The compile lab: one kernel compiled, bytes counted, crashes and bad input told in a line."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.bench.__main__ import main
from taskmoe.bench.harness.worker import Died
from taskmoe.bench.tpu import across, grid_walk
from taskmoe.bench.tpu import cases as kernel_cases
from taskmoe.bench.tpu.compiler import NO_KERNEL, Compiled, Kernel, death_note
from taskmoe.bench.tpu.kernels import expert_bytes, worker
from taskmoe.bench.tpu.kernels.measure import Kernels, Row
from taskmoe.bench.tpu.kernels.view import view
from taskmoe.bench.tpu.regions import Trips
from taskmoe.cli.errors import InputError
from taskmoe.kernels import expert_ffn, gmm, quantize, quantized
from taskmoe.kernels.tiling import Tiling

V5E = "v5e"
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


def compiled(folder: Path, chip: str, op: str, dtype: str, shape: str) -> Any:
    """Rows of what `tpu --kernels` compiles."""
    options = ["--chips", chip, "--ops", op, "--dtypes", dtype, "--shapes", shape]
    assert main(["tpu", "--kernels", *options, "--json", str(folder / "tpu.json")]) == 0
    return json.loads((folder / "tpu.json").read_text())["kernels"]


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")
def test_one_kernel_is_compiled_and_modelled(tmp_path: Path, capsys: Any) -> None:
    rows = compiled(tmp_path, "v5e", "gmm", "bf16", "awkward")
    assert "modelled" in capsys.readouterr().out
    ours = next(row for row in rows if row["by"] == "taskmoe" and row["direction"] == "forward")
    (kernel,) = ours["kernels"]
    assert kernel["kernel"] == "taskmoe_gmm"
    assert 0 < kernel["filled"]["MXU"] <= 1
    assert kernel["main_bundles"] <= kernel["bundles"]
    assert ours["modelled_us"] >= ours["roofline_us"] * 0.99
    assert kernel["regions"]["parts"][0] > kernel["regions"]["step"] > 0
    assert ours["outside_cycles"] > 0
    assert {row["by"] for row in rows} >= {"taskmoe", "megablox"}


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")
def test_a_layer_is_compiled_for_its_temporaries(tmp_path: Path) -> None:
    forward, backward = compiled(tmp_path, "v5e", "moe_layer", "bf16", "awkward")
    rows = 3 * 37 * 131 * 2  # of all choices of all tokens
    assert rows < forward["temporary_bytes"] < backward["temporary_bytes"] < 64 * rows
    names = {kernel["kernel"] for kernel in backward["kernels"]}
    assert {"taskmoe_top_k_gating_backward", "taskmoe_expert_ffn_backward"} <= names
    assert "modelled_us" not in backward


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")
def test_an_op_without_a_kernel_on_a_chip_is_told_and_the_rest_compiled(tmp_path: Path) -> None:
    forward, backward = compiled(tmp_path, "v3", "top_k_gating", "f32", "decode")
    assert forward["error"] == NO_KERNEL
    assert backward["kernels"]


def test_walked_bytes_of_gmm_by_hand() -> None:
    x, w = jnp.zeros((64, 128), jnp.bfloat16), jnp.zeros((4, 128, 256), jnp.bfloat16)
    sizes = jnp.asarray([24, 0, 40, 0], jnp.int32)
    with grid_walk.recording(V5E) as calls:
        gmm(x, w, sizes, tiling=Tiling(16, 128, 256), implementation="mosaic")
    visits, call = calls
    assert visits.moved_bytes == 4 * (2 * 4 + 2 * (4 + 4 + 1) + 1)
    touched = 2 * 128 * 256 * 2
    assert call.moved_bytes == x.nbytes + touched + 64 * 256 * 2
    # A planted waste: a cut depth fetches every matrix once a visit.
    wide = jnp.zeros((64, 256), jnp.bfloat16), jnp.zeros((4, 256, 256), jnp.bfloat16)
    with grid_walk.recording(V5E) as calls:
        gmm(*wide, sizes, tiling=Tiling(16, 128, 256), implementation="mosaic")
    _, call = calls
    count = 5  # rows 16..31 are of two groups
    assert call.moved_bytes == count * (16 * 256 + 256 * 256) * 2 + 64 * 256 * 2


def test_the_busiest_chip_of_eight_reads_a_cut_expert_once_for_the_rows_it_holds() -> None:
    case = kernel_cases.Case("exchange_ffn_gated", "taskmoe", "forward", "v5e", "bf16", "mixtral")
    (packed, call, _), floor = across.walk(case)
    assert packed.moved_bytes == 2 * 8192 * 2 * 4096 * 2
    sizes = across.Sizes(case)
    tiling, (rows,) = sizes.tiling("v5e"), sizes.busiest()
    assert tiling is not None
    assert rows > 8192 * 2  # the mean
    blocks = -(-rows // tiling.rows)
    expert, travelling = 3 * 4096 * 14336 * 2, 6 * rows * 4096 * 2
    assert call.walked_bytes == -(-blocks // tiling.held) * expert + travelling
    assert floor == expert + 2 * 8192 * 2 * 4096 * 2
    assert call.trips is not None
    assert call.trips.parts[0] == blocks * 14336 // tiling.hidden
    small = dataclasses.replace(case, op="exchange_rows", shape="awkward")
    assert across.walk(small)[1] == (3 * 37 + 8 * 37) * 131 * 2


def test_expert_ffn_moves_hardly_more_than_the_floor_and_a_fault_shows() -> None:
    for row in expert_bytes.table("v5e"):
        if row.way == "taskmoe expert_ffn":
            assert 1 <= row.ratio <= 1.15
        if row.way in expert_bytes.QUANTISED:
            assert 1 <= row.ratio <= 1.05
            bf16 = 2 * 2 * 512 * 2048
            assert row.floor_bytes <= 32 * (bf16 // 2 + 4 * (512 + 2048)) + 4 * 512 * row.rows
    x, sizes = jnp.zeros((64, 512), jnp.bfloat16), jnp.full(32, 2, jnp.int32)
    w_in: Any = jnp.zeros((32, 512, 512), x.dtype)
    w_out: Any = jnp.zeros((32, 512, 512), x.dtype)

    def moved(rows: int, hidden: int) -> int:
        tiling = Tiling(rows, 512, hidden)
        options: Any = {"tiling": tiling, "implementation": "mosaic"}
        with grid_walk.recording("v5e") as calls:
            expert_ffn(x, w_in, w_out, sizes, **options)
        _, call = calls
        return call.moved_bytes

    least = 2 * w_in.nbytes + 2 * x.nbytes
    assert moved(16, 512) == least
    sizes = jnp.full(32, 2, jnp.int32).at[0].set(1).at[31].set(3)  # every block straddles
    assert moved(16, 128) > 1.05 * least
    w_in, w_out = quantize(w_in), quantize(w_out)
    least = quantized.nbytes(w_in, w_out) + 2 * x.nbytes
    assert moved(16, 512) <= 1.05 * least
    assert moved(16, 128) > 1.05 * least


def test_a_pipeline_inside_moves_what_its_blocks_do() -> None:
    x, w = jnp.zeros((64, 128), jnp.bfloat16), jnp.zeros((4, 128, 256), jnp.bfloat16)
    sizes, tiling = jnp.asarray([24, 0, 40, 0], jnp.int32), Tiling(16, 128, 128)
    moved = {}
    for chip in ("v4", "v6e"):  # a grid, and a pipeline
        with grid_walk.recording(chip) as calls:
            gmm(x, w, sizes, tiling=tiling, implementation="mosaic")
        moved[chip] = (calls[1].moved_bytes, calls[1].steps, calls[1].trips)
    assert moved["v4"] == moved["v6e"]


def test_kernels_of_one_name_are_told_apart_by_their_parts() -> None:
    def of(parts: list[int]) -> tuple[Any, dict[str, Any]]:
        count = len(parts)
        trips = Trips(step=1, result=0, parts=[1] * count, passes=[1] * count)
        call = grid_walk.KernelCall("taskmoe_gmm", None, 1, 0, copies_by_hand=False, trips=trips)
        regions = {"step": 0, "result": 0, "parts": parts, "inner": [0] * count}
        kernel = {"kernel": call.name, "main_bundles": 1, "filled": {"MXU": 0.0}}
        return call, kernel | {"regions": regions}

    (tall, one), (low, other) = of([500, 300]), of([7])
    for kernels in ([one, other], [other, one]):
        assert worker.model(V5E, [tall, low], 0, kernels, 0)["bundles_run"] == 807
    assert worker.model(V5E, [low], 0, [other], 0)["bundles_run"] == 7


def test_a_refusal_names_no_folder_of_this_machine() -> None:
    error = ValueError("no block at\n  /home/me/lib/site-packages/jax/gmm.py:393 fits")
    assert worker.refusal(error) == "no block at jax/gmm.py:393 fits"


def test_results_are_told_apart() -> None:
    def result(*shapes: str) -> Kernels:
        case: Any = {"op": "gmm", "by": "taskmoe", "direction": "forward", "chip": V5E}
        kernel = Kernel("taskmoe_gmm", 90, 80, {"MXU": 0.5}, 0)
        rows = [
            Row(**case, dtype="bf16", shape=shape, compile_s=1.0, kernels=[kernel], modelled_us=4.0,
                roofline_us=share)
            for shape, share in zip(shapes, (1.0, 2.0), strict=False)
        ]  # fmt: skip
        return Kernels({}, rows, [])

    all_three = view(result("wmt"), result("mixtral", "qwen3"), result("decode", "awkward"))
    assert all_three.short is not None
    assert [row[0] for row in all_three.short.rows] == [
        "the WMT model's size",
        "2 models' sizes",
        "the sizes decode and awkward",
    ]
    shares = [("25%", "25%", "25%"), ("25%", "38%", "50%"), ("25%", "38%", "50%")]
    assert [row[2:] for row in all_three.short.rows] == shares
    names = ["kernels", "kernels-models", "kernels-small"]
    assert [chart.name for chart in all_three.charts] == names
    assert "25% to 50% of the roofline at 2 models' sizes" in all_three.answer
    assert all_three.code == 0
    assert "of the roofline at nllb's sizes" in view(result("nllb")).answer


def test_recording_leaves_nothing_behind() -> None:
    before = jax.experimental.pallas.pallas_call
    with pytest.raises(RuntimeError), grid_walk.recording(V5E):
        raise RuntimeError
    assert jax.experimental.pallas.pallas_call is before


def test_blocks_over_the_edge_count_what_is_there() -> None:
    block = jax.experimental.pallas.BlockSpec((16, None), lambda i: (i, 0))
    array = np.zeros((40, 7), np.float32)
    assert grid_walk.walk_bytes(block, array, (3,), ()) == (16 + 16 + 8) * 4


def test_routing_sends_every_token_to_distinct_experts() -> None:
    sizes = kernel_cases.routed(512, 8, 2)
    assert sum(sizes) == 1024
    assert max(sizes) <= 512


def test_a_compiler_that_dies_is_a_result() -> None:
    assert death_note(Died(3, "boot\nLLVM ERROR: out of registers\n")) == (
        "the compiler ended with exit code 3: LLVM ERROR: out of registers"
    )
    with pytest.raises(InputError, match="no schedule of gmm"):
        death_note(Died(1, "taskmoe.bench.tpu.schedule.ScheduleError: no schedule of gmm\n"))


def test_zeros_that_nobody_has_written_are_zeros_of_any_shape() -> None:
    for shape, dtype in (((3, 5), jnp.bfloat16), ((0, 4), np.float32), ((), np.int32)):
        zeros = grid_walk.unwritten_zeros(shape, dtype)
        assert (zeros.shape, zeros.dtype) == (shape, np.dtype(dtype))
        assert not np.asarray(zeros, np.float32).any()


def test_what_no_chip_holds_is_said_and_not_compiled(tmp_path: Path) -> None:
    case = kernel_cases.Case("expert_ffn", "taskmoe", "backward", "v5e", "bf16", "nllb")
    no_mesh: Any = None  # it would be needed to compile
    found = Compiled(**worker.compile_case(case, no_mesh, tmp_path))
    assert found.error is not None
    assert "arguments and results take 17.4 GB, its HBM is 17.2 GB" in found.error
    assert found.is_left_out
    forward = dataclasses.replace(case, direction="forward")
    assert worker.held_bytes(forward) < 9e9  # which does fit
    assert not Compiled(error="Mosaic refuses it").is_left_out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to compile: --kernels"),
        (["--kernels", "--chips", "v5e,v9"], "--chips must be of v3, v4, v5e"),
        (["--kernels", "--ops", "conv"], "--ops must be of "),
        (["--kernels", "--shapes", "huge"], "--shapes must be of wmt, mixtral"),
        (["--kernels", "--chips", "v3", "--dtypes", "bf16"], "v3 takes kernels in f32 only"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, capsys: Any) -> None:
    assert main(["tpu", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_missing_compiler_is_one_line(monkeypatch: Any, capsys: Any) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else real(name, *a)
    )
    assert main(["tpu", "--kernels", "--quick"]) == 2
    assert "libtpu, the TPU compiler, is not installed" in capsys.readouterr().err
