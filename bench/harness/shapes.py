"""Sizes of known models' Mixture-of-Experts layers, by the names that benchmarks give them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
    """T tokens to top_k of E experts, of width D and hidden width F.

    experts: of one chip, all of the model's or what its shard holds. gated: whether they are.
    """

    tokens: int
    d_model: int
    d_ff: int
    experts: int
    top_k: int = 2
    gated: bool = False


#: One chip's share of a training or prefill step.
MODELS = {
    "wmt": Sizes(8192, 512, 2048, 32),
    "mixtral": Sizes(8192, 4096, 14336, 8, 2, gated=True),
    "qwen3": Sizes(4096, 2048, 768, 128, 8, gated=True),
    "deepseek-v3": Sizes(1024, 7168, 2048, 64, 8, gated=True),  # a quarter of its 256 experts
    "gpt-oss": Sizes(4096, 2880, 2880, 128, 4, gated=True),
    "olmoe": Sizes(4096, 2048, 1024, 64, 8, gated=True),
    "nllb": Sizes(8192, 2048, 8192, 128, 2),
}
