"""Text files, UTF-8, plain or gzip: a sentence a line, or tab-separated columns of languages.

Whatever bytes a file holds, what comes out is its lines or an InputError that names file and line.
"""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path

from taskmoe.cli.errors import InputError

CODE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,15}")  # a language code, as file names have it
_HEADER = re.compile(r"[a-z]{2,3}(_[A-Za-z]{2,4})?")  # stricter: a word is no header
_PAIR = re.compile(rf"({_HEADER.pattern})-({_HEADER.pattern})")


def read_lines(path: Path) -> list[str]:
    """The lines of a file, blanks at their ends cut off; `.gz` is unpacked.

    Only "\\n" ends a line: U+2028 and the like are part of a sentence. A byte order mark goes.
    Raises InputError for a file that cannot be read, a broken gzip file, and invalid UTF-8.
    """
    return [line.strip() for line in _lines(path)]


def lines_of(raw: bytes, name: Path | str) -> list[str]:
    """As `read_lines`, of the bytes that stand in `name`."""
    return [line.strip() for line in _split(raw, name)]


def _lines(path: Path) -> list[str]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} is no whole gzip file: {error}") from None
    return _split(raw, path)


def _split(raw: bytes, name: Path | str) -> list[str]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}, line {line}: not valid UTF-8 ({error.reason})") from None
    lines = text.removeprefix("\ufeff").split("\n")
    if lines[-1] == "":
        lines.pop()
    return lines


def plain_name(path: Path) -> str:
    """The file's name without `.gz`."""
    return path.name.removesuffix(".gz")


def is_tsv(path: Path) -> bool:
    """Whether a name ends in `.tsv` or `.tsv.gz`."""
    return plain_name(path).endswith(".tsv")


def read_tsv(path: Path) -> dict[str, list[str]]:
    """A tab-separated file: language -> lines, all equally long.

    The languages are those of a first line that holds nothing but codes, `en<TAB>de` or more of
    them; without one, those of the pair that stands between dots in the name, `corpus.en-de.tsv`.
    Where the name has a pair, only a line of these two codes is a header. There is no quoting, and
    a blank line is one that is empty in every language.
    Raises InputError for neither header nor name, and for a line with another number of columns.
    """
    in_name = map(_PAIR.fullmatch, plain_name(path).split("."))
    named = next(filter(None, in_name), None)
    pair = [named[1], named[3]] if named else []
    rows = [line.split("\t") for line in _lines(path)]
    first = [cell.strip() for cell in rows[0]] if rows else []
    header = len(first) > 1 and all(_HEADER.fullmatch(cell) for cell in first)
    if header and (not pair or set(first) == set(pair)):
        languages, start = first, 1
    elif pair:
        languages, start = pair, 0
    else:
        raise InputError(
            f"{path}: which languages are its columns? Neither has its name a pair, as in "
            "corpus.en-de.tsv, nor is its first line a header of codes such as en<TAB>de"
        )
    if len(set(languages)) != len(languages):
        raise InputError(f"{path}: a language stands twice among its columns {languages}")
    columns: dict[str, list[str]] = {language: [] for language in languages}
    for number, row in enumerate(rows[start:], start + 1):
        cells = row if len(row) > 1 or row[0].strip() else [""] * len(languages)
        if len(cells) != len(languages):
            raise InputError(
                f"{path}, line {number}: {len(row)} columns where {len(languages)} are wanted, "
                f"{', '.join(languages)}"
            )
        for language, cell in zip(languages, cells, strict=True):
            columns[language].append(cell.strip())
    return columns
