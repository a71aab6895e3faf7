"""The dense model as plain PyTorch has it, eager, from the same parameters."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from taskmoe.wmt.config import ModelConfig, TrainConfig
from taskmoe.wmt.model.saved import flatten
from taskmoe.wmt.model.transformer import Params
from taskmoe.wmt.text.data import Batch
from taskmoe.wmt.text.tokenizer import PAD


def is_present() -> bool:
    """Whether torch is installed."""
    return importlib.util.find_spec("torch") is not None


class Training:
    """A dense model, its batch and its optimiser (AdamW, clipping)."""

    def __init__(
        self, params: Params, config: ModelConfig, train_config: TrainConfig, batch: Batch
    ) -> None:
        self.torch: Any = importlib.import_module("torch")
        self._config, self._train = config, train_config
        self._p = {
            name: self.torch.from_numpy(np.array(leaf)).requires_grad_()
            for name, leaf in flatten(jax.device_get(params)).items()
        }
        self._source, self._in, self._out = (
            self.torch.from_numpy(np.array(ids, np.int64))
            for ids in (batch.source, batch.target_in, batch.target_out)
        )
        self._adam = self.torch.optim.AdamW(
            self._p.values(),
            lr=train_config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=train_config.weight_decay,
            fused=True,  # its fastest on CPU too
        )

    def parts(self) -> dict[str, Callable[[], Any]]:
        """The forward pass, that and the backward pass, the optimiser, and the whole step."""
        self._gradient()  # which the optimiser alone goes on with
        return {
            "forward": self._forward,
            "gradient": self._gradient,
            "optimiser": self._optimiser,
            "step": self._step,
        }

    def _forward(self) -> Any:
        with self.torch.no_grad():
            return self.loss()

    def _gradient(self) -> Any:
        self._adam.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def _step(self) -> Any:
        loss = self._gradient()
        self._optimiser()
        return loss

    def _optimiser(self) -> None:
        self.torch.nn.utils.clip_grad_norm_(self._p.values(), self._train.clip_norm)
        self._adam.step()

    def loss(self) -> Any:
        """Label-smoothed cross-entropy, the mean over target tokens: [] f32."""
        functional = self.torch.nn.functional
        mask = (self._source != PAD)[:, None, None, :]
        x = self._embed(self._source, "embedding")
        for i in range(self._config.encoder_layers):
            x = x + self._attention(f"encoder/{i}/attention", x, mask=mask)
            x = x + self._feed_forward(f"encoder/{i}/feed_forward", x)
        memory = self._norm(x, "encoder_norm")
        tied = self._config.tie_embeddings
        x = self._embed(self._in, "embedding" if tied else "target_embedding")
        for i in range(self._config.decoder_layers):
            x = x + self._attention(f"decoder/{i}/attention", x, causal=True)
            x = x + self._cross(f"decoder/{i}/cross", x, memory, mask)
            x = x + self._feed_forward(f"decoder/{i}/feed_forward", x)
        softmax = self._p["embedding"].T if tied else self._p["softmax"]
        logits = self._norm(x, "decoder_norm") @ softmax
        return functional.cross_entropy(
            logits.flatten(0, 1),
            self._out.flatten(),
            ignore_index=PAD,
            label_smoothing=self._train.label_smoothing,
        )

    def _embed(self, ids: Any, name: str) -> Any:
        d = self._config.d_model
        rate = self.torch.exp(self.torch.arange(0, d, 2) * (-math.log(10000.0) / d))
        angle = self.torch.arange(ids.shape[1])[:, None] * rate
        wave = self.torch.cat([angle.sin(), angle.cos()], dim=-1)
        return self.torch.nn.functional.embedding(ids, self._p[name]) * d**0.5 + wave

    def _norm(self, x: Any, name: str) -> Any:
        return x * self.torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self._p[name]

    def _attend(self, qkv: Sequence[Any], name: str, mask: Any, causal: bool) -> Any:
        q, k, v = qkv

        def heads(x: Any) -> Any:
            return x.unflatten(-1, (self._config.num_heads, -1)).transpose(1, 2)

        out = self.torch.nn.functional.scaled_dot_product_attention(
            heads(q), heads(k), heads(v), attn_mask=mask, is_causal=causal
        )
        return out.transpose(1, 2).flatten(2) @ self._p[f"{name}/out"]

    def _attention(self, name: str, x: Any, mask: Any = None, causal: bool = False) -> Any:
        fused = self._norm(x, f"{name}/norm") @ self._p[f"{name}/qkv"]
        return self._attend(fused.chunk(3, -1), name, mask, causal)

    def _cross(self, name: str, x: Any, memory: Any, mask: Any) -> Any:
        q = self._norm(x, f"{name}/norm") @ self._p[f"{name}/query"]
        k, v = (memory @ self._p[f"{name}/kv"]).chunk(2, -1)
        return self._attend((q, k, v), name, mask, False)

    def _feed_forward(self, name: str, x: Any) -> Any:
        hidden = self._norm(x, f"{name}/norm") @ self._p[f"{name}/ffn/w_in"]
        return self.torch.relu(hidden) @ self._p[f"{name}/ffn/w_out"]
