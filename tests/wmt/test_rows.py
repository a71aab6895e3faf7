"""Encoded rows by length, the order in which they come, and the first of equal keys."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from taskmoe.tests.wmt import support
from taskmoe.wmt.text import cleaning
from taskmoe.wmt.text.cleaning import first_of_each
from taskmoe.wmt.text.rows import Rows, encode, joined
from taskmoe.wmt.text.sampling import Schedule, permuted

SIDES = st.lists(st.integers(0, 5), max_size=12)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(lines=st.lists(st.tuples(SIDES, SIDES), max_size=30), cut=st.integers(0, 30))
def test_rows_hold_every_pair_by_length_in_its_order(lines: Any, cut: int) -> None:
    words = support.WORDS["en"], support.WORDS["de"]
    text = tuple(
        [" ".join(words[side][i] for i in line[side]) for line in lines] for side in (0, 1)
    )
    tokenizer, longest = support.tokenizer(), 9
    rows = encode("en-de", text, tokenizer, longest)
    sides = zip(
        tokenizer.encode_source(text[0], "de"), tokenizer.encode_target(text[1]), strict=True
    )
    every = [pair for pair in sides if max(map(len, pair)) <= longest]
    every.sort(key=lambda pair: max(map(len, pair)))
    assert rows.beyond == len(lines) - len(every)
    source, target = rows.read(np.arange(len(every)), longest + 2)
    for i, pair in enumerate(every):
        for found, tokens in zip((source[i], target[i]), pair, strict=True):
            assert found.tolist() == tokens + [0] * (longest + 2 - len(tokens))
    parts = [encode("en-de", (x[:cut], y[:cut]), tokenizer, longest) for x, y in [text]]
    parts += [encode("en-de", (x[cut:], y[cut:]), tokenizer, longest) for x, y in [text]]
    whole = joined(parts, longest, tokenizer.vocab_size)
    assert whole.digest() == rows.digest()
    backwards = every[::-1]
    backwards.sort(key=lambda pair: max(map(len, pair)))
    turned = encode("en-de", (text[0][::-1], text[1][::-1]), tokenizer, longest)
    assert (turned.digest() == rows.digest()) == (backwards == every)
    with pytest.raises(ValueError, match="tokens belong to these counts"):
        Rows(rows.counts + 1, rows.flat)


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(numbers=st.lists(st.integers(0, 30)), at_once=st.integers(1, 40))
def test_the_first_of_equal_keys_is_found_in_any_number_of_parts(
    numbers: list[int], at_once: int
) -> None:
    key = (np.array(numbers, np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cleaning, "_SORTED_AT_ONCE", at_once)
        found = first_of_each(key)
    assert found.tolist() == [x not in numbers[:i] for i, x in enumerate(numbers)]


def test_directions_of_any_size_come_as_their_temperature_says() -> None:
    """10,000 steps over 16 directions of very unequal size against p ~ size^(1/5), chi-square."""
    sizes = np.array([int(20_000 * 400 ** (i / 15)) for i in range(16)])
    buckets = np.array([[0.5], [0.3], [0.2]]) * sizes
    schedule = Schedule(buckets.astype(np.int64), [64, 32, 16], 5.0, 0)
    counts = np.zeros(16)
    for step in range(10_000):
        counts += schedule.shares(step)
    want = sizes**0.2 / (sizes**0.2).sum() * counts.sum()
    chi_square = float(((counts - want) ** 2 / want).sum())
    assert chi_square < 25.0  # 5% of independent draws would be above, with 15 degrees of freedom
    wrong = sizes**0.25 / (sizes**0.25).sum() * counts.sum()
    assert float(((counts - wrong) ** 2 / wrong).sum()) > 1000


def test_an_order_is_computed_and_not_kept() -> None:
    schedule = Schedule(np.array([[300_000_000]]), [8], 5.0, 0)
    drawn = np.concatenate([schedule.draw(step).sentence for step in range(200)])
    assert len(set(drawn.tolist())) == 1600
    assert drawn.min() < 30_000_000
    assert drawn.max() > 270_000_000


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 65537])
def test_an_order_has_every_number_once_and_each_place_takes_any(size: int) -> None:
    orders = [permuted(np.arange(size), size, (seed,)) for seed in range(600 if size < 20 else 2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(size))
    if size < 20:  # each number comes at each place as often as by chance, within 6 deviations
        for place in range(size):
            count = np.bincount([order[place] for order in orders], minlength=size)
            assert np.abs(count - 600 / size).max() <= 6 * (600 / size) ** 0.5
    else:  # and neighbours are strangers
        apart = np.abs(np.diff(orders[0]))
        assert abs(apart.mean() / size - 1 / 3) < 0.05
        assert not np.array_equal(orders[0], orders[1])
    part = np.arange(size)[:: max(1, size // 7)]
    np.testing.assert_array_equal(permuted(part, size, (0,)), orders[0][part])
