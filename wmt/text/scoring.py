"""BLEU and chrF of translations with sacreBLEU, averages as papers report them, and bootstrap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import split_pair
from taskmoe.wmt.text.languages import primary

#: Of sacreBLEU, in the order of its documentation.
TOKENIZERS = tuple(BLEU.TOKENIZERS)
#: Chinese by other codes than zh: Mandarin, Cantonese, Wu, Min Nan, Hakka, Gan, Literary Chinese.
_CHINESE = {"zh", "cmn", "yue", "wuu", "nan", "hak", "gan", "lzh"}
#: Written without spaces, and sacreBLEU cuts none of them into words by itself.
_UNCUT = {"th", "lo", "km", "my", "bo", "dz"}


class Score(NamedTuple):
    """Scores of one direction.

    bleu, chrf: in [0, 100]. signature, chrf_signature: sacreBLEU's. sentences: how many.
    """

    bleu: float
    signature: str
    sentences: int
    chrf: float
    chrf_signature: str


class Comparison(NamedTuple):
    """Two systems on the same sentences.

    bleu, other: BLEU of the system and of the one beside it. p: share of paired bootstrap samples
      (Koehn 2004) whose difference lies further from the mean difference than the observed one
      from zero: small where the systems differ. samples: how many were drawn.
    """

    bleu: float
    other: float
    p: float
    samples: int


def score(
    pair: str,
    hypotheses: list[str],
    references: list[str],
    tokenize: str | None = None,
    more: Sequence[list[str]] = (),
) -> Score:
    """BLEU as in the paper (mixed case, smooth exp, see `tokenizer`), and chrF2.

    tokenize: one of sacreBLEU's tokenizers; None is the target language's. more: further
      references, each as many lines.
    Raises ValueError where the lists differ in length or are empty, and InputError where the
    tokenizer is not one of sacreBLEU's, or needs a package that is not there.
    """
    every = [references, *more]
    for one in every:
        _check(hypotheses, one)
    metric, chrf = _bleu(pair, tokenize), CHRF()
    bleu = float(metric.corpus_score(hypotheses, every).score)
    characters = float(chrf.corpus_score(hypotheses, every).score)
    return Score(
        bleu,
        str(metric.get_signature()),
        len(references),
        characters,
        str(chrf.get_signature()),
    )


def compare(
    pair: str,
    hypotheses: list[str],
    others: list[str],
    references: list[str],
    samples: int = 1000,
    tokenize: str | None = None,
    more: Sequence[list[str]] = (),
) -> Comparison:
    """Paired bootstrap between two systems' translations of the same sentences, by BLEU.

    Raises as `score` does.
    """
    _check(hypotheses, references)
    _check(others, references)
    systems = [("other", others), ("this", hypotheses)]  # the first is what is compared with
    test = PairedTest(
        systems,
        {"BLEU": _bleu(pair, tokenize)},
        [references, *more],
        test_type="bs",
        n_samples=samples,
    )
    _, results = test()
    other, this = results["BLEU"]
    return Comparison(float(this.score), float(other.score), float(this.p_value), samples)


def averages(
    scores: Mapping[str, float],
    *,
    trained: tuple[str, ...] | None = None,
    sizes: Mapping[str, int] | None = None,
    high_resource: int = 1_000_000,
) -> dict[str, float]:
    """Mean scores of groups of directions; groups without any are left out.

    trained: the directions that the model was trained on, None for all; others are "zero-shot" and
      in no other group but "all with zero-shot". "xx→yy": neither side is English.
    sizes: sentence pairs that each was trained on; with it those of at least `high_resource` and
      those below are groups.
    """
    seen = [p for p in scores if trained is None or p in trained]
    known = {p: sizes[p] for p in seen if p in sizes} if sizes else {}
    groups = {
        "all": seen,
        "en→xx": [p for p in seen if split_pair(p)[0] == "en"],
        "xx→en": [p for p in seen if split_pair(p)[1] == "en"],
        "xx→yy": [p for p in seen if "en" not in split_pair(p)],
        "high resource": [p for p, size in known.items() if size >= high_resource],
        "low resource": [p for p, size in known.items() if size < high_resource],
        "zero-shot": [p for p in scores if p not in seen],
        "all with zero-shot": list(scores) if len(seen) < len(scores) else [],
    }
    return {
        name: float(np.mean([scores[p] for p in pairs])) for name, pairs in groups.items() if pairs
    }


def tokenizer(language: str) -> str:
    """What cuts a language's text into words: sacreBLEU's choice, and intl, the paper's, elsewhere.

    That is zh for Chinese in every script and region, ja-mecab for Japanese, ko-mecab for Korean.
    """
    first = primary(language)
    return {"ja": "ja-mecab", "ko": "ko-mecab"}.get(first, "zh" if first in _CHINESE else "intl")


def uncut(pair: str, tokenize: str | None = None) -> bool:
    """Whether BLEU would take whole clauses for words: prefer chrF, or another tokenizer."""
    target = split_pair(pair)[1]
    return primary(target) in _UNCUT and (tokenize or tokenizer(target)) in ("intl", "13a", "none")


def check_tokenizer(pair: str, tokenize: str | None = None) -> None:
    """Raise InputError where the direction's text cannot be cut into words here."""
    _bleu(pair, tokenize)


def _bleu(pair: str, tokenize: str | None) -> BLEU:
    chosen = tokenize or tokenizer(split_pair(pair)[1])
    if chosen not in TOKENIZERS:
        raise InputError(f"tokenizer must be one of {', '.join(TOKENIZERS)}, got {chosen!r}")
    try:
        return BLEU(tokenize=chosen)
    except (ImportError, RuntimeError) as error:  # what it raises where a package is missing
        extra = f"'sacrebleu[{chosen[:2]}]'" if chosen.endswith("mecab") else "sentencepiece"
        raise InputError(
            f"BLEU of {pair}: tokenizer {chosen} needs a package that is not there; "
            f"pip install {extra}, or choose another with --tokenize"
        ) from error


def _check(hypotheses: list[str], references: list[str]) -> None:
    if len(hypotheses) != len(references) or not references:
        raise ValueError(
            "hypotheses and references must be equally many and not empty, "
            f"got {len(hypotheses)} and {len(references)}"
        )
