"""Where checkpoints of known models keep a Mixture-of-Experts layer: names, axes, what lies where.

Tensors of linear layers are stored as [out, in], ours are [in, out].
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

#: Stands for an expert's number in a tensor's name.
EXPERT = "{e}"


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a file, or with {e} in its name one of each expert.

    name: within the layer.
    ours: the parameter that it is; two where the tensor holds both along what is our last axis.
    turned: whether its last two axes are the other way round.
    interleaved: whether two parameters' columns take turns; else the first's come before.
    optional: whether some layers have none.
    """

    name: str
    ours: tuple[str, ...]
    turned: bool = True
    interleaved: bool = False
    optional: bool = False

    def names(self, number: int) -> list[str]:
        """Of its tensors, for so many experts."""
        if EXPERT not in self.name:
            return [self.name]
        return [self.name.replace(EXPERT, str(e)) for e in range(number)]

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Of one tensor, from those of our parameters."""
        shape = shapes[self.ours[0]]
        shape = shape[1:] if EXPERT in self.name else shape
        shape = (*shape[:-1], shape[-1] * len(self.ours))
        return (*shape[:-2], shape[-1], shape[-2]) if self.turned else shape

    def split(self, tensor: np.ndarray) -> list[np.ndarray]:
        """Our parameters, of one expert or all, that a tensor holds."""
        whole = np.swapaxes(tensor, -1, -2) if self.turned else tensor
        parts, size = len(self.ours), whole.shape[-1] // len(self.ours)
        if self.interleaved:
            return [whole[..., i::parts] for i in range(parts)]
        return [whole[..., i * size : (i + 1) * size] for i in range(parts)]

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """The tensor that holds these parameters."""
        if self.interleaved:
            whole = np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)
        else:
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        return np.ascontiguousarray(np.swapaxes(whole, -1, -2) if self.turned else whole)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a model keeps its layers.

    block: a regular expression for the end of what all names of one layer begin with.
    tensors: of a layer, the gate's first.
    """

    block: str
    tensors: tuple[Stored, ...]

    def layers(self, names: Iterable[str]) -> list[str]:
        """What the names of each layer begin with, in the order of their numbers."""
        gate = re.compile(rf"((?:.*\.)?{self.block}){re.escape(self.tensors[0].name)}")
        found = {match[1] for match in map(gate.fullmatch, names) if match}
        return sorted(found, key=lambda name: [*map(_number, re.split(r"(\d+)", name))])

    def stored(self, params: Iterable[str]) -> Iterator[Stored]:
        """The tensors of a layer that has these parameters."""
        have = set(params)
        return (tensor for tensor in self.tensors if set(tensor.ours) <= have)


def _number(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdigit() else (-1, text)


def _experts(into: str, up: str, down: str, name: str = "experts.{e}.") -> tuple[Stored, ...]:
    """Gated experts of three linear layers each."""
    names = {into: "w_gate", up: "w_in", down: "w_out"}
    return tuple(Stored(f"{name}{part}.weight", (ours,)) for part, ours in names.items())


def _shared(name: str, into: str, up: str, down: str) -> tuple[Stored, ...]:
    """A gated shared expert of three linear layers."""
    names = {into: "shared_gate_in", up: "shared_in", down: "shared_out"}
    return tuple(Stored(f"{name}{part}.weight", (ours,)) for part, ours in names.items())


def _gate(name: str = "gate.weight") -> Stored:
    return Stored(name, ("gate",))


PROJECTIONS, NUMBERED = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
GATE_UP = ("w_gate", "w_in")
BLOCK, MLP = r"layers\.\d+\.block_sparse_moe\.", r"layers\.\d+\.mlp\."
FORWARD, FFN = r"layers\.\d+\.feed_forward\.", r"layers\.\d+\.ffn\."
MIXTRAL = Layout(BLOCK, (_gate(), *_experts(*NUMBERED)))
QWEN3_MOE = Layout(MLP, (_gate(), *_experts(*PROJECTIONS)))
DEEPSEEK = (_gate(), *_experts(*PROJECTIONS), *_shared("shared_experts.", *PROJECTIONS))
DEEPSEEK_V3 = Layout(
    MLP, (*DEEPSEEK, Stored("gate.e_score_correction_bias", ("choice_bias",), turned=False))
)
#: By the names of `taskmoe.kernels.ROUTERS`, as transformers 5.24 writes them.
LAYOUTS = {
    "mixtral": MIXTRAL,
    "phimoe": MIXTRAL,
    "qwen2_moe": Layout(
        MLP,
        (
            *QWEN3_MOE.tensors,
            *_shared("shared_expert.", *PROJECTIONS),
            Stored("shared_expert_gate.weight", ("shared_gate",)),
        ),
    ),
    "qwen3_moe": QWEN3_MOE,
    "olmoe": QWEN3_MOE,
    "deepseek_v2": Layout(MLP, DEEPSEEK),
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": DEEPSEEK_V3,
    "deepseek_v4": Layout(
        FFN,
        (
            _gate(),
            *_experts(*NUMBERED),
            *_shared("shared_experts.", *NUMBERED),
            # Layers whose choice is a table by token id have none.
            Stored("gate.bias", ("choice_bias",), turned=False, optional=True),
        ),
    ),
    "gpt_oss": Layout(
        MLP,
        (
            _gate("router.weight"),
            Stored("router.bias", ("gate_bias",), turned=False),
            Stored("experts.gate_up_proj", GATE_UP, turned=False, interleaved=True),
            Stored("experts.gate_up_proj_bias", ("b_gate", "b_in"), turned=False, interleaved=True),
            Stored("experts.down_proj", ("w_out",), turned=False),
            Stored("experts.down_proj_bias", ("b_out",), turned=False),
        ),
    ),
    "llama4": Layout(
        FORWARD,
        (
            _gate("router.weight"),
            Stored("experts.gate_up_proj", GATE_UP, turned=False),
            Stored("experts.down_proj", ("w_out",), turned=False),
            *_shared("shared_expert.", *PROJECTIONS),
        ),
    ),
    "switch": Layout(
        r"block\.\d+\.layer\.\d+\.mlp\.",
        (
            _gate("router.classifier.weight"),
            Stored("experts.expert_{e}.wi.weight", ("w_in",)),
            Stored("experts.expert_{e}.wo.weight", ("w_out",)),
        ),
    ),
    "nllb_moe": Layout(
        FFN,
        (
            _gate("router.classifier.weight"),
            Stored("experts.expert_{e}.fc1.weight", ("w_in",)),
            Stored("experts.expert_{e}.fc1.bias", ("b_in",), turned=False),
            Stored("experts.expert_{e}.fc2.weight", ("w_out",)),
            Stored("experts.expert_{e}.fc2.bias", ("b_out",), turned=False),
        ),
    ),
    "jamba": Layout(FORWARD, (_gate("router.weight"), *_experts(*PROJECTIONS))),
    "granite": Layout(
        BLOCK,
        (
            _gate("router.layer.weight"),
            Stored("input_linear.weight", GATE_UP),
            Stored("output_linear.weight", ("w_out",)),
        ),
    ),
    "gemma4": Layout(
        r"layers\.\d+\.",
        (
            _gate("router.proj.weight"),
            Stored("router.scale", ("gate_scale",), turned=False),
            Stored("router.per_expert_scale", ("expert_scale",), turned=False),
            Stored("experts.gate_up_proj", GATE_UP),
            Stored("experts.down_proj", ("w_out",)),
        ),
    ),
}
