"""What the command lines share: --version, one-line errors, and files whole or not there."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from taskmoe.cli.errors import InputError
from taskmoe.kernels import __version__


class _Help(argparse.HelpFormatter):
    """Help with the default of each argument that has one, unless its text tells of it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = "default" in text or action.default in (None, False, [], argparse.SUPPRESS)
        return text if told else f"{text} (default %(default)s)".strip()


class Parser(argparse.ArgumentParser):
    """An argument parser that answers wrong arguments with one line; --help shows the rest."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help, **options})

    def error(self, message: str) -> NoReturn:
        """Print one line to stderr and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def answer_version(self, argv: list[str]) -> None:
        """Take --version, and answer it before packages are imported that may not be there."""
        self.add_argument("--version", action="version", version=f"taskmoe {__version__}")
        if argv[:1] == ["--version"]:
            self.parse_args(argv)


def missing_package(error: ModuleNotFoundError, extra: str) -> str:
    """What to say of a package that only the extra brings; raises the error if it is our own."""
    package = (error.name or "taskmoe").partition(".")[0]
    if package == "taskmoe":
        raise error
    return f"this needs the package {package}; pip install 'taskmoe[{extra}]'"


def check_new(folder: Path) -> None:
    """Raise InputError where a folder, or a file of that name, holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} already holds something; name a new folder")


def remove_folder(folder: Path) -> None:
    """Delete a folder that may be there; renamed first, so that half of it never has its name."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file beside its place, then rename it there."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file beside its place, then rename it there.

    Raises OSError that names the file; what was written of it is gone then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
