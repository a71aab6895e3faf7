"""Sentences that have ended leave the batch: what is found is what one program finds."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from taskmoe.tests.wmt import support
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model import decoding, translation
from taskmoe.wmt.model.beams import Batch, Search, Spread
from taskmoe.wmt.model.decoding import prepared, search_leaving, search_n_best
from taskmoe.wmt.model.transformer import Tasks
from taskmoe.wmt.model.translation import Decoding, translate
from taskmoe.wmt.text.tokenizer import EOS
from taskmoe.wmt.training.parallel import make_mesh, spread_model

VOCABULARY = 40
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "tie_embeddings": False}
CONFIG = support.model_config(encoder="token", decoder="sentence", **SIZES)
NO_TASKS = Tasks(None, None)


def sources(rows: int) -> np.ndarray:
    """Random sentences, the last one empty."""
    rng = np.random.default_rng(0)
    found = rng.integers(4, VOCABULARY, (rows, 8)).astype(np.int32)
    found[np.arange(8) >= rng.integers(2, 8, rows)[:, None]] = 0
    found[-1] = 0
    return found


def ending(config: ModelConfig) -> Any:
    """Parameters by which translations end early, late and not at all."""
    params = support.params(config)
    return params | {"softmax": params["softmax"].at[:, EOS].multiply(1.5)}


def both(
    params: Any, config: ModelConfig, how: Search, source: np.ndarray, tasks: Tasks = NO_TASKS
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """What one program finds, and what is found where sentences leave."""
    options = how._asdict()
    options |= options.pop("on")._asdict()
    whole = jax.jit(functools.partial(search_n_best, config=config, **options))
    want = whole(params, source=source, tasks=tasks)
    got = search_leaving(prepared(params, config, tasks), config, how, source, tasks)
    return (np.asarray(want[0]), np.asarray(want[1])), got


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sentences each part of a search had."""
    found: list[int] = []
    advance = decoding._advance

    def watched(params: Any, config: Any, how: Any, batch: Batch, at_most: int) -> Batch:
        found.append(batch.ended.shape[0])
        return advance(params, config, how, batch, at_most)

    monkeypatch.setattr(decoding, "_advance", watched)
    return found


@pytest.mark.parametrize(("beam", "n_best"), [(1, 1), (4, 1), (4, 3)])
@pytest.mark.parametrize("rows", [1, 11])
def test_what_is_found_is_what_one_program_finds(
    sizes: list[int], beam: int, n_best: int, rows: int
) -> None:
    how = Search(max_length=40, beam=beam, n_best=n_best)
    (ids, scores), (got_ids, got_scores) = both(ending(CONFIG), CONFIG, how, sources(rows))
    np.testing.assert_array_equal(got_ids, ids)
    np.testing.assert_allclose(got_scores, scores, rtol=1e-5, atol=1e-5)
    lengths = (ids[:, 0] != 0).sum(axis=1)
    assert rows == 1 or len({int(n) for n in lengths}) > 3  # they end at different positions
    assert sizes[0] == rows
    assert sizes == sorted(sizes, reverse=True)
    assert all(n == rows or n & (n - 1) == 0 for n in sizes)
    assert rows == 1 or sizes[-1] < rows


def test_a_wrong_sentence_that_stays_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: Callable[..., Batch] = decoding._moved

    def planted(batch: Batch, kept: Any, room: int) -> Batch:
        return moved(batch, None if kept is None else kept[::-1].copy(), room)

    monkeypatch.setattr(decoding, "_moved", planted)
    (ids, _), (got, _) = both(ending(CONFIG), CONFIG, Search(40, 4), sources(11))
    assert (got != ids).any()


def test_tasks_of_sentences_go_with_them(sizes: list[int]) -> None:
    config = support.model_config(**SIZES)
    source, each = sources(16), np.arange(16, dtype=np.int32) % 2
    of_one = Tasks(np.int32(1), np.int32(1))
    found = []
    for tasks in (Tasks(each, each), of_one):
        want, got = both(ending(config), config, Search(24, 3), source, tasks)
        np.testing.assert_array_equal(got[0], want[0])
        assert sizes[-1] < 16
        found.append(got[0])
    assert (found[0][::2] != found[1][::2]).any()
    np.testing.assert_array_equal(found[0][1::2], found[1][1::2])


def test_where_room_goes_by_the_batch_nothing_leaves(sizes: list[int]) -> None:
    """Fewer sentences would have less room at an expert, and others would be dropped."""
    config = support.model_config(encoder="dense", decoder="token", capacity_factor=0.5, **SIZES)
    want, got = both(ending(config), config, Search(24, 3), sources(8))
    np.testing.assert_array_equal(got[0], want[0])
    assert set(sizes) == {8}


@pytest.mark.parametrize("beam", [1, 4])
def test_over_a_mesh(sizes: list[int], beam: int) -> None:
    config = support.model_config(encoder="token", decoder="token", **(SIZES | {"num_experts": 8}))
    mesh = make_mesh(1, 8)
    params = ending(config)
    how = Search(24, beam, on=Spread(mesh, "auto"))
    want, got = both(spread_model(params, config, mesh), config, how, sources(16))
    np.testing.assert_array_equal(got[0], want[0])
    alone = search_leaving(prepared(params, config, NO_TASKS), config, Search(24, beam),
                           sources(16), NO_TASKS)  # fmt: skip
    np.testing.assert_array_equal(got[0], alone[0])
    np.testing.assert_allclose(got[1], alone[1], rtol=1e-5, atol=1e-5)
    assert sizes[-1] < 16


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="n_best must be in"):
        search_leaving({}, CONFIG, Search(8, 2, n_best=3), sources(2), NO_TASKS)


def test_how_batches_shrink_changes_no_translation() -> None:
    model = support.model()
    requests = support.text(4)
    lines = [(pair, line) for pair, (sources, _) in requests.items() for line in sources]
    found = [translate(model, lines, Decoding(beam=2, batch=4, shrink=n)) for n in (None, 1, 2, 4)]
    assert found[0] == found[1] == found[2] == found[3]
    with pytest.raises(ValueError, match="shrink must be a power of two, got 3"):
        Decoding(shrink=3)


def test_a_stream_shrinks_its_batches_once_it_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watched(*args: Any) -> Any:
        seen.append(args[-1])
        return search_leaving(*args)

    monkeypatch.setattr(translation, "search_leaving", watched)
    model, batch = support.model(), 4
    line = (support.PAIRS[0], support.text(1)[support.PAIRS[0]][0][0])
    for batches in (0, 16, 64):
        translate(model, [line], Decoding(batch=batch), before=batches * batch)
    assert seen == [1, 4, 2]
