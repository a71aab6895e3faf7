"""The embedded corpus: 30 directions of real language from Unicode CLDR, with no download.

A sentence is a small content without language, such as (date, 2031-05-09) or (territories, FR IT),
said in each language by the Unicode CLDR through babel: full dates and times, quantities with units
in their plural forms, prices, territories, languages, lists of them, intervals, numbers spelled out
by num2words where it speaks the language, and phrases that join two or three of these.

Content decides whether a sentence is for training, validation or test, by a hash of its parts in
any order, so that no validation or test content is ever seen in training in another wording or
another language.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import babel
import num2words
import numpy as np
from babel import dates, lists, numbers, units

#: The paper's 15 languages and the millions of sentences that it had of each (section 4).
RESOURCES = {
    "cs": 64.3, "fr": 40.4, "ru": 38.5, "zh": 26.0, "es": 15.2, "fi": 6.6, "de": 4.5, "et": 2.2,
    "lv": 0.638, "lt": 0.635, "ro": 0.610, "hi": 0.314, "kk": 0.222, "tr": 0.206, "gu": 0.156,
}  # fmt: skip
LANGUAGES = tuple(sorted(RESOURCES))
#: The 30 directions, as the configuration of a model names them.
PAIRS = tuple(pair for x in LANGUAGES for pair in (f"en-{x}", f"{x}-en"))
SPLITS = ("train", "valid", "test")

TERRITORIES = (
    "AR AT AU BE BG BR CA CH CL CN CO CU CZ DE DK EE EG ES FI FR GB GR HR HU ID IE IL IN IR IS IT "
    "JP KE KR KZ LT LV MA MX NG NL NO NZ PE PH PL PT RO RS RU SA SE SI SK TH TR UA US UZ VN ZA"
).split()
SPOKEN = (
    "ar bg bn cs da de el en es et fa fi fr gu he hi hu id it ja kk ko lt lv nl no pl pt ro ru sk "
    "sv sw th tr uk ur vi zh"
).split()
UNITS = (
    "length-kilometer length-meter length-centimeter mass-kilogram mass-gram volume-liter "
    "duration-year duration-month duration-week duration-day duration-hour duration-minute "
    "duration-second area-square-kilometer area-square-meter area-hectare speed-kilometer-per-hour "
    "power-kilowatt digital-megabyte digital-gigabyte temperature-celsius electric-volt"
).split()
CURRENCIES = "USD EUR GBP JPY CNY RUB INR CHF CZK TRY KZT PLN".split()
#: num2words' code of a language, where it has one.
SPELLERS = {
    x: {"kk": "kz"}.get(x, x) for x in "en cs de es fi fr kk lt lv ro ru tr".split()
}  # fmt: skip

Atom = tuple[Any, ...]
Content = tuple[Atom, ...]


@dataclasses.dataclass(frozen=True)
class CldrConfig:
    """Sizes of the corpus.

    train: sentence pairs of the richest language; the poorest has half as many, the others lie
      between by the logarithm of the paper's sizes.
    valid, test: sentence pairs of every language. seed: of what is drawn.
    """

    train: int = 24_000
    valid: int = 200
    test: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in SPLITS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def train_size(self, language: str) -> int:
        """Training pairs between English and this language."""
        low, high = math.log(min(RESOURCES.values())), math.log(max(RESOURCES.values()))
        share = 0.5 + 0.5 * (math.log(RESOURCES[language]) - low) / (high - low)
        return max(1, round(self.train * share))


def say(content: Content, language: str) -> str | None:
    """The content in a language; None where CLDR or num2words cannot say it there."""
    parts = [_say_atom(atom, language) for atom in content]
    if None in parts:
        return None
    first, *rest = (str(part) for part in parts)
    return f"{first}: {', '.join(rest)}" if rest else first


@functools.lru_cache(maxsize=1 << 16)
def _say_atom(atom: Atom, language: str) -> str | None:
    kind, *values = atom
    text = _SAYERS[kind](_locale(language), *values)
    # No-break spaces and invisible direction marks are layout, not words.
    return None if text is None else re.sub(r"\s+", " ", re.sub("[\u200e\u200f]", "", text)).strip()


@functools.cache
def _locale(language: str) -> babel.Locale:
    return babel.Locale(language)


def _date(locale: babel.Locale, day: int) -> str:
    return dates.format_date(_day(day), "full", locale)


def _moment(locale: babel.Locale, day: int, minute: int) -> str:
    date = dates.format_date(_day(day), "long", locale)
    time = dates.format_time(datetime.time(minute // 60, minute % 60), "short", locale=locale)
    pattern = str(dates.get_datetime_format("long", locale=locale)).replace("'", "")
    return pattern.replace("{0}", time).replace("{1}", date)


def _interval(locale: babel.Locale, first: int, days: int) -> str:
    return dates.format_interval(_day(first), _day(first + days), "yMMMd", locale=locale)


def _quantity(locale: babel.Locale, number: float, unit: str) -> str | None:
    for length in ("long", "short"):  # Chinese has no long form of some
        text = units.format_unit(number, unit, length, locale=locale)
        if unit not in text:  # babel's way of saying that it has no such form
            return text
    return None


def _price(locale: babel.Locale, amount: float, currency: str) -> str:
    return numbers.format_currency(amount, currency, locale=locale, format_type="name")


def _territories(locale: babel.Locale, style: str, *codes: str) -> str:
    return lists.format_list([locale.territories[c] for c in codes], style, locale)  # type: ignore[arg-type]


def _languages(locale: babel.Locale, style: str, *codes: str) -> str:
    return lists.format_list([locale.languages[c] for c in codes], style, locale)  # type: ignore[arg-type]


def _spelled(locale: babel.Locale, number: int) -> str | None:
    code = SPELLERS.get(locale.language)
    return None if code is None else num2words.num2words(number, lang=code)


def _distance(locale: babel.Locale, number: int, unit: str) -> str:
    seconds = {"day": 86400, "hour": 3600, "minute": 60}[unit]
    delta = datetime.timedelta(seconds=number * seconds)
    return dates.format_timedelta(
        delta,
        granularity=unit,  # type: ignore[arg-type]
        threshold=1e9,
        add_direction=True,
        locale=locale,
    )


def _day(number: int) -> datetime.date:
    return datetime.date(1950, 1, 1) + datetime.timedelta(days=number)


_SAYERS: dict[str, Callable[..., str | None]] = {
    "date": _date,
    "moment": _moment,
    "interval": _interval,
    "quantity": _quantity,
    "price": _price,
    "territories": _territories,
    "languages": _languages,
    "spelled": _spelled,
    "distance": _distance,
}


def draw(rng: np.random.Generator) -> Content:
    """One content: an atom alone or a heading with one or two atoms."""

    def below(n: int) -> int:
        return int(rng.integers(n))

    def number() -> float:
        tenths = (10 * below(100), 10 * below(1000), below(10000), 10 * below(30))[below(4)] or 10
        return tenths / 10 if tenths % 10 else tenths // 10  # 5 and 5.0 are one content

    def some(codes: list[str], most: int) -> tuple[str, ...]:
        style = ("standard", "or")[below(2)]
        chosen = rng.permutation(len(codes))[: 1 + below(most)]
        return (style, *(codes[i] for i in chosen))

    def atom(kind: str) -> Atom:
        if kind == "date":
            return kind, below(36500)
        if kind == "moment":
            return kind, below(36500), below(1440)
        if kind == "interval":
            return kind, below(36500), 1 + below(60)
        if kind == "quantity":
            return kind, number(), UNITS[below(len(UNITS))]
        if kind == "price":
            return kind, number(), CURRENCIES[below(len(CURRENCIES))]
        if kind == "territories":
            return kind, *some(TERRITORIES, 4)
        if kind == "languages":
            return kind, *some(SPOKEN, 4)
        if kind == "spelled":
            return kind, (below(1000), below(100), 1000 + below(9000))[below(3)]
        unit = ("day", "hour", "minute")[below(3)]
        return kind, (2 + below(28)) * (1, -1)[below(2)], unit

    shapes = (
        ("date",),
        ("moment",),
        ("interval",),
        ("spelled",),
        ("territories",),
        ("languages",),
        ("territories", "languages"),
        ("territories", "price"),
        ("territories", "date"),
        ("languages", "distance"),
        ("date", "quantity"),
        ("quantity", "price"),
        ("distance", "territories"),
        ("territories", "quantity", "quantity"),
        ("languages", "territories", "moment"),
        ("date", "price", "distance"),
    )
    return tuple(atom(kind) for kind in shapes[below(len(shapes))])


def split_of(content: Content, config: CldrConfig) -> str:
    """The split that a content belongs to, whatever the order and the wording of its parts."""
    # The style of a list ("and", "or") and the order of its members are wording.
    parts = sorted(
        repr(sorted(map(str, a[2:]))) + a[0] if a[0] in ("territories", "languages") else repr(a)
        for a in content
    )
    held_out = 3 * (config.valid + config.test) / (config.train + config.valid + config.test)
    place = zlib.crc32("|".join(parts).encode()) / 2**32
    if place >= min(held_out, 0.5):
        return "train"
    return "valid" if place < min(held_out, 0.5) / 2 else "test"


def fingerprint(config: CldrConfig) -> str:
    """A short hash of all that the corpus is made from: another where the corpus might be."""
    versions = [metadata.version(package) for package in ("babel", "num2words")]
    made_from = f"{config} {versions}".encode() + Path(__file__).read_bytes()
    return hashlib.sha256(made_from).hexdigest()[:16]


def write_corpus(
    folder: Path, config: CldrConfig, *, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write `SPLIT.en-XX.en` and `SPLIT.en-XX.XX` for every language, and `corpus.json`.

    A folder that already holds this corpus is left as it is. It appears whole or not at all.
    progress: called with (done, total) sentences. Raises ValueError where the folder holds
    something else.
    """
    mark = json.dumps({"corpus": "cldr", **dataclasses.asdict(config)}) + "\n"
    if (folder / "corpus.json").is_file():
        if (folder / "corpus.json").read_text(encoding="utf-8") == mark:
            return
        raise ValueError(f"{folder} holds a corpus of another configuration; name another folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} already holds something; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        wanted = {split: getattr(config, split) for split in ("valid", "test")}
        total = sum(config.train_size(x) + sum(wanted.values()) for x in LANGUAGES)
        done = 0
        contents = _draw_contents(config)
        for language in LANGUAGES:
            for split in SPLITS:
                size = wanted.get(split) or config.train_size(language)
                pairs = _say_pairs(contents[split], language, size)
                for code, lines in zip(("en", language), zip(*pairs, strict=True), strict=True):
                    text = "".join(f"{line}\n" for line in lines)
                    name = f"{split}.en-{language}.{code}"
                    (beside / name).write_text(text, encoding="utf-8")
                done += len(pairs)
                if progress is not None:
                    progress(done, total)
        (beside / "corpus.json").write_text(mark, encoding="utf-8")
        beside.chmod(0o755)
        try:
            if folder.exists():
                folder.rmdir()
            os.replace(beside, folder)
        except OSError:  # another process may have been faster with the same corpus
            if not (folder / "corpus.json").is_file():
                raise
            if (folder / "corpus.json").read_text(encoding="utf-8") != mark:
                raise
            shutil.rmtree(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _draw_contents(config: CldrConfig) -> dict[str, list[Content]]:
    """Distinct contents of each split: a third more than any language needs."""
    rng = np.random.default_rng(config.seed)
    # Some contents cannot be said in every language, hence the spare third.
    need = {split: math.ceil(getattr(config, split) * 4 / 3) + 10 for split in SPLITS}
    found: dict[str, dict[Content, None]] = {split: {} for split in SPLITS}
    while any(len(found[split]) < need[split] for split in SPLITS):
        content = draw(rng)
        split = split_of(content, config)
        if len(found[split]) < need[split]:
            found[split].setdefault(content)
    return {split: list(contents) for split, contents in found.items()}


def _say_pairs(contents: list[Content], language: str, size: int) -> list[tuple[str, str]]:
    """`size` different sentence pairs; each language starts at another place of the contents."""
    start = zlib.crc32(language.encode()) % len(contents)
    pairs: dict[tuple[str, str], None] = {}
    for content in contents[start:] + contents[:start]:
        english, other = say(content, "en"), say(content, language)
        if english is not None and other is not None:
            pairs.setdefault((english, other))
        if len(pairs) == size:
            return list(pairs)
    raise ValueError(f"{language} has only {len(pairs)} of {size} sentences")  # ever: a bug
