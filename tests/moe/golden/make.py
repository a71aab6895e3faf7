"""Golden arrays: small MoE layers of transformers with random weights, run forward and backward.

    pip install torch transformers
    python tests/moe/golden/make.py

Each case is a whole model of one layer or two, so that transformers itself writes its weights and,
in their place, its gradients, under the names that a checkpoint has. NAME.npz holds x and upstream
[B, S, D], out, dx, weights/TENSOR, grads/TENSOR, and the versions. Only the layer is run.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

B, S, D, F = 2, 12, 8, 12
DECODER = {
    "vocab_size": 16, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 4, "first_k_dense_replace": 0, "moe_intermediate_size": F,
}  # fmt: skip
SWITCH = {
    "vocab_size": 16, "d_model": D, "d_kv": 4, "d_ff": F, "num_layers": 1, "num_heads": 2,
    "num_sparse_encoder_layers": 1, "num_decoder_layers": 1, "num_sparse_decoder_layers": 1,
    "num_experts": 8, "dropout_rate": 0.0, "router_jitter_noise": 0.0, "pad_token_id": 0,
}  # fmt: skip
NLLB = {
    "vocab_size": 16, "d_model": D, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_ffn_dim": F, "decoder_ffn_dim": F, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "num_experts": 8, "encoder_sparse_step": 1,
    "decoder_sparse_step": 1, "moe_token_dropout": 0.0, "activation_dropout": 0.0, "dropout": 0.0,
    "pad_token_id": 0, "batch_prioritized_routing": False, "second_expert_policy": "all",
}  # fmt: skip

#: Tensors of a layer that are not trained.
BUFFERS = ("e_score_correction_bias", "gate.bias", "tid2eid")
#: Cases whose load-balance loss is stored too, as `balance`.
BALANCED = ("mixtral", "qwen3_moe", "olmoe")
Run = Callable[[Any, torch.Tensor], torch.Tensor]


class Case(NamedTuple):
    """One golden file.

    config: the class of transformers' configuration, and fields. block: where the layer stands in
    the model. run: the layer on x [B, S, D]. training: whether in training mode.
    """

    config: str
    fields: dict[str, Any]
    block: str = "model.layers.0.mlp"
    run: Run = lambda block, x: block(x)
    training: bool = False


def run_first(block: Any, x: torch.Tensor) -> torch.Tensor:
    """A layer that also returns what its router found, and may flatten tokens."""
    return block(x)[0].reshape(x.shape)


def run_nllb(block: Any, x: torch.Tensor) -> torch.Tensor:
    """Router and experts, summed over experts as transformers 4 did.

    Version 5's NllbMoeSparseMLP takes the mask of first choices for expert ids, and runs experts 0
    and 1 only.
    """
    tokens = x.reshape(-1, D)
    weights = block.router(tokens)[1]
    parts = [
        block.experts[f"expert_{e}"](tokens) * weights[:, e, None] for e in range(weights.shape[1])
    ]
    return sum(parts[1:], parts[0]).reshape(x.shape)


def run_gemma4(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Router and experts, which stand in the decoder layer itself; here both see x."""
    tokens = x.reshape(-1, D)
    _, weights, experts = layer.router(tokens)
    return layer.experts(tokens, experts, weights).reshape(x.shape)


def run_hash(block: Any, x: torch.Tensor) -> torch.Tensor:
    """A layer whose experts a table gives by token id: ids 0, 1, ... over and over."""
    return block(x, input_ids=torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2]) % 16)


def switch(**fields: Any) -> Case:
    return Case("SwitchTransformersConfig", SWITCH | fields, "encoder.block.0.layer.1.mlp")


def nllb(training: bool, **fields: Any) -> Case:
    """An expert has room for 6 of 24 tokens while training, and for all else."""
    fields |= {"expert_capacity": 6}
    return Case("NllbMoeConfig", NLLB | fields, "model.encoder.layers.0.ffn", run_nllb, training)


