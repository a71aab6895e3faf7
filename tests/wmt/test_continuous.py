"""Sentences come into a batch and leave it: what is found is what one program finds."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.tests.wmt import support
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model import continuous, translation
from taskmoe.wmt.model.beams import Batch, Search, Spread
from taskmoe.wmt.model.cache import Cache
from taskmoe.wmt.model.continuous import Keep, Sentences, prepared, search_many
from taskmoe.wmt.model.decoding import search_n_best
from taskmoe.wmt.model.quantization import quantized
from taskmoe.wmt.model.transformer import Tasks
from taskmoe.wmt.model.translation import Decoding, translate, translate_n_best
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


def ids_of(source: np.ndarray) -> list[list[int]]:
    return [[int(i) for i in row if i] for row in source]


def together(
    params: Any, config: ModelConfig, how: Search, sentences: Sentences, keep: Keep
) -> tuple[np.ndarray, np.ndarray]:
    """What `search_many` finds, in the sentences' order."""
    count = len(sentences.ids)
    ids = np.zeros((count, how.n_best, how.max_length), np.int32)
    scores = np.full((count, how.n_best), np.nan, np.float32)
    params = prepared(params, config, sentences.tasks)
    for names, found, own in search_many(params, config, how, sentences, keep):
        assert np.isnan(scores[names]).all()  # each ends once
        ids[names, :, : found.shape[2]] = found
        scores[names] = own
    return ids, scores


