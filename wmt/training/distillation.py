"""Sequence-level distillation: a dense student learns what its teacher would write.

Kim and Rush 2016 (arXiv 1606.07947), as the task-MoE paper uses it (Kudugunta et al. 2021, section
4.3): the student is a Transformer of the same size without mixtures, initialised from the teacher's
non-expert weights, and trained on the teacher's translations of the training text's source side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from taskmoe.cli.command_line import write_text
from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.saved import Model, flatten
from taskmoe.wmt.model.transformer import Params, init
from taskmoe.wmt.model.translation import Decoding, translate
from taskmoe.wmt.text.folders import Pairs

_CHUNK = 1024  # sentences of one direction that are translated between two writes


#: Fields of ModelConfig that a student may have otherwise than its teacher says.
STUDENT_FIELDS = ("encoder_wide_d_ff", "decoder_wide_d_ff")


def student_config(
    teacher: ModelConfig, pairs: tuple[str, ...], widths: Mapping[str, int] | None = None
) -> ModelConfig:
    """The teacher's Transformer with dense feed-forward layers for its mixtures.

    widths: of those layers, by `STUDENT_FIELDS`; d_ff otherwise, as in the paper. With top_k * d_ff
    the student computes as much a token as its teacher.
    """
    fields: dict[str, Any] = dict.fromkeys(STUDENT_FIELDS, teacher.d_ff) | dict(widths or {})
    return dataclasses.replace(
        teacher, pairs=pairs, encoder="dense", decoder="dense", capacity_factor=None, **fields
    )


def student_params(teacher: Params, config: ModelConfig, seed: int) -> tuple[Params, int]:
    """The student's first parameters and how many of them are the teacher's.

    All that has the same place and shape in the teacher comes from there; what stands where a
    mixture stood is drawn from the seed.
    """
    fresh = init(jax.random.key(seed), config)
    theirs, flat = flatten(teacher), flatten(fresh)
    leaves, taken = [], 0
    for name, leaf in flat.items():
        same = name in theirs and theirs[name].shape == leaf.shape
        leaves.append(theirs[name] if same else leaf)
        taken += leaf.size if same else 0
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves), taken


def teacher_text(
    folder: Path,
    teacher: Model,
    sources: dict[str, list[str]],
    decoding: Decoding,
    progress: Callable[[int, int], None] | None = None,
) -> Pairs:
    """The teacher's translations of each direction's sentences, kept in a folder as they come.

    A call that was interrupted goes on where it was. Sentences that come out empty are left out.
    Raises InputError where the folder holds translations of other sentences or another teacher.
    """
    identity = {
        "teacher": _fingerprint(teacher),
        "sentences": {pair: _hash(lines) for pair, lines in sources.items()},
        "beam": decoding.beam,
        "alpha": decoding.alpha,
    }
    if decoding.shortlist is not None:
        identity["shortlist"] = decoding.shortlist.digest()
    described = folder / "translations.json"
    if described.is_file():
        try:
            known = json.loads(described.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{described} is damaged: {error}") from None
        if known != identity:
            raise InputError(
                f"{folder} holds translations of another teacher, of other sentences or by another "
                "search; name another --workdir"
            )
    else:
        write_text(described, json.dumps(identity, indent=2) + "\n")
    total, done = sum(map(len, sources.values())), 0
    out: Pairs = {}
    for pair, lines in sources.items():
        found: list[str] = []
        for at in range(0, len(lines), _CHUNK):
            chunk = lines[at : at + _CHUNK]
            part = folder / f"{pair}.{at:08d}.txt"
            if part.is_file():
                texts = part.read_text(encoding="utf-8").split("\n")[:-1]
                if len(texts) != len(chunk):
                    raise InputError(f"{part} has {len(texts)} lines, should have {len(chunk)}")
            else:
                texts = translate(teacher, [(pair, line) for line in chunk], decoding)
                write_text(part, "".join(f"{text}\n" for text in texts))
            found += texts
            done += len(chunk)
            if progress is not None:
                progress(done, total)
        kept = [(a, b) for a, b in zip(lines, found, strict=True) if b.strip()]
        if not kept:
            raise InputError(f"the teacher translates no sentence of {pair}")
        out[pair] = ([a for a, _ in kept], [b for _, b in kept])
    return out


class Gain(NamedTuple):
    """BLEU of the models of one comparison, and the shares of gain that the student keeps, in %.

    of_teacher: (student - dense) / (teacher - dense). of_task_moe: the same with the task-MoE's
    gain below the line. None without such a model, and where there is no gain to keep.
    """

    dense: float
    teacher: float
    student: float
    task_moe: float | None
    of_teacher: float | None
    of_task_moe: float | None


def gain_kept(dense: float, teacher: float, student: float, task_moe: float | None) -> Gain:
    """Shares of a teacher's and of a task-MoE's gain over a dense model that a student keeps."""

    def share(best: float) -> float | None:
        return 100 * (student - dense) / (best - dense) if best > dense else None

    return Gain(
        dense,
        teacher,
        student,
        task_moe,
        share(teacher),
        None if task_moe is None else share(task_moe),
    )


def _fingerprint(model: Model) -> str:
    digest = hashlib.sha256(model.config.to_json().encode())
    for name, leaf in flatten(model.params).items():
        digest.update(name.encode())
        digest.update(memoryview(jax.device_get(leaf)).cast("B"))
    return digest.hexdigest()[:32]


def _hash(lines: Any) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
