"""What the command lines share: one-line errors, and files that are whole or not there."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser that answers wrong arguments with one line; --help shows the rest."""

    def error(self, message: str) -> NoReturn:
        """Print one line to stderr and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file beside its place, then rename it there."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file beside its place, then rename it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.chmod(name, 0o644)
    os.replace(name, path)