def mixed(count: int) -> Sentences:
    """Sentences of one to 40 tokens, the shortest first, each with a limit of its own."""
    rng = np.random.default_rng(1)
    lengths = np.sort(rng.integers(1, 41, count))
    ids = [rng.integers(4, VOCABULARY, n).tolist() for n in lengths]
    return Sentences(ids, [int(n) for n in 8 + lengths // 2 + rng.integers(0, 9, count)], NO_TASKS)


def one_by_one(
    params: Any, config: ModelConfig, how: Search, sentences: Sentences
) -> tuple[np.ndarray, np.ndarray]:
    """What one program finds of all, each with its limit."""
    source, tasks, limit = sentences.part(0, len(sentences.ids))
    options = {"max_length": how.max_length, "beam": how.beam, "n_best": how.n_best}
    whole = jax.jit(functools.partial(search_n_best, config=config, **options))
    ids, scores = whole(params, source=source, tasks=tasks, limit=limit)
    return np.asarray(ids), np.asarray(scores)


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sentences came into a batch that went on, each time; places of none count too."""
    found: list[int] = []
    joined = continuous._joined

    def watched(*args: Any) -> Batch:
        found.append(len(args[-1]))
        return joined(*args)

    monkeypatch.setattr(continuous, "_joined", watched)
    return found


def both(
    params: Any,
    config: ModelConfig,
    how: Search,
    source: np.ndarray,
    tasks: Tasks = NO_TASKS,
    keep: Keep | None = None,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """What one program finds, and what is found where sentences come and leave."""
    options = how._asdict()
    options |= options.pop("on")._asdict()
    del options["scored"]  # which this program always is
    whole = jax.jit(functools.partial(search_n_best, config=config, **options))
    want = whole(params, source=source, tasks=tasks)
    sentences = Sentences(ids_of(source), [how.max_length] * len(source), tasks)
    got = together(params, config, how, sentences, keep or Keep(len(source)))
    return (np.asarray(want[0]), np.asarray(want[1])), got


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sentences each part of a search had."""
    found: list[int] = []
    advance = continuous._advance

    def watched(params: Any, config: Any, how: Any, batch: Batch, at_most: int) -> Batch:
        found.append(batch.ended.shape[0])
        return advance(params, config, how, batch, at_most)

    monkeypatch.setattr(continuous, "_advance", watched)
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


@pytest.mark.parametrize("beam", [1, 3])
def test_greedy_search_without_scores_finds_the_same(beam: int) -> None:
    how = Search(max_length=40, beam=beam)
    (ids, scores), _ = both(ending(CONFIG), CONFIG, how, sources(7))
    sentences = Sentences(ids_of(sources(7)), [40] * 7, NO_TASKS)
    unscored = how._replace(scored=False)
    got_ids, got_scores = together(ending(CONFIG), CONFIG, unscored, sentences, Keep(7))
    np.testing.assert_array_equal(got_ids, ids)
    if beam == 1:
        assert (got_scores == 0).all()
    else:  # which has to know them
        np.testing.assert_allclose(got_scores, scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("beam", "n_best"), [(1, 1), (4, 2)])
@pytest.mark.parametrize(("rows", "factor"), [(1, 2), (5, 1), (16, 2)])
def test_sentences_that_come_later_are_found_as_alone(
    joins: list[int], sizes: list[int], beam: int, n_best: int, rows: int, factor: int
) -> None:
    sentences = mixed(29)
    how = Search(max_length=40, beam=beam, n_best=n_best)
    params = ending(CONFIG)
    ids, scores = one_by_one(params, CONFIG, how, sentences)
    got, got_scores = together(params, CONFIG, how, sentences, Keep(rows, factor))
    np.testing.assert_array_equal(got, ids)
    np.testing.assert_allclose(got_scores, scores, rtol=1e-5, atol=1e-5)
    if rows == 1:  # whoever comes next begins
        assert not joins
        return
    some = max(1, rows // 8)
    assert joins == [some] * -(-(29 - rows) // some)  # the last of them may be nobody's place
    assert (sizes[-1] == rows) == (factor == 1)


resized = Cache.resized


def unturned(cache: Cache, room: int) -> Cache:
    """The columns as they stand, whichever is the oldest."""
    turned = resized(cache._replace(column=jnp.int32(0)), room)
    return turned._replace(column=jnp.int32(min(cache.room, room) % room))


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("fault", [None, "old keys", "position", "ring", "limit"])
def test_a_sentence_that_comes_wrongly_is_seen(
    monkeypatch: pytest.MonkeyPatch, fault: str | None, beam: int
) -> None:
    start, seen = continuous.beams.start, Cache.seen

    def coming(*args: Any) -> Batch:
        batch = start(*args)
        if fault == "position" and not args[-1]:  # who joins, joins at another position
            return batch._replace(position=batch.position + 1)
        if fault == "limit":
            return batch._replace(limit=batch.limit[::-1])
        return batch

    monkeypatch.setattr(continuous.beams, "start", coming)
    if fault == "old keys":  # those of the sentence whose place it takes
        monkeypatch.setattr(Cache, "seen", lambda cache, position: seen(cache, position.max()))
    if fault == "ring":
        monkeypatch.setattr(Cache, "resized", unturned)
    jax.clear_caches()
    sentences, how, params = mixed(29), Search(40, beam), ending(CONFIG)
    got, scores = together(params, CONFIG, how, sentences, Keep(8))
    monkeypatch.undo()
    jax.clear_caches()
    want, true = one_by_one(params, CONFIG, how, sentences)
    right = (got == want).all() and np.allclose(scores, true, rtol=1e-4, atol=1e-4)
    assert right == (fault is None)


def test_int8_comes_later_too() -> None:
    config = support.model_config(encoder="dense", decoder="dense", **SIZES)
    sentences, how, params = mixed(29), Search(40, 4), quantized(ending(config))
    want, _ = one_by_one(params, config, how, sentences)
    got, _ = together(params, config, how, sentences, Keep(8))
    np.testing.assert_array_equal(got, want)


def test_a_wrong_sentence_that_stays_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    keep: Callable[..., Batch] = continuous._kept

    def planted(batch: Batch, kept: Any) -> Batch:
        return keep(batch, kept[::-1].copy())

    monkeypatch.setattr(continuous, "_kept", planted)
    (ids, _), (got, _) = both(ending(CONFIG), CONFIG, Search(40, 4), sources(11))
    assert (got != ids).any()


def test_tasks_of_sentences_go_with_them(sizes: list[int]) -> None:
    config = support.model_config(**SIZES)
    source, each = sources(16), np.arange(16, dtype=np.int32) % 2
    of_one = Tasks(np.int32(1), np.int32(1))
    found = []
    for tasks in (Tasks(each, each), of_one):
        want, got = both(ending(config), config, Search(24, 3), source, tasks, Keep(8))
        np.testing.assert_array_equal(got[0], want[0])
        assert sizes[-1] < 8
        found.append(got[0])
    assert (found[0][::2] != found[1][::2]).any()
    np.testing.assert_array_equal(found[0][1::2], found[1][1::2])


def test_where_room_goes_by_the_batch_none_come_or_leave(sizes: list[int]) -> None:
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
    where = spread_model(params, config, mesh)
    want, got = both(where, config, how, sources(16), keep=Keep(8))
    np.testing.assert_array_equal(got[0], want[0])
    sentences = Sentences(ids_of(sources(16)), [24] * 16, NO_TASKS)
    alone = together(params, config, Search(24, beam), sentences, Keep(8))
    np.testing.assert_array_equal(got[0], alone[0])
    np.testing.assert_allclose(got[1], alone[1], rtol=1e-5, atol=1e-5)
    assert sizes[-1] < 8


def test_what_does_not_fit_is_named() -> None:
    sentences = Sentences([[4, 3]], [9], NO_TASKS)
    with pytest.raises(ValueError, match="n_best must be in"):
        next(search_many({}, CONFIG, Search(8, 2, n_best=3), sentences, Keep(2)))
    with pytest.raises(ValueError, match=r"limits must be in \[1, 8\], got 9"):
        next(search_many({}, CONFIG, Search(8), sentences, Keep(2)))


def test_scores_are_left_out_where_nobody_sees_them() -> None:
    model = support.model()
    lines = [(p, line) for p, (sources, _) in support.text(3).items() for line in sources]
    greedy = Decoding(beam=1)
    scored = translate_n_best(model, lines, greedy)
    plain = translate_n_best(model, lines, greedy, scored=False)
    texts = [[h.text for h in best] for best in scored]
    assert texts == [[h.text for h in best] for best in plain]
    assert translate(model, lines, greedy) == [best[0] for best in texts]
    assert all(best[0].score < 0 for best in scored)
    assert all(best[0].score == 0 for best in plain)


@pytest.mark.parametrize("mixed_tasks", [False, True])
def test_translations_of_batches_that_are_kept_full(joins: list[int], mixed_tasks: bool) -> None:
    model = support.model()
    lines = [(p, line) for p, (sources, _) in support.text(11).items() for line in sources]
    lines = [*lines[::2], (lines[0][0], " "), *lines[1::2]]  # directions by turns, and an empty one
    found = []
    for batch in (1, 4, 64):
        seen: list[int] = []
        how = Decoding(beam=2, batch=batch, mixed_tasks=mixed_tasks)
        found.append(translate(model, lines, how, lambda done, _, seen=seen: seen.append(done)))
        assert seen == sorted(set(seen))
        assert seen[-1] == 33
        assert bool(joins) == (batch == 4)
        joins.clear()
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 4


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
        seen.append(args[-1].factor)
        return search_many(*args)

    monkeypatch.setattr(translation, "search_many", watched)
    model, batch = support.model(), 4
    line = (support.PAIRS[0], support.text(1)[support.PAIRS[0]][0][0])
    for batches in (0, 16, 64):
        translate(model, [line], Decoding(batch=batch), before=batches * batch)
    assert seen == [1, 4, 2]
