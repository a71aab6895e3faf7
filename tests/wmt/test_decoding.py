"""Greedy and beam search against a plain search that scores every short output."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.tests.wmt import support
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.cache import Cache
from taskmoe.wmt.model.decoding import search, search_n_best
from taskmoe.wmt.model.transformer import Tasks, decode, encode
from taskmoe.wmt.text.tokenizer import BOS, EOS, PAD

VOCABULARY = 7  # four special ids and three words: every output of four ids can be scored
LENGTH = 4
CONFIG = support.model_config(vocab_size=VOCABULARY, encoder="token", decoder="sentence")
SOURCE = np.array([[4, 5, 6, 3], [6, 3, 0, 0], [5, 5, 3, 0]], np.int32)
NO_TASKS = Tasks(None, None)


@functools.cache
def searcher(config: ModelConfig, beam: int, alpha: float, length: int) -> Any:
    def run(params: Any, source: Any, tasks: Tasks) -> Any:
        return search(params, config, source, tasks, max_length=length, beam=beam, alpha=alpha)

    return jax.jit(run)


def found(
    source: Any, beam: int, alpha: float = 0.6, seed: int = 0, length: int = LENGTH
) -> tuple[np.ndarray, np.ndarray]:
    run = searcher(CONFIG, beam, alpha, length)
    ids, score = run(support.params(CONFIG, seed), source, NO_TASKS)
    return np.asarray(ids), np.asarray(score)


@jax.jit
def teacher_forced(params: Any, source: Any, target_in: Any) -> Any:
    """Log probabilities of every next token, all positions at once."""
    valid = source != PAD
    memory, _ = encode(params, CONFIG, source, valid, None)
    every = jnp.ones(target_in.shape, bool)
    logits, _ = decode(params, CONFIG, memory, valid, target_in, every, None)
    return jax.nn.log_softmax(logits)


def penalty(length: int, alpha: float) -> float:
    return ((5 + length) / 6) ** alpha


@functools.cache
def every_output(seed: int, row: int) -> tuple[np.ndarray, np.ndarray]:
    """All [VOCABULARY**LENGTH, LENGTH] id sequences and each position's log probability."""
    outputs = np.array(list(itertools.product(range(VOCABULARY), repeat=LENGTH)), np.int32)
    inputs = np.concatenate([np.full((len(outputs), 1), BOS), outputs[:, :-1]], axis=1)
    source = np.repeat(SOURCE[row : row + 1], len(outputs), axis=0)
    log_probs = np.asarray(teacher_forced(support.params(CONFIG, seed), source, inputs))
    return outputs, np.take_along_axis(log_probs, outputs[..., None], axis=2)[..., 0]


def exhaustive(seed: int, row: int, alpha: float) -> tuple[list[int], float]:
    """The best of all outputs that end within LENGTH, by log p over the length penalty."""
    outputs, log_probs = every_output(seed, row)
    best: tuple[list[int], float] = ([], -np.inf)
    for ids, steps in zip(outputs, log_probs, strict=True):
        if EOS in ids:
            end = int(np.argmax(ids == EOS)) + 1
            score = float(steps[:end].sum()) / penalty(end, alpha)
            if score > best[1]:
                best = [*map(int, ids[:end])] + [PAD] * (LENGTH - end), score
    return best


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_wide_beam_finds_the_best_of_all_outputs(seed: int, alpha: float) -> None:
    ids, score = found(SOURCE, VOCABULARY**3, alpha, seed)
    for row in range(3):
        want, best = exhaustive(seed, row, alpha)
        assert ids[row].tolist() == want
        assert abs(score[row] - best) < 1e-4


@pytest.mark.parametrize("seed", [0, 1])
def test_the_n_best_are_the_best_of_all_outputs_in_their_order(seed: int) -> None:
    beam = VOCABULARY**3

    def run(params: Any, source: Any) -> Any:
        options: Any = {"max_length": LENGTH, "beam": beam, "n_best": 5}
        return search_n_best(params, CONFIG, source, NO_TASKS, **options)

    ids, scores = jax.jit(run)(support.params(CONFIG, seed), SOURCE)
    assert ids.shape == (3, 5, LENGTH)
    for row in range(3):
        outputs, log_probs = every_output(seed, row)
        ranked: dict[tuple[int, ...], float] = {}
        for output, steps in zip(outputs, log_probs, strict=True):
            if EOS in output:
                end = int(np.argmax(output == EOS)) + 1
                text = (*map(int, output[:end]), *[PAD] * (LENGTH - end))
                ranked[text] = float(steps[:end].sum()) / penalty(end, 0.6)
        want = sorted(ranked, key=lambda text: -ranked[text])[:5]
        assert [tuple(map(int, found)) for found in ids[row]] == want
        np.testing.assert_allclose(scores[row], [ranked[text] for text in want], atol=1e-4)


def test_the_length_penalty_changes_what_is_best() -> None:
    """Else the test above would not notice a wrong penalty."""
    best = [[exhaustive(seed, row, a) for a in (0.0, 2.0)] for seed in range(3) for row in range(3)]
    assert any(short[0] != long[0] for short, long in best)
    assert all(short[1] < long[1] for short, long in best if PAD not in long[0])


def test_greedy_takes_the_likeliest_token_each_time() -> None:
    ids, score = found(SOURCE, 1, length=8)
    for row in range(3):
        so_far, total = [BOS], 0.0
        for _ in range(8):
            padded = np.array([so_far + [PAD] * (8 - len(so_far))], np.int32)
            log_probs = teacher_forced(support.params(CONFIG), SOURCE[row : row + 1], padded)
            step = np.asarray(log_probs)[0, len(so_far) - 1]
            so_far.append(int(step.argmax()))
            total += float(step.max())
            if so_far[-1] == EOS:
                break
        assert ids[row].tolist() == so_far[1:] + [PAD] * (9 - len(so_far))
        assert abs(score[row] - total) < 1e-4


