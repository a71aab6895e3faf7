"""Text files, UTF-8, plain or gzip: a sentence a line, or tab-separated columns of languages.

Whatever bytes a file holds, what comes out is its lines or an InputError that names file and line.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from taskmoe.cli.errors import InputError
from taskmoe.wmt.text.languages import known, sides

_PIECE = 1 << 20  # bytes that are read at once, where there are so many


def read_lines(path: Path) -> list[str]:
    """The lines of a file, blanks at their ends cut off; `.gz` is unpacked.

    Only "\\n" ends a line, or "\\r" in a file without any: U+2028 and the like are part of a
    sentence. A byte order mark goes. Raises InputError for a file that cannot be read, a broken
    gzip file, invalid UTF-8, and a NUL, which is in no text but in UTF-16 that is read as UTF-8.
    """
    return [line.strip() for line in _lines(path)]


def stream_lines(file: BinaryIO, name: Path | str) -> Iterator[list[str]]:
    """As `read_lines`, in the pieces in which a file or pipe gives its lines.

    name: for errors, which are raised when the lines before have been handed out.
    """
    begun, number = b"", 0
    try:
        while piece := file.read1(_PIECE):  # type: ignore[attr-defined]  # what is there, no more
            whole, newline, rest = piece.rpartition(b"\n")
            if newline:
                lines = _split(begun + whole + newline, name, number)
                yield [line.strip() for line in lines]
                begun, number = rest, number + len(lines)
            else:
                begun += piece
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name} cannot be read to its end: {error}") from None
    if begun:
        yield [line.strip() for line in _split(begun, name, number)]


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


def _split(raw: bytes, name: Path | str, before: int = 0) -> list[str]:
    """before: lines that stand before these."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = before + raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{name}, line {line}: not valid UTF-8 ({error.reason}){_conversion(raw)}"
        ) from None
    if "\0" in text:
        line = before + text.count("\n", 0, text.index("\0")) + 1
        raise InputError(
            f"{name}, line {line}: a NUL character, so no UTF-8 text{_conversion(raw)}"
        )
    lines = (text if before else text.removeprefix("\ufeff")).split("\n" if "\n" in text else "\r")
    if lines[-1] == "":
        lines.pop()
    return lines


def _conversion(raw: bytes) -> str:
    """How to convert bytes that look like UTF-16; nothing for others."""
    start, zeros = raw[:1000], (raw[:1000:2].count(0), raw[1:1000:2].count(0))
    if not start.startswith((b"\xff\xfe", b"\xfe\xff")) and 2 * max(zeros) < len(start) // 2:
        return ""
    big = start.startswith(b"\xfe\xff") or zeros[0] > zeros[1]
    return f"; if it is UTF-16: iconv -f UTF-16{'BE' if big else 'LE'} -t UTF-8"


def plain_name(path: Path) -> str:
    """The file's name without `.gz`."""
    return path.name.removesuffix(".gz")


def is_tsv(path: Path) -> bool:
    """Whether a name ends in `.tsv` or `.tsv.gz`."""
    return plain_name(path).endswith(".tsv")


def read_tsv(path: Path, named: Collection[str] = ()) -> tuple[dict[str, list[str]], list[str]]:
    """A tab-separated file: (language -> lines, all equally long; the columns left aside).

    The languages are those of a first line that names columns, two of them at least by language
    codes, `en<TAB>de` or `id<TAB>en<TAB>pt-BR`; without one, those of the pair that stands between
    dots in the name, `corpus.en-de.tsv`. Where the name has a pair, only a line of these two codes
    is a header. Columns that are no languages are left aside, and a column `id` that holds no
    letters, which is not in Indonesian. There is no quoting, and a blank line is one that is empty
    in every language. named: codes that count although they are no languages.
    Raises InputError for neither header nor name, and for a line with another number of columns.
    """
    parts = plain_name(path).split(".")
    pair = next((sides(part, named)[0] for part in parts if len(sides(part, named)) == 1), ())
    in_name = [known(side, named) for side in pair]
    rows = [line.split("\t") for line in _lines(path)]
    first = [cell.strip() for cell in rows[0]] if rows else []
    heads = [known(cell, named) for cell in first]
    languages, start = in_name, 0
    words = all(len(cell.split()) <= 1 for cell in first)
    if (
        len(heads) - heads.count(None) > 1
        and words
        and (not pair or set(heads) - {None} == set(in_name))
    ):
        languages, start = heads, 1
    if not languages:
        raise InputError(
            f"{path}: which languages are its columns? Neither has its name a pair, as in "
            "corpus.en-de.tsv, nor is its first line a header of codes such as en<TAB>de"
        )
    codes = [language for language in languages if language is not None]
    if len(set(codes)) != len(codes):
        raise InputError(f"{path}: a language stands twice among its columns {codes}")
    found: list[list[str]] = [[] for _ in languages]
    for number, row in enumerate(rows[start:], start + 1):
        cells = row if len(row) > 1 or row[0].strip() else [""] * len(languages)
        if len(cells) != len(languages):
            wanted = first if start else codes
            raise InputError(
                f"{path}, line {number}: {len(row)} columns where {len(languages)} are wanted, "
                f"{', '.join(wanted)}"
            )
        for column, cell in zip(found, cells, strict=True):
            column.append(cell.strip())
    columns = {x: column for x, column in zip(languages, found, strict=True) if x is not None}
    aside = [first[place] for place, language in enumerate(languages) if language is None]
    numbers = "id" in columns and not any(map(str.isalpha, "".join(columns["id"])))
    if numbers and "id" not in named and len(columns) > 2:
        aside.append("id")
        del columns["id"]
    return columns, aside
