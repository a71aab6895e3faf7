"""Cleaning of training text, and an account of it: how many pairs were left out, and why.

Each rule looks at what the rules before it have left, so the numbers of a direction add up. Text to
score (validation, test) is never cleaned.
"""

from __future__ import annotations

import dataclasses
import itertools
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import TrainConfig, split_pair
from taskmoe.wmt.text.folders import Pairs, columns_of

_SLACK = 15  # characters by which short sentences may differ whatever the ratio: "Yes." "Mais si !"
_MOST_RATIOS = 4_000_000  # lines of a direction by which its typical ratio is known
_SORTED_AT_ONCE = 8_000_000
_ENDS = " .,;:!?…。！？।\"'«»“”„‚‘’()"


@dataclasses.dataclass(frozen=True)
class Account:
    """Sentence pairs of one direction: read, left out for each reason, kept.

    empty: a side has no text. long: a side has more than `max_characters`. copied: both sides are
    the same sentence, of more than three words, so no name. ratio: one side is too long for the
    other, see `length_ratio_fits`. duplicate: the same two sentences came before. held_out: a side
    stands in validation or test text.
    """

    read: int
    empty: int = 0
    long: int = 0
    copied: int = 0
    ratio: int = 0
    duplicate: int = 0
    held_out: int = 0

    @property
    def kept(self) -> int:
        """Pairs that are left to train on."""
        return self.read - sum(getattr(self, reason) for reason in REASONS)

    def to_dict(self) -> dict[str, int]:
        """All numbers, `kept` included."""
        return {**dataclasses.asdict(self), "kept": self.kept}


REASONS = tuple(field.name for field in dataclasses.fields(Account) if field.name != "read")


class Looked(NamedTuple):
    """What is known of a block of a direction's lines without the other blocks.

    lines: those that are neither empty, long nor copied. characters: [n, 2] i64 of their sides.
    key: [n] u64, the same for the same two sentences, and for others with a chance of 2^-64.
    held_out: [n] bool. counts: read, empty, long, copied.
    """

    lines: list[tuple[str, str]]
    characters: np.ndarray
    key: np.ndarray
    held_out: np.ndarray
    counts: dict[str, int]


def clean(
    text: Pairs, config: TrainConfig, held_out: Mapping[str, set[str]] | None = None
) -> tuple[Pairs, dict[str, Account]]:
    """Training text without what does not help, and each direction's account.

    text: direction -> (source lines, target lines), empty ones included.
    held_out: language -> lines of validation and test text. A pair is out where either of its sides
      is among them, letter case, spacing and punctuation at the ends aside: in multi-parallel text
      a test sentence would else come back in another direction.
    Raises InputError for a direction of which nothing is left, with its account.
    """
    held = held_keys(held_out or {})
    cleaned: Pairs = {}
    accounts: dict[str, Account] = {}
    for pair, columns in text.items():
        lines = zip(*columns, strict=True)
        looked = [look(lines, config, [held.get(x) for x in split_pair(pair)])]
        [kept], accounts[pair] = judge(pair, looked.copy, config)
        cleaned[pair] = columns_of(itertools.compress(looked[0].lines, kept.tolist()))
    return cleaned, accounts


