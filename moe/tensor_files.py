"""Folders of safetensors files, read and written one tensor at a time.

A file is 8 bytes, the length of the header; the header, JSON: name -> dtype, shape, and where its
bytes begin and end; and the bytes (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

#: Dtypes that a layer's parameters can have, by their names in a file.
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "I64": np.dtype(np.int64),  # tables of experts by token id
}
INDEX, ONE = "model.safetensors.index.json", "model.safetensors"


class Entry(NamedTuple):
    """One tensor: its file, dtype by name, shape, and where its bytes begin in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class TensorFolder(Mapping[str, np.ndarray]):
    """A folder's tensors by name; each is read from its file when it is asked for.

    path: a folder with model.safetensors, or with several files and model.safetensors.index.json.
    Raises FileNotFoundError where there is neither, ValueError where a file is not of the format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index, one = self.path / INDEX, self.path / ONE
        if index.exists():
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            self.files = [self.path / name for name in sorted(names)]
        elif one.exists():
            self.files = [one]
        else:
            raise FileNotFoundError(f"{self.path} must hold {ONE} or {INDEX}, and has neither")
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            self.entries |= _entries(file)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        options: Any = {"mode": "r", "offset": entry.start, "shape": entry.shape}
        return np.memmap(entry.path, DTYPES[check_dtype(name, entry)], **options)

    def copy_to(self, target: Path, changed: Iterator[tuple[str, np.ndarray]]) -> None:
        """A copy of the folder with these tensors in place of its own, one after the other.

        Its JSON and other files below 64 MiB go with it. ValueError where a tensor is not of the
        shape and dtype of the one that it replaces; then nothing is left behind.
        """
        target.mkdir(parents=True, exist_ok=True)
        beside = {file: target / f"{file.name}.partial" for file in self.files}
        try:
            for file, copy in beside.items():
                shutil.copyfile(file, copy)
            for name, tensor in changed:
                entry = self.entries[name]
                if (tensor.shape, tensor.dtype) != (entry.shape, DTYPES[check_dtype(name, entry)]):
                    raise ValueError(
                        f"{entry.path}: {name} must be {entry.dtype} {list(entry.shape)}, got "
                        f"{tensor.dtype} {list(tensor.shape)}"
                    )
                with beside[entry.path].open("r+b") as out:
                    out.seek(entry.start)
                    out.write(tensor.tobytes())
        except BaseException:
            for copy in beside.values():
                copy.unlink(missing_ok=True)
            raise
        for file, copy in beside.items():
            copy.replace(target / file.name)
        for file in self.path.iterdir():
            small = file.is_file() and file.stat().st_size < 2**26
            if small and file not in self.files and not file.name.endswith(".partial"):
                shutil.copyfile(file, target / file.name)


def check_dtype(name: str, entry: Entry) -> str:
    """The entry's dtype; ValueError that names file and tensor where a layer cannot have it."""
    if entry.dtype not in DTYPES:
        raise ValueError(
            f"{entry.path}: {name} is {entry.dtype}, and must be one of {', '.join(DTYPES)}: "
            "write the checkpoint without quantisation first"
        )
    return entry.dtype


def _entries(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length + 8 > size:
            raise ValueError(f"{path} is no safetensors file: its header does not fit into it")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > size:
            raise ValueError(f"{path} is cut short: {name} ends at {end} of {size} bytes")
        found[name] = Entry(path, entry["dtype"], tuple(entry["shape"]), start)
    return found