def deepseek_v3(**fields: Any) -> Case:
    sizes = {"n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 8}
    return Case("DeepseekV3Config", DECODER | LATENT | sizes | fields)


def deepseek_v4(kind: str, run: Run = lambda block, x: block(x)) -> Case:
    sizes = {"moe_intermediate_size": F, "n_routed_experts": 8, "num_experts_per_tok": 6}
    return Case("DeepseekV4Config", DECODER | sizes | {"mlp_layer_types": [kind]}, run=run)


FEW = {"num_local_experts": 8, "num_experts_per_tok": 2}
MANY = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": F}
V2 = {
    "n_routed_experts": 16, "n_shared_experts": 2, "num_experts_per_tok": 4, "n_group": 8,
    "topk_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
}  # fmt: skip
JAMBA = {
    "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 1,
    "attn_layer_offset": 0, "use_mamba_kernels": False,
}  # fmt: skip
GEMMA = {
    "num_experts": 8, "top_k_experts": 2, "enable_moe_block": True, "moe_intermediate_size": F,
    "head_dim": 4, "global_head_dim": 4, "layer_types": ["full_attention"],
    "vocab_size_per_layer_input": 16, "hidden_size_per_layer_input": 0,
}  # fmt: skip
CASES = {
    "mixtral": Case("MixtralConfig", DECODER | FEW),
    "qwen2_moe": Case("Qwen2MoeConfig", DECODER | MANY | {"shared_expert_intermediate_size": 10}),
    "qwen3_moe": Case("Qwen3MoeConfig", DECODER | MANY | {"norm_topk_prob": True}),
    "qwen3_moe_unnormalised": Case("Qwen3MoeConfig", DECODER | MANY | {"norm_topk_prob": False}),
    "olmoe": Case("OlmoeConfig", DECODER | {"num_experts": 8, "num_experts_per_tok": 4}),
    "deepseek_v2": Case("DeepseekV2Config", DECODER | LATENT | V2),
    "deepseek_v3": deepseek_v3(n_group=8, topk_group=4, routed_scaling_factor=2.5),
    "kimi_k2": deepseek_v3(n_group=1, topk_group=1, routed_scaling_factor=2.827),
    "deepseek_v4": deepseek_v4("moe"),
    "deepseek_v4_hash": deepseek_v4("hash_moe", run_hash),
    "gpt_oss": Case("GptOssConfig", DECODER | FEW | {"num_experts_per_tok": 4}, run=run_first),
    "llama4": Case(
        "Llama4TextConfig",
        DECODER | FEW | {"num_experts_per_tok": 1, "intermediate_size_mlp": F},
        "model.layers.0.feed_forward",
        run_first,
    ),
    "switch": switch(expert_capacity=64),
    "switch_dropping": switch(expert_capacity=2),
    "nllb_moe": nllb(training=False),
    "nllb_moe_normalised_first": nllb(True, normalize_router_prob_before_dropping=True),
    "nllb_moe_normalised_last": nllb(True, normalize_router_prob_before_dropping=False),
    "jamba": Case(
        "JambaConfig",
        DECODER | JAMBA | {"num_experts": 8, "num_experts_per_tok": 2},
        "model.layers.0.feed_forward",
    ),
    "granite": Case("GraniteMoeConfig", DECODER | FEW, "model.layers.0.block_sparse_moe"),
    "phimoe": Case("PhimoeConfig", DECODER | FEW),
    "phimoe_wider": Case("PhimoeConfig", DECODER | FEW | {"router_jitter_noise": 0.2}),
    "gemma4": Case("Gemma4TextConfig", DECODER | GEMMA, "model.layers.0", run_gemma4),
}


def run(name: str) -> dict[str, np.ndarray]:
    """What NAME.npz holds; equal calls give equal arrays."""
    case = CASES[name]
    torch.manual_seed(sorted(CASES).index(name))
    config = getattr(transformers, case.config)(**case.fields)
    try:
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    model.float().train(case.training)
    block = model.get_submodule(case.block)
    for part, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if tensor.is_floating_point() and "layer_scalar" not in part:
            scale = 0.2 if "correction_bias" in part else 0.5
            torch.nn.init.normal_(tensor, std=scale)
        elif part.endswith("tid2eid"):
            rows = [torch.randperm(8)[: tensor.shape[1]] for _ in range(len(tensor))]
            tensor.copy_(torch.stack(rows))
    x = torch.randn(B, S, D, requires_grad=True)
    upstream = torch.randn(B, S, D)
    weights = stored(model, case.block)
    extra = {}
    if name in BALANCED:
        logits = block.gate(x)[0]
        extra["balance"] = load_balancing_loss_func(
            (logits,), logits.shape[1], config.num_experts_per_tok
        )
    out = case.run(block, x)
    (out * upstream).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    grads = stored(model, case.block)
    arrays: dict[str, Any] = extra | {"x": x, "upstream": upstream, "out": out, "dx": x.grad}
    found = {part: tensor.detach().numpy() for part, tensor in arrays.items()}
    found |= {f"weights/{part}": tensor for part, tensor in weights.items()}
    found |= {f"grads/{n}": grad for n, grad in grads.items() if not n.endswith(BUFFERS)}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return found | {"versions": np.array(versions)}


def stored(model: Any, block: str) -> dict[str, np.ndarray]:
    """The layer's tensors as transformers writes them, by their names in the file."""
    number = block.split(".layer")[0] if "encoder" in block else "model.layers.0"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    words = ("expert", "router", ".gate.", "input_linear", "output_linear")
    return {
        name: tensor.numpy()
        for name, tensor in sorted(tensors.items())
        if name.startswith(number) and any(word in name for word in words)
    }


if __name__ == "__main__":
    for name in CASES:
        arrays = run(name)
        path = Path(__file__).parent / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path.name}: {path.stat().st_size:,} bytes, {arrays['versions']}")
