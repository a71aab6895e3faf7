"""Scores are sacreBLEU's, groups of directions are the paper's, and bootstrap tells luck apart."""

import numpy as np
import pytest
import sacrebleu

from taskmoe.tests.wmt import support
from taskmoe.wmt.text.scoring import averages, compare, score


def test_scores_are_those_of_sacrebleu() -> None:
    references = support.sentences("de", 40)
    hypotheses = [line.replace("eins", "zwei") for line in references]
    found = score("en-de", hypotheses, references)
    want = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="intl")
    assert found.bleu == want.score
    assert 0 < found.bleu < 100
    assert found.chrf == sacrebleu.corpus_chrf(hypotheses, [references]).score
    assert "tok:intl" in found.signature
    assert "nc:6" in found.chrf_signature
    assert "tok:zh" in score("en-zh", ["猫 在 这里"], ["猫在这里"]).signature
    assert score("en-de", references, references).bleu == pytest.approx(100)


def test_averages_of_groups() -> None:
    scores = {"en-de": 10.0, "de-en": 20.0, "en-gu": 2.0, "fr-de": 5.0}
    means = averages(
        scores,
        trained=("en-de", "de-en", "en-gu"),
        sizes={"en-de": 2_000_000, "de-en": 1_000_000, "en-gu": 999_999},
    )
    assert means == {
        "all": pytest.approx(32 / 3),
        "en→xx": 6.0,
        "xx→en": 20.0,
        "high resource": 15.0,
        "low resource": 2.0,
        "zero-shot": 5.0,
    }
    assert averages(scores)["all"] == pytest.approx(37 / 4)
    assert "zero-shot" not in averages(scores)


def test_bootstrap_tells_a_difference_from_luck() -> None:
    references = support.sentences("de", 120)
    worse = [line.replace("eins", "zwei").replace("drei", "vier") for line in references]
    shaken = list(references)
    rng = np.random.default_rng(0)
    for i in rng.choice(len(shaken), 6, replace=False):
        shaken[i] = "sechs sechs"
    other = list(references)
    for i in rng.choice(len(other), 6, replace=False):
        other[i] = "sechs sechs"
    real = compare("en-de", references, worse, references, samples=200)
    assert real.bleu > real.other
    assert real.p < 0.05
    luck = compare("en-de", shaken, other, references, samples=200)
    assert luck.p > 0.05


def test_lists_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="equally many and not empty, got 1 and 2"):
        score("en-de", ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="got 0 and 0"):
        compare("en-de", [], [], [])
