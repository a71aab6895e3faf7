"""Layers of checkpoints: read, written back bit for bit, and refused where they do not fit."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from taskmoe import moe
from taskmoe.moe import convert, layouts
from taskmoe.tests.kernels.support import planted
from taskmoe.tests.moe import parity

FOLDERS = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4", "nllb_moe", "granite"]
live = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))),
    reason="torch and transformers are not installed",
)


def weights_of(name: str, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A golden file's weights; the choice bias stays in float32, as DeepSeek has it."""
    found = parity.tensors(parity.golden(name), "weights")
    return {n: w if "bias" in n or "tid2eid" in n else w.astype(dtype) for n, w in found.items()}


def folder_of(name: str, path: Path, dtype: Any = np.float32, parts: int = 1) -> Path:
    """A checkpoint of three layers and other tensors, in one file or several."""
    tensors: dict[str, np.ndarray] = {"model.embed.weight": np.arange(6, dtype=np.float16)}
    for i in range(3):
        for part, weight in weights_of(name, dtype).items():
            tensors[part.replace("layers.0.", f"layers.{i * 5}.")] = weight + weight.dtype.type(i)
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "any"}\n')
    if parts == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    of = {part: names[i % parts] for i, part in enumerate(sorted(tensors))}
    for file in names:
        part = {n: w for n, w in tensors.items() if of[n] == file}
        save_file(part, path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": of}))
    return path


def same_files(one: Path, other: Path) -> bool:
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def config_of(name: str) -> moe.MoEConfig:
    return parity.layer(name, parity.golden(name))[0]


@pytest.mark.parametrize("name", parity.FIELDS)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_tensors_of_every_model_come_back_bit_for_bit(name: str, dtype: Any) -> None:
    weights, model = weights_of(name, dtype), parity.model_of(name)
    params = convert.read(weights, model, config_of(name))
    assert {w.dtype for n, w in params.items() if n.startswith("w_")} == {np.dtype(dtype)}
    (start,) = convert.layers(weights, model)
    back = dict(convert.tensors_of(params, model, start))
    assert set(weights) - set(back) <= {start + "gate.tid2eid"}
    for part, tensor in back.items():
        assert (tensor.dtype, tensor.shape) == (weights[part].dtype, weights[part].shape)
        assert tensor.tobytes() == weights[part].tobytes(), part


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_comes_back_in_identical_files(
    name: str, dtype: Any, parts: int, tmp_path: Path
) -> None:
    source, config = folder_of(name, tmp_path / "source", dtype, parts), config_of(name)
    starts = convert.layers(source, name)
    assert [start.split("layers.")[1].split(".")[0] for start in starts] == ["0", "5", "10"]
    read = {layer: convert.read(source, name, config, layer) for layer in range(3)}
    assert np.abs(np.asarray(read[1]["w_in"] - read[0]["w_in"], np.float32)).min() > 0.5
    jax.tree.map(
        np.testing.assert_array_equal, read[2], convert.read(source, name, config, starts[2])
    )
    # Other values first, so that what is written back is seen to be written.
    blank = {layer: jax.tree.map(jnp.zeros_like, params) for layer, params in read.items()}
    convert.write(source, name, blank, tmp_path / "blank")
    assert not same_files(source, tmp_path / "blank")
    convert.write(tmp_path / "blank", name, read, tmp_path / "back")
    assert same_files(source, tmp_path / "back")


def test_one_layer_alone_changes(tmp_path: Path) -> None:
    source, config = folder_of("mixtral", tmp_path / "source"), config_of("mixtral")
    params = convert.read(source, "mixtral", config, 1)
    convert.write(source, "mixtral", {1: jax.tree.map(lambda w: w + 1, params)}, tmp_path / "new")
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "new"))
    changed = {n.split("layers.")[1][:2] for n in before if (before[n] != after[n]).any()}
    assert changed == {"5."}
    assert (tmp_path / "new" / "config.json").read_text() == '{"model_type": "any"}\n'


def test_a_layer_that_was_read_runs(tmp_path: Path) -> None:
    arrays = parity.golden("qwen3_moe")
    params = convert.read(
        folder_of("qwen3_moe", tmp_path / "a"), "qwen3_moe", config_of("qwen3_moe")
    )
    y = moe.apply(params, config_of("qwen3_moe"), jnp.asarray(arrays["x"]))[0]
    assert parity.relative(y, arrays["out"]) <= 1e-6


