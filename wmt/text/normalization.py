"""The one normalisation of text: rules that lie in a vocabulary, for whatever reads it.

What is the same on paper becomes the same to the model, and no more than that: full-width forms,
ligatures and fractions stay, which NFKC would rewrite. Letters with marks are composed as in
Unicode's NFC. Every kind of space, tab and line separator is a plain space. Characters that are not
seen go: byte order marks, word joiners, soft hyphens, marks of direction and control characters.
The zero-width space is a space; behind a letter of a script that is written without spaces it goes.
The zero-width joiner and non-joiner stay: Persian and the scripts of India cannot do without them.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Iterator

_ZERO_WIDTH_SPACE = "\u200b"
_SPACES = [
    chr(point)
    for point in range(sys.maxunicode + 1)
    if chr(point) != " " and unicodedata.category(chr(point)) in ("Zs", "Zl", "Zp")
] + ["\t", "\v", "\f", "\r", "\x1c", "\x1d", "\x1e", "\x1f", "\x85"]
#: Marks of direction, word joiner, byte order mark, soft hyphen; other control characters.
_UNSEEN = ["\u00ad", "\u061c", "\u200e", "\u200f", *map(chr, range(0x202A, 0x202F))]
_UNSEEN += ["\u2060", *map(chr, range(0x2066, 0x206A)), "\ufeff"]
_CONTROL = [chr(c) for c in (*range(0x01, 0x20), *range(0x7F, 0xA0)) if chr(c) != "\n"]
#: Thai to Tibetan, Myanmar, Khmer, and further scripts of South East Asia: first and last letter.
_UNSPACED = ((0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x1AAF))


@functools.cache
def rules() -> str:
    """The rules as the text of a file that SentencePiece compiles into a vocabulary."""
    lines = (f"{_hexadecimal(a)}\t{_hexadecimal(b)}\n" for a, b in sorted(_rules().items()))
    return "".join(lines)


def _rules() -> dict[str, str]:
    """What is written otherwise -> as what; the longest that fits counts."""
    found = dict.fromkeys([*_UNSEEN, *_CONTROL], "") | dict.fromkeys(_SPACES, " ")
    for point in range(sys.maxunicode + 1):
        for spelled in _spellings(chr(point)):
            if unicodedata.normalize("NFC", spelled) != spelled:
                found[spelled] = unicodedata.normalize("NFC", spelled)
    for first, last in _UNSPACED:
        letters = [chr(point) for point in range(first, last + 1)]
        apart = [spelled for spelled, letter in found.items() if letter and letter in letters]
        for letter in (*letters, *apart):
            found[letter + _ZERO_WIDTH_SPACE] = found.get(letter, letter)
    return found | {_ZERO_WIDTH_SPACE: " "}


def _spellings(letter: str) -> Iterator[str]:
    """Ways to write a letter: as it is, and with its marks apart, one or several of them."""
    parts = unicodedata.decomposition(letter)
    hangul = 0xAC00 <= ord(letter) <= 0xD7A3
    if not hangul and (not parts or parts.startswith("<")):
        return
    yield letter  # the Kelvin sign is a K
    whole = unicodedata.normalize("NFD", letter)
    for cut in range(1, len(whole) + 1):
        yield unicodedata.normalize("NFC", whole[:cut]) + whole[cut:]
    yield whole


def _hexadecimal(text: str) -> str:
    return " ".join(f"{ord(character):X}" for character in text)
