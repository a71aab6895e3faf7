"""A model for serving anywhere: its folder plus the search as StableHLO, which needs JAX alone.

The folder holds what a model folder holds (`config.json`, `params.safetensors`, `spm.model`) and

    translate.stablehlo   a function of (parameters, source ids [B, S] i32) -> ids [B, L] i32
    export.json           the names of the parameters in their order, B, S, L, special ids, and
                          which versions of JAX are to read the program

A program reads them with jax.export, safetensors and sentencepiece; docs/trainer.md has one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from taskmoe.cli.errors import InputError
from taskmoe.wmt.model.decoding import length_limit, search
from taskmoe.wmt.model.saved import Model, flatten, save_model
from taskmoe.wmt.model.transformer import Tasks
from taskmoe.wmt.text.tokenizer import BOS, EOS, PAD, UNK

PLATFORMS = ("cpu", "tpu", "cuda", "rocm")
PROGRAM, DESCRIPTION = "translate.stablehlo", "export.json"


def export(
    model: Model,
    folder: Path,
    *,
    batch: int | None = None,
    length: int = 64,
    max_length: int | None = None,
    beam: int = 4,
    alpha: float = 0.6,
    platforms: tuple[str, ...] = ("cpu",),
) -> int:
    """Write a model and its search into a new folder.

    batch: sentences, None for any number. length: source ids of each, `<2xx> pieces </s>` padded
      with 0; without a batch at most so many, and a call may have fewer.
    max_length: target positions at most; None is `decoding.length_limit` of each sentence, as
      `translate` has it. beam, alpha: of the search. platforms: that the program is
      made for, of "cpu", "tpu", "cuda" and "rocm".
    Returns the size of the program in bytes. Raises InputError where the model is task-routed (a
    task's sub-network is what is served), a number does not fit or the folder is not empty.
    """
    config = model.config
    if any(config.tasks(side) for side in ("encoder", "decoder")):
        raise InputError(
            f"export wants a model that is not task-routed (encoder is {config.encoder}, decoder "
            f"is {config.decoder}): extract a task first"
        )
    check_sizes(batch=batch, length=length, max_length=max_length)
    for platform in platforms:
        if platform not in PLATFORMS:
            raise InputError(f"platforms must be of {', '.join(PLATFORMS)}, got {platform!r}")
    positions = max_length or length_limit(length)
    flat = flatten(model.params)
    structure = jax.tree.structure(model.params)

    def program(leaves: list[jax.Array], source: jax.Array) -> jax.Array:
        params: Any = jax.tree.unflatten(structure, leaves)
        own = None if max_length else length_limit((source != PAD).sum(axis=1))
        options: Any = {"max_length": positions, "beam": beam, "alpha": alpha, "limit": own}
        return search(params, config, source, Tasks(None, None), **options)[0]

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat.values()]
    shape: Sequence[Any] = (batch, length)
    if batch is None:
        shape = jax.export.symbolic_shape("batch, length", constraints=[f"length <= {length}"])
    source = jax.ShapeDtypeStruct(shape, jnp.int32)
    try:
        exported = jax.export.export(jax.jit(program), platforms=platforms)(shapes, source)
    except ValueError as error:
        raise InputError(str(error)) from None
    described = {
        "parameters": list(flat),
        "batch": batch,
        "length": length,
        "max_length": positions,
        "beam": beam,
        "alpha": alpha,
        "platforms": list(platforms),
        "pad": PAD,
        "unknown": UNK,
        "begin": BOS,
        "end": EOS,
        "directions": list(config.pairs),
        "source": "<2xx> pieces </s>, xx the target language, padded to [batch, length]; where "
        "batch is null to [any, at most length]",
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
        "readable": f"by versions of JAX from three weeks before {jax.__version__} until six "
        "months after it",
    }
    program_bytes = bytes(exported.serialize())
    files = {
        PROGRAM: program_bytes,
        DESCRIPTION: (json.dumps(described, indent=2) + "\n").encode(),
    }
    save_model(model, folder, more=files)
    return len(program_bytes)


def check_sizes(**sizes: int | None) -> None:
    """Raise InputError that names the first size below 1; None is not looked at."""
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
