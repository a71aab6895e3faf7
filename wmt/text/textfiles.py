"""Text files, UTF-8, plain or gzip: a sentence a line, or tab-separated columns of languages.

Whatever bytes a file holds, what comes out is its lines or an InputError that names file and line.
"""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from taskmoe.cli.errors import InputError
from taskmoe.wmt.text.languages import known, sides

_PIECE = 1 << 20  # bytes that are read at once, where there are so many
_HEAD = 1000  # lines by which a tab-separated file's columns are known


def read_lines(path: Path) -> list[str]:
    """The lines of a file, blanks at their ends cut off; `.gz` is unpacked.

    Only "\\n" ends a line, or "\\r" in a file without any: U+2028 and the like are part of a
    sentence. A byte order mark goes. Raises InputError for a file that cannot be read, a broken
    gzip file, invalid UTF-8, and a NUL, which is in no text but in UTF-16 that is read as UTF-8.
    """
    return list(stream_file(path))


def stream_file(path: Path, strip: bool = True) -> Iterator[str]:
    """As `read_lines`, one line at a time; strip: whether blanks at their ends go."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for lines in stream_lines(cast("BinaryIO", file), path, strip):
                yield from lines
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def stream_pairs(source: Path, target: Path) -> Iterator[tuple[str, str]]:
    """Line by line of two files; raises InputError at the end of the shorter one."""
    for both in itertools.zip_longest(stream_file(source), stream_file(target)):
        if None in both:
            a, b = (count_lines(path) for path in (source, target))
            raise InputError(
                f"{source} has {a} lines but {target} has {b}: "
                "line N of one must translate line N of the other"
            )
        yield both


def count_lines(path: Path) -> int:
    """How many lines a file has; raises InputError where it cannot be read."""
    return sum(1 for _ in stream_file(path, strip=False))


def stamp(path: Path) -> str:
    """A file's name, size and time of its last change."""
    there = path.stat()
    return f"{path.resolve()} {there.st_size} {there.st_mtime_ns}"


def stream_lines(file: BinaryIO, name: Path | str, strip: bool = True) -> Iterator[list[str]]:
    """As `read_lines`, in the pieces in which a file or pipe gives its lines.

    name: for errors, which are raised when the lines before have been handed out.
    """
    begun: list[bytes] = []
    number = 0

    def lines(raw: bytes) -> list[str]:
        found = _split(raw, name, number)
        return [line.strip() for line in found] if strip else found

    try:
        while piece := file.read1(_PIECE):  # type: ignore[attr-defined]  # what is there, no more
            whole, newline, rest = piece.rpartition(b"\n")
            if newline:
                found = lines(b"".join([*begun, whole, newline]))
                yield found
                begun, number = [rest], number + len(found)
            else:
                begun.append(piece)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{name} is no whole gzip file: {error}") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read to its end: {error.strerror}") from None
    if rest := b"".join(begun):
        yield lines(rest)


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
    end = "\n" if before or "\n" in text else "\r"
    lines = (text if before else text.removeprefix("\ufeff")).split(end)
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


class TsvFile:
    """A tab-separated file: a sentence a column, equally many in all lines.

    The languages are those of a first line that names columns, two of them at least by language
    codes, `en<TAB>de` or `id<TAB>en<TAB>pt-BR`; without one, those of the pair that stands between
    dots in the name, `corpus.en-de.tsv`. Where the name has a pair, only a line of these two codes
    is a header. Columns that are no languages are left aside, and a column `id` that holds no
    letters in its first thousand lines, which is not in Indonesian. There is no quoting, and a
    blank line is one that is empty in every language.

    languages: of the columns that count. aside: the others, as they are called.
    """

    def __init__(self, path: Path, named: Collection[str] = ()) -> None:
        """named: codes that count although they are no languages.

        Raises InputError for neither header nor name.
        """
        self._path = path
        parts = plain_name(path).split(".")
        pair = next((sides(part, named)[0] for part in parts if len(sides(part, named)) == 1), ())
        in_name = [known(side, named) for side in pair]
        begin = [x.split("\t") for x in itertools.islice(stream_file(path, strip=False), _HEAD)]
        first = [cell.strip() for cell in begin[0]] if begin else []
        heads = [known(cell, named) for cell in first]
        columns, self._start = in_name, 0
        words = all(len(cell.split()) <= 1 for cell in first)
        if (
            len(heads) - heads.count(None) > 1
            and words
            and (not pair or set(heads) - {None} == set(in_name))
        ):
            columns, self._start = heads, 1
        if not columns:
            raise InputError(
                f"{path}: which languages are its columns? Neither has its name a pair, as in "
                "corpus.en-de.tsv, nor is its first line a header of codes such as en<TAB>de"
            )
        self._names = first if self._start else [str(x) for x in columns]
        codes = [language for language in columns if language is not None]
        if len(set(codes)) != len(codes):
            raise InputError(f"{path}: a language stands twice among its columns {codes}")
        self.aside = [first[place] for place, x in enumerate(columns) if x is None]
        self._place = {x: place for place, x in enumerate(columns) if x is not None}
        if "id" in self._place and "id" not in named and len(self._place) > 2:
            at = self._place["id"]
            if not any(
                map(str.isalpha, "".join(x[at] for x in begin[self._start :] if at < len(x)))
            ):
                self.aside.append("id")
                del self._place["id"]
        self.languages = list(self._place)

    def stream(self, source: str, target: str) -> Iterator[tuple[str, str]]:
        """The sentences of two languages, line by line; raises InputError as `column` does."""
        return ((row[0], row[1]) for row in self._rows(source, target))

    def column(self, language: str) -> list[str]:
        """All sentences of a language.

        Raises InputError for a line with another number of columns.
        """
        return [cell for (cell,) in self._rows(language)]

    def _rows(self, *languages: str) -> Iterator[tuple[str, ...]]:
        wanted, places = len(self._names), [self._place[language] for language in languages]
        for number, line in enumerate(stream_file(self._path, strip=False), 1):
            if number <= self._start:
                continue
            row = line.split("\t")
            cells = row if len(row) > 1 or row[0].strip() else [""] * wanted
            if len(cells) != wanted:
                raise InputError(
                    f"{self._path}, line {number}: {len(row)} columns where {wanted} are wanted, "
                    f"{', '.join(self._names)}"
                )
            yield tuple(cells[place].strip() for place in places)