def held_keys(held_out: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Language -> the keys of its lines of validation and test text."""
    return {x: {sentence_key(line) for line in lines} - {""} for x, lines in held_out.items()}


def look(
    lines: Iterable[tuple[str, str]], config: TrainConfig, held: Sequence[set[str] | None]
) -> Looked:
    """Look at a block of a direction's lines; held: as of `held_keys`, of source and target."""
    counts = dict.fromkeys(("read", "empty", "long", "copied"), 0)
    kept, characters, keys, among = [], [], bytearray(), []
    for source, target in lines:
        counts["read"] += 1
        if not (source and target):
            counts["empty"] += 1
        elif max(len(source), len(target)) > config.max_characters:
            counts["long"] += 1
        elif config.drop_copied and _is_copied(source, target):
            counts["copied"] += 1
        else:
            kept.append((source, target))
            characters.append((len(source), len(target)))
            keys += blake2b(f"{source}\0{target}".encode(), digest_size=8).digest()
            among.append(
                config.drop_held_out
                and any(
                    known is not None and sentence_key(line) in known
                    for line, known in zip((source, target), held, strict=True)
                )
            )
    return Looked(
        kept,
        np.array(characters, np.int64).reshape(-1, 2),
        np.frombuffer(bytes(keys), np.uint64),
        np.array(among, bool),
        counts,
    )


def judge(
    pair: str, blocks: Callable[[], Iterable[Looked]], config: TrainConfig
) -> tuple[list[np.ndarray], Account]:
    """Which of the lines in each block are kept, [n] bool, and the direction's account.

    blocks: gives all of a direction, and may be called again; their `lines` are not looked at.
    Raises InputError where nothing is left.
    """
    counts = dict.fromkeys(("read", "empty", "long", "copied"), 0)
    for block in blocks():
        counts = {name: counts[name] + block.counts[name] for name in counts}
    step = 1 + counts["read"] // _MOST_RATIOS
    ratios = [np.divide(*block.characters[::step, ::-1].T) for block in blocks()]
    # The median, which a tenth of rubbish does not move.
    typical = float(np.median(np.concatenate(ratios))) if sum(map(len, ratios)) else 1.0
    kept: list[np.ndarray] = []
    keys, held = [np.zeros(0, np.uint64)], [np.zeros(0, bool)]
    for block in blocks():
        source, target = block.characters.T
        kept.append(np.asarray(length_ratio_fits(source, target, typical, config.max_ratio)))
        keys.append(block.key[kept[-1]])
        held.append(block.held_out[kept[-1]])
    key, among = np.concatenate(keys), np.concatenate(held)
    first = first_of_each(key) if config.deduplicate else np.ones(len(key), bool)
    good = first & ~among
    account = Account(
        **counts,
        ratio=sum(map(len, kept)) - len(key),
        duplicate=int((~first).sum()),
        held_out=int((first & among).sum()),
    )
    if not account.kept:
        reasons = ", ".join(f"{k} {v}" for k, v in account.to_dict().items() if v)
        raise InputError(
            f"pair {pair}: no sentence pair is left after cleaning ({reasons})"
            if reasons
            else f"pair {pair}: the training text holds no sentence pair"
        )
    ends = np.cumsum([fits.sum() for fits in kept])
    for fits, own in zip(kept, np.split(good, ends[:-1]), strict=True):
        fits[fits] = own
    return kept, account


def first_of_each(key: np.ndarray) -> np.ndarray:
    """[n] bool: whether no equal key comes before; key: [n] u64, spread evenly.

    Parts of the keys' range are sorted one after the other, so that the sort's memory is bounded.
    """
    first = np.ones(len(key), bool)
    bits = max(0, int(len(key) // _SORTED_AT_ONCE).bit_length())
    for part in range(1 << bits):
        where = np.flatnonzero(key >> np.uint64(64 - bits) == part) if bits else np.arange(len(key))
        order = np.argsort(key[where], kind="stable")
        found = key[where][order]
        first[where[order[1:][found[1:] == found[:-1]]]] = False
    return first


def length_ratio_fits(source: Any, target: Any, typical: float, most: float) -> Any:
    """Whether lengths in characters go together: `longer <= most * shorter + 15`.

    source, target: numbers, or arrays of them. typical: the direction's median of target characters
    per source character, by which the source's length is multiplied first; so Chinese, which needs
    a third of English's, is measured fairly.
    """
    scaled = source * typical
    return np.maximum(scaled, target) <= most * np.minimum(scaled, target) + _SLACK


def sentence_key(line: str) -> str:
    """A sentence without letter case, spacing, ways to write a letter, punctuation at its ends."""
    whole = line if line.isascii() else unicodedata.normalize("NFC", line)
    return " ".join(whole.casefold().split()).strip(_ENDS)


def _is_copied(source: str, target: str) -> bool:
    """Whether a sentence was left as it is; a name or a number may be."""
    return source == target and len(source.split()) > 3


def account_table(
    title: str, accounts: Mapping[str, Account], columns: Mapping[str, Mapping[str, int]]
) -> Table:
    """A table with a row a direction and a column a reason, sums below where there are several.

    columns: further ones, name -> direction -> number.
    """
    table = Table(
        title=Text(title), show_footer=len(accounts) > 1, box=box.SIMPLE, padding=(0, 0, 0, 1)
    )
    names = ["direction", *accounts]
    table.add_column("direction", "all", min_width=max(map(len, names)))
    numbers = {name: {p: a.to_dict()[name] for p, a in accounts.items()} for name in _ORDER}
    numbers |= {name: dict(values) for name, values in columns.items()}
    for name, values in numbers.items():
        head, total = _HEADS.get(name, name), f"{sum(values.values()):,}"
        # A number is never cut off, however narrow the terminal.
        width = max(len(total), *map(len, head.split()))
        table.add_column(head, total, justify="right", min_width=width)
    # One width whatever the terminal's: in a narrow one Rich would leave out the last columns.
    table.width = sum(2 + (column.min_width or 0) for column in table.columns) + 1
    for pair in accounts:
        table.add_row(pair, *(f"{values[pair]:,}" for values in numbers.values()))
    return table


_ORDER = ("read", *REASONS, "kept")
_HEADS = {"copied": "same", "duplicate": "twice", "held_out": "held out"}  # short: for 80 columns
