"""Intervals are those of a plain loop over resampled texts, and systems are drawn alike."""

import itertools

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from taskmoe.bench.story.study import bootstrap
from taskmoe.tests.kernels.support import planted
from taskmoe.tests.wmt import support

PAIRS = ("en-de", "en-fr")


def translated(wrong: int, seed: int = 0, count: int = 40) -> dict[str, list[str]]:
    """Test text of both directions with so many sentences that begin otherwise."""
    out = {}
    for pair in PAIRS:
        out[pair] = support.sentences(pair[3:], count)
        for i in np.random.default_rng(seed).permutation(count)[:wrong]:
            out[pair][i] = "un huit " + out[pair][i]
    return out


TEXT = translated(0)


def counted(lines: dict[str, list[str]]) -> bootstrap.Counts:
    return {pair: bootstrap.count(pair, lines[pair], TEXT[pair]) for pair in PAIRS}


def test_the_sums_give_the_score_of_the_text() -> None:
    for wrong in (0, 7, 40):
        lines = translated(wrong)
        for pair, counts in counted(lines).items():
            want = BLEU(tokenize="intl").corpus_score(lines[pair], [TEXT[pair]]).score
            assert bootstrap.bleu(counts.sum(axis=0)) == want
    none = bootstrap.count("en-de", ["x", ""], ["eins zwei", "drei"])
    want = BLEU(tokenize="intl").corpus_score(["x", ""], [["eins zwei", "drei"]]).score
    assert bootstrap.bleu(none.sum(axis=0)) == want == 0


def test_chinese_is_counted_by_its_own_words() -> None:
    want = BLEU(tokenize="zh").corpus_score(["这是一本新书。"], [["这是一本古书。"]]).score
    counts = bootstrap.count("en-zh", ["这是一本新书。"], ["这是一本古书。"])
    assert bootstrap.bleu(counts.sum(axis=0)) == want > 0


def test_samples_are_those_of_a_plain_loop() -> None:
    """Mean over directions and seeds of the score of each text that was drawn."""
    seeds = [translated(9, seed) for seed in (1, 2)]
    found = bootstrap.resampled([counted(lines) for lines in seeds])
    assert found.shape == (bootstrap.SAMPLES,)
    times = bootstrap.drawn(40).astype(int)
    assert (times.sum(axis=1) == 40).all()
    for sample in (0, 1, 999):
        rows = np.repeat(np.arange(40), times[sample])
        want = [
            BLEU(tokenize="intl")
            .corpus_score([lines[pair][i] for i in rows], [[TEXT[pair][i] for i in rows]])
            .score
            for lines, pair in itertools.product(seeds, PAIRS)
        ]
        np.testing.assert_allclose(found[sample], np.mean(want), rtol=1e-12)


def paired() -> tuple[bootstrap.Interval | None, bootstrap.Interval | None]:
    """Of a system over its twin, and over one that has fewer of its own mistakes."""
    lines = {"dense": translated(9), "token": translated(9), "target": translated(8)}
    levels = {name: bootstrap.resampled([counted(each)]) for name, each in lines.items()}
    assert levels["dense"].std() > 1  # the text matters
    twin, better = (bootstrap.difference(levels, name, "dense") for name in ("token", "target"))
    return twin, better


def test_systems_are_drawn_alike() -> None:
    def check() -> None:
        twin, better = paired()
        assert twin == bootstrap.Interval(0.0, 0.0)
        assert better is not None
        assert better.low >= 0

    check()
    random = np.random.default_rng(1)

    def unpaired(sentences: int) -> np.ndarray:  # each asks for sentences of its own
        even = np.full(sentences, 1 / sentences)
        return random.multinomial(sentences, even, bootstrap.SAMPLES).astype(np.float64)

    with planted(bootstrap, "drawn", unpaired), pytest.raises(AssertionError):
        check()


def test_intervals_hold_what_they_promise() -> None:
    """Of many texts, the interval has the true difference in about 95 of 100."""
    random, held, texts = np.random.default_rng(0), 0, 60
    # A word of a sentence is right with 0.9 or 0.8; a long text has the true difference.
    right = [random.random((20_000, 6)) < chance for chance in (0.9, 0.8)]
    word = np.array(["eins", "zwei", "drei", "vier", "fünf", "sechs"])

    def runs(rows: np.ndarray) -> list[bootstrap.Counts]:
        wanted = [" ".join(word)] * len(rows)
        lines = [[" ".join(np.where(r, word, "x")) for r in system[rows]] for system in right]
        return [{"en-de": bootstrap.count("en-de", ours, wanted)} for ours in lines]

    def gap(each: list[bootstrap.Counts]) -> float:
        good, bad = (bootstrap.bleu(run["en-de"].sum(axis=0)) for run in each)
        return good - bad

    true = gap(runs(np.arange(8000)))
    for text in range(texts):
        each = runs(8000 + 100 * text + np.arange(100))
        interval = bootstrap.Interval.of(np.subtract(*(bootstrap.resampled([r]) for r in each)))
        held += interval.low <= true <= interval.high
    assert 0.85 * texts <= held < texts


def test_shares_of_a_gain() -> None:
    dense = np.linspace(10, 20, bootstrap.SAMPLES)
    levels = {"dense": dense, "distilled": dense + 1, "token": dense + 2, "target": dense + 4}
    found = bootstrap.shares(levels)
    assert found is not None
    assert found.samples == bootstrap.SAMPLES
    for interval, want in ((found.kept_of_teacher, 50), (found.kept_of_task_moe, 25)):
        assert interval is not None
        assert (interval.low, interval.high) == (pytest.approx(want), pytest.approx(want))
    nothing = bootstrap.shares(levels | {"token": dense[::-1]})
    assert nothing is not None
    assert nothing.kept_of_teacher is None
    assert bootstrap.shares({}) is None
