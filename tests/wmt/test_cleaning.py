"""What cleaning leaves out, that it says so, and that its numbers add up."""

import io
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from rich.console import Console

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.config import TrainConfig
from taskmoe.wmt.text.cleaning import (
    REASONS,
    Account,
    account_table,
    clean,
    length_ratio_fits,
    sentence_key,
)

LONG = "word " * 10


def cleaned(
    rows: list[tuple[str, str]], held_out: Any = None, **fields: Any
) -> tuple[list[tuple[str, str]], Account]:
    text = {"en-de": ([s for s, _ in rows], [t for _, t in rows])}
    kept, accounts = clean(text, TrainConfig(**fields), held_out)
    return list(zip(*kept["en-de"], strict=True)), accounts["en-de"]


def test_each_reason_is_counted_once() -> None:
    rows = [
        ("good", "gut"),
        ("", "leer"),
        ("empty", ""),
        (LONG * 3, LONG * 3),
        (LONG, "kurz"),
        ("good", "gut"),
        ("good", "besser"),  # another translation is no duplicate
        ("Seen in the test.", "gesehen"),
        ("seen", "Im Test gesehen"),
        ("one of the sentences", "one of the sentences"),
        ("Anna Maria Schmidt", "Anna Maria Schmidt"),  # a name
    ]
    held = {"en": {"seen  in the TEST"}, "de": {"im Test gesehen!"}}
    kept, account = cleaned(rows, held, max_characters=100, max_ratio=1.5)
    assert kept == [("good", "gut"), ("good", "besser"), ("Anna Maria Schmidt",) * 2]
    assert account == Account(read=11, empty=2, long=1, copied=1, ratio=1, duplicate=1, held_out=2)
    assert account.kept == 3


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, 1),
        ({"deduplicate": False}, 2),
        ({"drop_held_out": False}, 2),
        ({"max_characters": 60, "drop_copied": False}, 2),
        ({"max_ratio": 20.0}, 2),
    ],
)
def test_each_limit_can_be_set(fields: dict[str, Any], kept: int) -> None:
    rows = [("good", "gut"), ("good", "gut"), ("test", "Test"), (LONG, LONG), (LONG, "kurz")]
    limits = {"max_characters": 40, "max_ratio": 1.0}
    if "max_characters" in fields:
        rows.pop()
    if "max_ratio" in fields:
        rows, limits["max_characters"] = rows[:3] + rows[4:], 60
    found, account = cleaned(rows, {"en": {"test"}}, **(limits | fields))
    assert len(found) == account.kept == kept


def test_text_to_train_on_may_not_come_back_in_another_direction() -> None:
    held = {"en": {"a test"}, "fr": set()}
    text = {"fr-en": (["un", "deux"], ["A test.", "two"]), "fr-de": (["un"], ["ein"])}
    kept, accounts = clean(text, TrainConfig(), held)
    assert kept == {"fr-en": (["deux"], ["two"]), "fr-de": (["un"], ["ein"])}
    assert [a.held_out for a in accounts.values()] == [1, 0]


def test_the_ratio_is_measured_by_what_is_typical_of_the_direction() -> None:
    assert length_ratio_fits(30, 90, typical=1.0, most=3.0)
    assert not length_ratio_fits(30, 106, typical=1.0, most=3.0)  # 15 characters of slack
    assert length_ratio_fits(30, 105, typical=1.0, most=3.0)
    assert not length_ratio_fits(106, 30, typical=1.0, most=3.0)
    # Chinese: a third of the characters; and a sentence that has as many is long there.
    assert length_ratio_fits(300, 100, typical=1 / 3, most=1.0)
    assert not length_ratio_fits(300, 300, typical=1 / 3, most=2.0)
    assert length_ratio_fits(1, 12, typical=1.0, most=1.0)  # "Yes." may be "Mais bien sûr."


def test_what_makes_two_wordings_one_sentence() -> None:
    assert sentence_key(" «A  man, RIDING.» ") == sentence_key("a man, riding")
    assert sentence_key("a man riding") != sentence_key("a man, riding")
    assert sentence_key("नमस्ते।") == sentence_key("नमस्ते")
    assert sentence_key("...") == ""
    # Nothing but punctuation is no sentence of the test text.
    assert cleaned([("...", "...")], {"en": {"."}})[1].kept == 1


def test_nothing_left_is_an_error_that_says_why() -> None:
    with pytest.raises(InputError, match=r"pair en-de: no sentence pair is left .*read 2, empty 2"):
        cleaned([("", "x"), ("a", "")])


WORDS = st.sampled_from(["", "a", "b", "B.", "c d", LONG, LONG * 2, "Über", "...", "\u2028"])


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(
    rows=st.lists(st.tuples(WORDS, WORDS), max_size=20),
    held=st.sets(WORDS),
    length=st.integers(1, 120),
    ratio=st.floats(1, 5),
)
def test_numbers_add_up_and_the_order_stays(
    rows: list[tuple[str, str]], held: set[str], length: int, ratio: float
) -> None:
    limits: dict[str, Any] = {"max_characters": length, "max_ratio": ratio}
    rows = [*rows, ("only", "hier")]
    try:
        kept, account = cleaned(rows, {"en": held, "de": held}, **limits)
    except InputError:
        hypothesis.assume(False)
    assert account.read == len(rows)
    assert account.kept == len(kept) == account.read - sum(getattr(account, r) for r in REASONS)
    assert kept == [row for row in dict.fromkeys(rows) if row in kept]  # the first of equals
    assert all(s and t and max(len(s), len(t)) <= length for s, t in kept)
    keys = {sentence_key(line) for line in held} - {""}
    assert not any(sentence_key(line) in keys for row in kept for line in row)


def printed(accounts: dict[str, Account], width: int = 80) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    console.print(account_table("title", accounts, {"no bucket": dict.fromkeys(accounts, 7)}))
    assert isinstance(console.file, io.StringIO)
    return [line.split() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 20])
def test_the_table_has_a_column_a_reason_and_sums(width: int) -> None:
    accounts = {"en-de": Account(9_000_000, 2, 1, 3, 1, 1, 2), "de-en": Account(5, ratio=1)}
    rows = printed(accounts, width)
    assert ["en-de", "9,000,000", "2", "1", "3", "1", "1", "2", "8,999,990", "7"] in rows
    assert ["all", "9,000,005", "2", "1", "3", "2", "1", "2", "8,999,994", "14"] in rows
    assert ["all"] not in [row[:1] for row in printed({"en-de": accounts["en-de"]}, width)]
    heads = {
        "direction",
        "read",
        "empty",
        "long",
        "same",
        "ratio",
        "twice",
        "held",
        "out",
        "kept",
        "bucket",
    }
    assert heads <= {word for row in rows for word in row}


@pytest.mark.skipif(not support.REAL.is_dir(), reason="no ../shared/data beside the project")
def test_real_text_loses_little() -> None:
    from taskmoe.wmt.text.sources import open_sources, read_all, read_held_out

    sources = open_sources([str(support.REAL)])
    text = read_all(sources, "train", ("en-de",))
    _, accounts = clean(text, TrainConfig(), read_held_out(sources, {"en", "de"}))
    account = accounts["en-de"]
    assert account.read == 29_000
    assert 0 < account.read - account.kept < 50
    _, all_seen = clean(text, TrainConfig(), {"en": set(text["en-de"][0][1000:])})
    assert all_seen["en-de"].kept < 1000  # held-out text that is the training text is noticed
