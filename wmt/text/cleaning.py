"""Cleaning of training text, and an account of it: how many pairs were left out, and why.

Each rule looks at what the rules before it have left, so the numbers of a direction add up. Text to
score (validation, test) is never cleaned.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Mapping

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import TrainConfig, split_pair
from taskmoe.wmt.text.folders import Columns, Pairs

_SLACK = 15  # characters by which short sentences may differ whatever the ratio: "Yes." "Mais si !"
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
    held = {x: {sentence_key(line) for line in lines} for x, lines in (held_out or {}).items()}
    cleaned: Pairs = {}
    accounts: dict[str, Account] = {}
    for pair, columns in text.items():
        languages = split_pair(pair)
        known = [held.get(x, set()) if config.drop_held_out else set() for x in languages]
        cleaned[pair], accounts[pair] = _clean_direction(columns, config, known)
        if not accounts[pair].kept:
            reasons = ", ".join(f"{k} {v}" for k, v in accounts[pair].to_dict().items() if v)
            raise InputError(
                f"pair {pair}: no sentence pair is left after cleaning ({reasons})"
                if reasons
                else f"pair {pair}: the training text holds no sentence pair"
            )
    return cleaned, accounts


def length_ratio_fits(source: int, target: int, typical: float, most: float) -> bool:
    """Whether lengths in characters go together: `longer <= most * shorter + 15`.

    typical: the direction's median of target characters per source character, by which the source's
    length is multiplied first; so Chinese, which needs a third of English's, is measured fairly.
    """
    shorter, longer = sorted((source * typical, float(target)))
    return longer <= most * shorter + _SLACK


def sentence_key(line: str) -> str:
    """A sentence without letter case, spacing, ways to write a letter, punctuation at its ends."""
    whole = line if line.isascii() else unicodedata.normalize("NFC", line)
    return " ".join(whole.casefold().split()).strip(_ENDS)


def _clean_direction(
    columns: Columns, config: TrainConfig, held: list[set[str]]
) -> tuple[Columns, Account]:
    out = dict.fromkeys(REASONS, 0)
    present = [(s, t) for s, t in zip(*columns, strict=True) if s and t]
    out["empty"] = len(columns[0]) - len(present)

    short = [p for p in present if max(map(len, p)) <= config.max_characters]
    out["long"] = len(present) - len(short)

    own = [p for p in short if not (config.drop_copied and _is_copied(*p))]
    out["copied"] = len(short) - len(own)

    # The median, which a tenth of rubbish does not move.
    typical = float(np.median([len(t) / len(s) for s, t in own])) if own else 1.0
    fitting = [p for p in own if length_ratio_fits(len(p[0]), len(p[1]), typical, config.max_ratio)]
    out["ratio"] = len(own) - len(fitting)

    unique = list(dict.fromkeys(fitting)) if config.deduplicate else fitting
    out["duplicate"] = len(fitting) - len(unique)

    kept = (
        [(s, t) for s, t in unique if not (_is_in(s, held[0]) or _is_in(t, held[1]))]
        if any(held)
        else unique
    )
    out["held_out"] = len(unique) - len(kept)
    return ([s for s, _ in kept], [t for _, t in kept]), Account(len(columns[0]), **out)


def _is_copied(source: str, target: str) -> bool:
    """Whether a sentence was left as it is; a name or a number may be."""
    return source == target and len(source.split()) > 3


def _is_in(line: str, held: set[str]) -> bool:
    key = sentence_key(line)
    return bool(key) and key in held


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
