"""A block of a direction's lines on its way into a training set, and its files at each stage.

    000007.looked.npz   what is known of its lines by themselves
    000007.text         those worth it, until they are encoded
    000007.rows.npz     those that are kept, encoded

Workers do this work: what all blocks share is told them once, by `begin_looking` or
`begin_encoding`. A file is whole or has a name that begins with a dot.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from taskmoe.wmt.config import TrainConfig
from taskmoe.wmt.text.cleaning import Looked, look
from taskmoe.wmt.text.rows import Rows, encode
from taskmoe.wmt.text.tokenizer import Tokenizer

LINES = 50_000  # of a block

_looking: tuple[TrainConfig, Mapping[str, set[str]]]
_encoding: tuple[Tokenizer, int]


def begin_looking(config: TrainConfig, held: Mapping[str, set[str]]) -> None:
    """held: language -> keys of its validation and test text."""
    global _looking
    _looking = config, held


def look_at_block(block: Path, lines: list[tuple[str, str]], languages: tuple[str, str]) -> int:
    """Look at a block's lines and write what is known of them; returns how many there were."""
    config, held = _looking
    looked = look(lines, config, [held.get(language) for language in languages])
    text = "\n".join(itertools.chain.from_iterable(looked.lines))
    _write(block.with_suffix(".text"), text.encode())
    save(
        block.with_suffix(".looked.npz"),
        characters=looked.characters,
        key=looked.key,
        held_out=looked.held_out,
        names=np.array(list(looked.counts)),
        counts=np.array(list(looked.counts.values())),
    )
    return len(lines)


def begin_encoding(model: bytes, longest: int) -> None:
    """model: of the vocabulary. longest: tokens of a side that are kept."""
    global _encoding
    _encoding = Tokenizer(model), longest


def encode_block(block: Path, kept: np.ndarray, pair: str) -> int:
    """Encode the lines of a block that are kept, [n] bool; returns how many they are."""
    tokenizer, longest = _encoding
    lines = list(itertools.compress(read_lines(block), kept.tolist()))
    rows = encode(pair, ([s for s, _ in lines], [t for _, t in lines]), tokenizer, longest)
    save(
        block.with_suffix(".rows.npz"),
        counts=rows.counts,
        flat=rows.flat,
        beyond=np.array(rows.beyond),
    )
    block.with_suffix(".text").unlink()
    return len(lines)


def is_looked_at(block: Path) -> bool:
    """Whether what is known of its lines is written."""
    return block.with_suffix(".looked.npz").exists()


def is_encoded(block: Path) -> bool:
    """Whether its rows are written."""
    return block.with_suffix(".rows.npz").exists()


def read_looked(block: Path) -> Looked:
    """What is known of its lines, without them."""
    with np.load(block.with_suffix(".looked.npz")) as found:
        counts = dict(zip(found["names"].tolist(), found["counts"].tolist(), strict=True))
        return Looked([], found["characters"], found["key"], found["held_out"], counts)


def read_lines(block: Path) -> list[tuple[str, str]]:
    """The lines worth it."""
    flat = block.with_suffix(".text").read_bytes().decode().split("\n")
    return list(zip(flat[::2], flat[1::2], strict=False))


def read_rows(block: Path) -> Rows:
    """Those that are kept, encoded."""
    with np.load(block.with_suffix(".rows.npz")) as found:
        return Rows(found["counts"], found["flat"], int(found["beyond"]))


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}")
    beside.write_bytes(data)
    os.replace(beside, path)


def save(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays into a file that is whole or not there."""
    beside = path.with_name(f".{path.name}")
    with beside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(beside, path)
