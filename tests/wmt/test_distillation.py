"""A student starts from its teacher's weights and learns what the teacher writes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.model.saved import Model
from taskmoe.wmt.model.shortlist import shortlist_of
from taskmoe.wmt.model.transformer import param_count
from taskmoe.wmt.model.translation import Decoding, translate
from taskmoe.wmt.training import distillation
from taskmoe.wmt.training.distillation import (
    gain_kept,
    student_config,
    student_params,
    teacher_text,
)

CONFIG = support.model_config(encoder="token", decoder="token")
TEACHER = Model(support.params(CONFIG, 3), CONFIG, support.tokenizer())
SOURCES = {"en-de": support.sentences("en", 7), "en-fr": support.sentences("en", 5, seed=2)}
GREEDY = Decoding(max_length=12)


def test_a_student_has_no_mixture_and_its_teachers_other_weights() -> None:
    config = student_config(TEACHER.config, ("en-de",))
    assert (config.encoder, config.decoder, config.pairs) == ("dense", "dense", ("en-de",))
    params, taken = student_params(TEACHER.params, config, seed=5)
    np.testing.assert_array_equal(params["embedding"], TEACHER.params["embedding"])
    ours, theirs = (p["decoder"][1]["cross"]["kv"] for p in (params, TEACHER.params))
    np.testing.assert_array_equal(ours, theirs)
    fresh = [params[side][1]["feed_forward"]["ffn"] for side in ("encoder", "decoder")]
    width = config.d_ff * config.d_model
    assert fresh[0].w_in.size == width
    assert taken == param_count(params) - 4 * width
    assert np.abs(fresh[0].w_in).sum() > 0


def test_a_teachers_text_is_what_it_translates_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "_CHUNK", 3)
    seen: list[tuple[int, int]] = []
    text = teacher_text(tmp_path, TEACHER, SOURCES, GREEDY, lambda *at: seen.append(at))
    assert seen == [(3, 12), (6, 12), (7, 12), (10, 12), (12, 12)]
    assert not any(set("\r\n") & set(line) for _, lines in text.values() for line in lines)
    for pair, (sources, targets) in text.items():
        assert targets == translate(TEACHER, [(pair, line) for line in sources], GREEDY)
    # What is there is not translated again.
    (tmp_path / "en-de.00000003.txt").write_text("eins\nzwei\ndrei\n", encoding="utf-8")
    (tmp_path / "en-fr.00000000.txt").unlink()
    again = teacher_text(tmp_path, TEACHER, SOURCES, GREEDY)
    assert {"eins", "zwei", "drei"} <= set(again["en-de"][1])
    assert again["en-fr"] == text["en-fr"]
    (tmp_path / "en-de.00000003.txt").write_text("eins\n", encoding="utf-8")
    with pytest.raises(InputError, match="has 1 lines, should have 3"):
        teacher_text(tmp_path, TEACHER, SOURCES, GREEDY)


def test_translations_of_something_else_are_not_used(tmp_path: Path) -> None:
    few = {"en-de": ["one two"]}
    teacher_text(tmp_path, TEACHER, few, GREEDY)
    for teacher, sources, how in (
        (TEACHER, {"en-de": ["two one"]}, GREEDY),
        (TEACHER, few, Decoding(beam=2)),
        (TEACHER, few, dataclasses.replace(GREEDY, shortlist=shortlist_of({}, TEACHER.tokenizer))),
        (support.model(encoder="token", decoder="token", num_experts=8), few, GREEDY),
    ):
        with pytest.raises(InputError, match="translations of another teacher, of other sentences"):
            teacher_text(tmp_path, teacher, sources, how)
    (tmp_path / "translations.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        teacher_text(tmp_path, TEACHER, few, GREEDY)


def test_shares_of_gain_with_both_denominators() -> None:
    """The paper's averages over 8 pairs: 43% of the token-MoE's gain, 32% of the task-MoE's."""
    gain = gain_kept(dense=25.9, teacher=28.2, student=26.9, task_moe=29.0)
    assert round(gain.of_teacher) == 43
    assert gain.of_task_moe is not None
    assert round(gain.of_task_moe) == 32
    assert gain_kept(1.0, 2.0, 1.5, None).of_task_moe is None
    assert gain_kept(2.0, 2.0, 3.0, None).of_teacher is None