def test_a_planted_fault_in_the_order_is_caught(tmp_path: Path) -> None:
    source, config = folder_of("gpt_oss", tmp_path / "source"), config_of("gpt_oss")
    read = {layer: convert.read(source, "gpt_oss", config, layer) for layer in range(3)}
    right = layouts.Stored.join
    swapped = lambda self, parts: right(self, parts[::-1])  # noqa: E731
    with planted(layouts.Stored, "join", swapped):
        convert.write(source, "gpt_oss", read, tmp_path / "wrong")
    assert not same_files(source, tmp_path / "wrong")


@live
@pytest.mark.filterwarnings("ignore")  # of torch and transformers, which are others'
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_folder_that_transformers_wrote(name: str, dtype: str, tmp_path: Path) -> None:
    import torch
    import transformers

    from taskmoe.tests.moe.golden import make

    case = make.CASES[name]
    fields = case.fields | {"num_hidden_layers": 2}
    config = getattr(transformers, case.config)(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "source", max_shard_size="8KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) >= 2
    ours = config_of(name)
    read = {i: convert.read(tmp_path / "source", name, ours, i) for i in range(2)}
    assert read[0]["w_in"].dtype == dtype
    blank = {i: jax.tree.map(jnp.zeros_like, params) for i, params in read.items()}
    convert.write(tmp_path / "source", name, blank, tmp_path / "blank")
    convert.write(tmp_path / "blank", name, read, tmp_path / "back")
    assert same_files(tmp_path / "source", tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    for have, want in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(have.to(want.dtype), want)


def smaller(**fields: Any) -> moe.MoEConfig:
    return moe.MoEConfig(**{**config_of("mixtral").__dict__, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_ff": 13}, r"model.safetensors: model.*experts.0.w1.weight must be \[13, 8\] by the"),
        ({"num_experts": 7}, r"gate.weight must be \[7, 8\] by the configuration, got \[8, 8\]"),
        ({"shared": 4}, "config must have nothing that mixtral has not, got shared_gate_in, sha"),
        ({"gated": False}, "w1.weight is w_gate, which the configuration has not"),
    ],
)
def test_a_configuration_that_does_not_fit(fields: Any, message: str, tmp_path: Path) -> None:
    source = folder_of("mixtral", tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        convert.read(source, "mixtral", smaller(**fields))


def test_calls_that_do_not_fit(tmp_path: Path) -> None:
    source, config = folder_of("mixtral", tmp_path / "source"), config_of("mixtral")
    params = convert.read(source, "mixtral", config)
    with pytest.raises(ValueError, match=r"model must be one of mixtral, .*, got 'gpt'"):
        convert.layers(source, "gpt")
    with pytest.raises(ValueError, match="source must hold a layer of jamba, and has no tensor"):
        convert.layers(source, "jamba")
    with pytest.raises(ValueError, match=r"layer must be in \[0, 3\), got 3"):
        convert.read(source, "mixtral", config, 3)
    with pytest.raises(ValueError, match=r"layer must be one of model.layers.0.block_sparse_moe."):
        convert.read(source, "mixtral", config, "model.layers.1.")
    with pytest.raises(FileNotFoundError, match=r"must hold model.safetensors or model"):
        convert.layers(tmp_path, "mixtral")
    with pytest.raises(ValueError, match="target must be another folder than source"):
        convert.write(source, "mixtral", {0: params}, source)
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    with pytest.raises(ValueError, match=r"gate.weight must be F32 \[8, 8\], got bfloat16"):
        convert.write(source, "mixtral", {0: narrow}, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    weights = weights_of("mixtral")
    missing = next(name for name in weights if "experts.3.w2" in name)
    del weights[missing]
    with pytest.raises(ValueError, match=rf"source has no tensor {missing}, of \[8, 12\]"):
        convert.read(weights, "mixtral", config)


def test_files_that_are_broken_or_quantised(tmp_path: Path) -> None:
    source, config = folder_of("mixtral", tmp_path / "source"), config_of("mixtral")
    file = source / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"model.safetensors is cut short: model"):
        convert.read(source, "mixtral", config)
    file.write_bytes(b"no such file of tensors")
    with pytest.raises(ValueError, match=r"is no safetensors file: its header does not fit"):
        convert.read(source, "mixtral", config)
    quantised = whole.replace(b'"dtype":"F32"', b'"dtype":"U32"')
    file.write_bytes(quantised)
    with pytest.raises(ValueError, match=r"gate.weight is U32, and must be one of F32, BF16, F16"):
        convert.read(source, "mixtral", config)
