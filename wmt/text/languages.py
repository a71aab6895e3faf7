"""Language codes: BCP 47 in both spellings, `pt-BR` and `pt_BR`, and what is a language at all."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable

from babel import Locale
from babel.core import get_global

from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import split_pair

#: Codes of small languages by which files of other kinds are called: to be named with --pairs.
_ENDINGS = {"bak", "src", "tmp", "tok"}
_PARTS = re.compile(
    r"(?P<language>[a-z]{2,3})"
    r"([-_](?P<script>[A-Za-z]{4}))?"
    r"([-_](?P<region>[A-Za-z]{2}|[0-9]{3}))?"
    r"([-_](?P<variant>[A-Za-z0-9]{5,8}|[0-9][A-Za-z0-9]{3}))?"
)


def code(written: str) -> str | None:
    """A language code as it is kept, `pt_BR` or `zh_Hans`; None for what is none.

    Its language must be one that babel knows by its two or three letters, ISO 639-2's included.
    `pt-br` is none: with a dash and in small letters it could be the direction from pt to br.
    """
    parts = _PARTS.fullmatch(written)
    if parts is None or parts["language"] not in _known():
        return None
    script, region = parts["script"], parts["region"]
    if "-" in written and region in _known():
        return None
    kept = [parts["language"], script and script.title(), region and region.upper()]
    return "_".join(part for part in (*kept, parts["variant"]) if part)


def primary(language: str) -> str:
    """The language alone, as ISO 639-1 has it where it does: `zho_Hans` is `zh`."""
    first = re.split("[-_]", language)[0]
    found: str = get_global("language_aliases").get(first, first)
    return found.partition("_")[0]


def sides(written: str, named: Collection[str] = ()) -> list[tuple[str, str]]:
    """Where a word's dashes may part it into two different codes, as they are written.

    named: codes that count although they are no languages.
    """
    at = [place for place, character in enumerate(written) if character == "-"]
    both = [(written[:place], written[place + 1 :]) for place in at]
    kept = [tuple(known(side, named) for side in pair) for pair in both]
    return [pair for pair, (a, b) in zip(both, kept, strict=True) if a and b and a != b]


def known(written: str, named: Collection[str] = ()) -> str | None:
    """As `code`, and as it stands where it is one of `named`."""
    return written if written in named else code(written)


def direction(written: str, named: Collection[str] = ()) -> str:
    """A direction as it is kept: `en-pt-BR` is `en-pt_BR`.

    named: codes that are taken as they stand. One dash parts any two words: who names a direction
    may call a language anything. Raises InputError where it is no direction, or could be two.
    """
    written = written.strip()
    found = [f"{known(a, named)}-{known(b, named)}" for a, b in sides(written, named)]
    if not found and written.count("-") == 1:
        found = ["-".join(known(side, named) or side for side in written.split("-"))]
    if len(found) != 1:
        raise InputError(
            "pair must be two different language codes like 'en-de', with regions in capitals "
            f"like 'en-pt-BR', got {written!r}"
        )
    try:
        split_pair(found[0])
    except ValueError as error:
        raise InputError(str(error)) from None
    return found[0]


def spelled(word: str, names: Collection[str]) -> str:
    """A language or direction as one of the names has it, `pt-BR` as `pt_BR`; else the word."""
    if word in names:
        return word
    codes = {code for name in names for code in name.split("-")}
    both = ["-".join(known(side, codes) or "" for side in pair) for pair in sides(word, codes)]
    return next((name for name in (code(word), *both) if name and name in names), word)


def codes_of(pairs: Iterable[str]) -> frozenset[str]:
    """The codes of both sides of directions."""
    return frozenset(side for pair in pairs for side in split_pair(pair))


@functools.cache
def _known() -> frozenset[str]:
    every = {*Locale("en").languages, *get_global("language_aliases")}
    return frozenset(every - _ENDINGS)
