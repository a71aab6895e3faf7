"""Scores are sacreBLEU's, groups of directions are the paper's, and bootstrap tells luck apart."""

import sys

import numpy as np
import pytest
import sacrebleu
from sacrebleu.metrics import BLEU

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.text.scoring import (
    averages,
    check_tokenizer,
    compare,
    score,
    tokenizer,
    uncut,
)


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


@pytest.mark.parametrize(
    ("language", "cut_by"),
    [
        *((x, "zh") for x in ("zh", "zh_Hans", "zh_TW", "zho_Hant", "cmn", "yue")),
        *((x, "ja-mecab") for x in ("ja", "ja_JP", "jpn_Jpan")),
        *((x, "ko-mecab") for x in ("ko", "kor_Hang")),
        *((x, "intl") for x in ("de", "pt_BR", "th", "words")),
    ],
)
def test_each_language_is_cut_as_sacrebleu_cuts_it(language: str, cut_by: str) -> None:
    assert tokenizer(language) == cut_by
    primary = language[:2]
    wanted = BLEU._TOKENIZER_MAP.get(primary)
    assert wanted is None or wanted == cut_by
    assert uncut(f"en-{language}") == (language == "th")
    assert not uncut(f"en-{language}", "char")


def test_text_without_spaces_is_scored_by_its_words() -> None:
    for pair, line in (("en-ja", "これは新しい本です。"), ("en-zh_Hans", "这是一本新书。")):
        other = line.replace("新", "古")
        assert 0 < score(pair, [other] * 3, [line] * 3).bleu < 100
        assert score(pair, [other] * 3, [line] * 3, "intl").bleu == 0  # a sentence is a word
        assert f"tok:{tokenizer(pair[3:])}" in score(pair, [other], [line]).signature


def test_a_tokenizer_is_chosen_or_the_missing_package_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    references = support.sentences("de", 40)
    want = sacrebleu.corpus_bleu(references, [references[1:] + references[:1]])
    found = score("en-de", references, references[1:] + references[:1], "13a")
    assert found.bleu == want.score
    assert "tok:13a" in found.signature
    with pytest.raises(InputError, match="tokenizer must be one of none, zh, 13a"):
        check_tokenizer("en-de", "words")
    monkeypatch.setitem(sys.modules, "MeCab", None)
    sys.modules.pop("sacrebleu.tokenizers.tokenizer_ja_mecab", None)
    with pytest.raises(InputError, match=r"BLEU of en-ja: .*pip install 'sacrebleu\[ja\]'"):
        check_tokenizer("en-ja")


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
        "all with zero-shot": pytest.approx(37 / 4),
    }
    assert averages(scores)["all"] == pytest.approx(37 / 4)
    assert averages(scores)["xx→yy"] == 5.0
    assert not {"zero-shot", "all with zero-shot"} & set(averages(scores))


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
