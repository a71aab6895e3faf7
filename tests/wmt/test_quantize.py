"""Models in int8: products against float64, whole models against their floats, and the command."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from taskmoe.kernels import quantized as bytes_and_scales
from taskmoe.kernels.quantized import Quantized, dequantize, product, quantize, rows_to_meet
from taskmoe.tests.kernels.support import planted
from taskmoe.tests.wmt import support
from taskmoe.wmt.__main__ import main
from taskmoe.wmt.commands import quantize as command
from taskmoe.wmt.model import products, transformer
from taskmoe.wmt.model.quantization import quantized
from taskmoe.wmt.model.saved import Model, load_model, save_model
from taskmoe.wmt.model.subnetwork import extract
from taskmoe.wmt.model.transformer import decode, encode
from taskmoe.wmt.model.translation import Decoding, translate

LINES = ["one two three", "four five", "", "six one"]


def small(**fields: Any) -> Model:
    """A sub-network, by whose seed translations are words."""
    config = support.model_config(**fields)
    return extract(Model(support.params(config, 1), config, support.tokenizer()), "de")


def in_bytes(model: Model) -> Model:
    return dataclasses.replace(model, params=quantized(model.params))


def product_errors(rows: int) -> tuple[float, float]:
    """Largest errors against float64 of int8's product and of float32's of the same values."""
    keys = jax.random.split(jax.random.key(rows), 2)
    x = jax.random.normal(keys[0], (rows, 96)) * jnp.arange(1, rows + 1)[:, None]
    w = quantize(jax.random.normal(keys[1], (96, 40)) * jnp.arange(1, 41), activations="int8")
    met = rows_to_meet(w, x)
    wide = np.asarray(met.values, np.float64) * np.asarray(met.scales, np.float64)
    true = wide @ (np.asarray(w.values, np.float64) * np.asarray(w.scales[0], np.float64))
    plain = jnp.matmul(met.values * met.scales, dequantize(w), precision="highest")
    found = jax.jit(product)(x, w)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, product(x, w), rtol=1e-6)
    return tuple(float(np.abs(np.asarray(y) - true).max()) for y in (found, plain))  # type: ignore[return-value]


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_a_product_is_as_exact_as_float32_is_with_the_same_values(rows: int) -> None:
    ours, plain = product_errors(rows)
    assert ours <= 2 * plain


def test_a_row_with_another_scale_is_seen() -> None:
    def rolled(w: Any, rows: jax.Array) -> Any:
        met = rows_to_meet(w, rows)
        return dataclasses.replace(met, scales=jnp.roll(met.scales, 1, axis=0))

    with planted(bytes_and_scales, "rows_to_meet", rolled):
        ours, plain = product_errors(17)
    assert ours > 100 * plain


def test_products_are_of_bytes_and_a_single_row_is_not_alone() -> None:
    w = quantize(jnp.ones((8, 4)), activations="int8")
    text = jax.jit(product).lower(jnp.ones((1, 8)), w).as_text()
    assert "(tensor<4x8xi8>, tensor<8x4xi8>) -> tensor<4x4xi32>" in text


def logits(params: Any, model: Model) -> np.ndarray:
    source = jnp.asarray([[4, 5, 6, 7, 3], [9, 8, 3, 0, 0]])
    target = jnp.asarray([[1, 5, 6], [1, 9, 4]])
    memory, _ = encode(params, model.config, source, source != 0, None)
    every = jnp.ones(target.shape, bool)
    found, _ = decode(params, model.config, memory, source != 0, target, every, None)
    return np.asarray(found)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_computes_what_its_bytes_stand_for(tied: bool) -> None:
    """The same where floats of the rounded values are multiplied."""
    model = small(tie_embeddings=tied)
    params = quantized(model.params)
    want, found = logits(model.params, model), logits(params, model)
    spread = want.std()
    assert np.abs(found - want).max() < 0.25 * spread
    assert np.abs(found - want).mean() < 0.05 * spread
    assert np.abs(found - want).max() > 1e-3 * spread  # something is rounded

    def rounded(x: jax.Array, w: Any) -> jax.Array:
        met = rows_to_meet(w, x.reshape(-1, x.shape[-1]))
        rows = (met.values * met.scales).reshape(x.shape)
        return jnp.matmul(rows, dequantize(w), precision="highest")

    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr(products, "product", rounded)
        patch.setattr("taskmoe.moe.extraction.product", rounded)
        as_floats = logits(params, model)
    # A value at the border of two roundings may fall to either side: one step of many.
    assert np.abs(found - as_floats).mean() < 0.005 * spread


def test_every_matrix_is_a_quarter() -> None:
    model = in_bytes(small(tie_embeddings=False))
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        name = jax.tree_util.keystr(path)
        scale_or_norm = "norm" in name or "scales" in name
        assert leaf.dtype == (jnp.float32 if scale_or_norm else jnp.int8), name
    softmax = transformer.with_softmax(in_bytes(small()).params)["softmax"]
    assert isinstance(softmax, Quantized)
    assert softmax.values.shape[::-1] == small().params["embedding"].shape


def test_the_command_and_what_reads_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_model(small(), tmp_path / "small")
    words = ["--model", str(tmp_path / "small"), "--out", str(tmp_path / "q")]
    assert main(["quantize", *words]) == 0
    assert "bytes, int8" in capfd.readouterr().out
    read = load_model(tmp_path / "q")
    made = in_bytes(small())
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), read.params, made.params))

    requests = [("en-de", line) for line in LINES]
    want = translate(made, requests, Decoding(beam=2))
    (tmp_path / "lines").write_text("".join(f"{line}\n" for line in LINES))
    asked = ["--model", str(tmp_path / "q"), "--beam", "2"]
    assert main(["translate", *asked, "--input", str(tmp_path / "lines")]) == 0
    assert capfd.readouterr().out.splitlines() == want
    assert want[0]

    data = support.write_folder(tmp_path / "data")
    scores = ["--data", str(data), "--pairs", "en-de", "--limit", "3", "--json"]
    assert main(["evaluate", *asked, *scores, str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())
    capfd.readouterr()

    for wrong, message in (
        (["quantize", *words], "already holds something"),
        (["quantize", *asked[:2], "--out", str(tmp_path / "r")], "the model is quantised already"),
        (["export", *asked[:2], "--format", "ctranslate2", "--out", str(tmp_path / "r")],
         "the model is quantised: export what it was made of"),
    ):  # fmt: skip
        assert main(wrong) == 2
        assert message in capfd.readouterr().err
        assert not (tmp_path / "r").exists()


def test_a_routed_model_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_model(support.model(), tmp_path / "whole")
    words = ["quantize", "--model", str(tmp_path / "whole"), "--out", str(tmp_path / "q")]
    assert main(words) == 2
    assert "extract a task first" in capfd.readouterr().err
    assert not (tmp_path / "q").exists()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    save_model(small(), tmp_path / "small")
    saved: Any = command.save_model

    def interrupted(*a: Any, **k: Any) -> None:
        monkeypatch.setattr("taskmoe.wmt.model.saved.save_file", _stop)
        saved(*a, **k)

    monkeypatch.setattr(command, "save_model", interrupted)
    words = ["quantize", "--model", str(tmp_path / "small"), "--out", str(tmp_path / "q")]
    assert main(words) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda a: a | {"embedding/values": a["embedding/values"].astype(np.float32)},
         "embedding/values should be int8, is float32"),
        (lambda a: {n: x for n, x in a.items() if n != "decoder/0/cross/out/scales"},
         "decoder/0/cross/out/scales should be [1, 1, 16], is missing"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_named(tmp_path: Path, fault: Any, message: str, capfd: Any) -> None:
    save_model(in_bytes(small()), tmp_path / "q")
    file = tmp_path / "q" / "params.safetensors"
    save_file(fault(load_file(file)), file)
    assert main(["translate", "--model", str(tmp_path / "q"), "--input", str(file)]) == 2
    assert message in capfd.readouterr().err