def log_probability(row: int, ids: np.ndarray, seed: int, alpha: float) -> float:
    end = int(np.argmax(ids == EOS)) + 1 if EOS in ids else len(ids)
    inputs = np.array([[BOS, *ids[:-1]]], np.int32)
    log_probs = np.asarray(
        teacher_forced(support.params(CONFIG, seed), SOURCE[row : row + 1], inputs)
    )
    return float(log_probs[0, np.arange(end), ids[:end]].sum()) / penalty(end, alpha)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_beam_is_no_worse_than_greedy_and_scores_are_true(seed: int) -> None:
    greedy, _ = found(SOURCE, 1, seed=seed, length=8)
    wide, score = found(SOURCE, 4, seed=seed, length=8)
    for row in range(3):
        ours = log_probability(row, wide[row], seed, 0.6)
        assert abs(ours - score[row]) < 1e-4
        if EOS in greedy[row]:
            assert ours >= log_probability(row, greedy[row], seed, 0.6) - 1e-4


@pytest.mark.parametrize("beam", [1, 4])
def test_padding_rows_end_at_once_and_mates_change_nothing(beam: int) -> None:
    want, scores = found(SOURCE, beam, length=8)
    mixed = np.stack([np.zeros(4, np.int32), SOURCE[1], SOURCE[0]])
    ids, score = found(mixed, beam, length=8)
    assert not ids[0].any()
    assert score[0] == 0
    np.testing.assert_array_equal(ids[1:], want[[1, 0]])
    np.testing.assert_allclose(score[1:], scores[[1, 0]], atol=1e-5)


def test_scalar_tasks_run_as_their_sub_network() -> None:
    config = support.model_config(vocab_size=VOCABULARY)
    params = support.params(config)
    run = searcher(config, 2, 0.6, 6)
    for task in range(2):
        scalar = run(params, SOURCE, Tasks(np.int32(task), np.int32(task)))
        each = run(params, SOURCE, Tasks(*[np.full(3, task, np.int32)] * 2))
        np.testing.assert_array_equal(scalar[0], each[0])
        np.testing.assert_allclose(scalar[1], each[1], atol=1e-5)
    other = run(params, SOURCE, Tasks(np.int32(2), np.int32(2)))
    assert np.abs(other[1] - scalar[1]).max() > 1e-3


@pytest.mark.parametrize(("beam", "n_best"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("ends", [True, False])
def test_a_sentence_with_a_limit_is_found_as_alone_with_it(
    ends: bool, beam: int, n_best: int
) -> None:
    most, params = 8, support.params(CONFIG, 0)
    if not ends:  # with a `</s>` that is never likely, the best is a live one
        params = params | {"embedding": params["embedding"].at[EOS].set(0)}

    def run(source: Any, length: int, limit: Any) -> Any:
        # With so large a penalty long ones are best.
        options: Any = {"max_length": length, "beam": beam, "n_best": n_best, "alpha": 4.0}
        find = functools.partial(search_n_best, params, CONFIG, tasks=NO_TASKS, **options)
        return jax.jit(find)(source, limit=limit)

    limits = np.array([2, 5, 8], np.int32)
    ids, scores = run(SOURCE, most, limits)
    free, _ = run(SOURCE, most, None)
    assert (np.asarray(ids[0]) != np.asarray(free[0])).any()  # the limit is felt
    for row, limit in enumerate(limits):
        alone, score = run(SOURCE[row : row + 1], int(limit), None)
        np.testing.assert_array_equal(ids[row, :, :limit], alone[0])
        assert not np.asarray(ids[row, :, limit:]).any()
        np.testing.assert_allclose(scores[row], score[0], rtol=1e-5)


@pytest.mark.parametrize("fault", [False, True])
def test_a_long_search_finds_what_it_finds_without_a_cache(
    fault: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scores are those of all positions at once, though hypotheses change places."""
    if fault:  # each hypothesis goes on from what stands at its own place
        monkeypatch.setattr(Cache, "inherited", lambda self, _: self)
    params = support.params(CONFIG, 1)
    params = params | {"embedding": params["embedding"].at[EOS].multiply(0.3)}
    options: Any = {"max_length": 44, "beam": 4, "n_best": 4, "alpha": 2.0}
    find = functools.partial(search_n_best, params, CONFIG, tasks=NO_TASKS, **options)
    ids, scores = map(np.asarray, jax.jit(find)(SOURCE))
    assert (ids != PAD).sum(2).max() > 22  # to the last of the stages
    worst = 0.0
    for row in range(3):
        for output, score in zip(ids[row], scores[row], strict=True):
            if score < -1e8:
                continue
            end = int(np.argmax(output == EOS)) + 1 if EOS in output else len(output)
            inputs = np.array([[BOS, *output[:-1]]], np.int32)
            log_probs = np.asarray(teacher_forced(params, SOURCE[row : row + 1], inputs))
            true = log_probs[0, np.arange(end), output[:end]].sum() / penalty(end, 2.0)
            worst = max(worst, abs(float(true) - float(score)))
    assert (worst > 1e-2) if fault else (worst < 1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"beam": 0},
        {"max_length": 0},
        {"alpha": -1.0},
        {"alpha": float("nan")},
        {"n_best": 2},
        {"n_best": 0},
    ],
)
def test_what_does_not_fit_is_named(wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"got .*{next(iter(wrong))}={next(iter(wrong.values()))}"):
        search_n_best({}, CONFIG, jnp.asarray(SOURCE), NO_TASKS, **({"max_length": 4} | wrong))
