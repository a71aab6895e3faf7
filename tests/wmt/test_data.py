"""Reading parallel text, refusing what is wrong, and batches that depend on the step alone."""

import dataclasses
import functools
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.text.data import Batch, TrainingData, read_pairs
from taskmoe.wmt.text.folders import Folder
from taskmoe.wmt.text.pipeline import BatchIterator
from taskmoe.wmt.text.sampling import Draw, Schedule
from taskmoe.wmt.text.tokenizer import BOS, EOS, PAD


def write(folder: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name.replace("__", "-").replace("_", ".")).write_bytes(data)
    return folder


def test_multi_parallel_files_serve_every_direction(tmp_path: Path) -> None:
    write(tmp_path, train_en="a\nb\n", train_de="x\ny\n", train_fr="p\nq")
    found = read_pairs(tmp_path, "train", ("en-de", "fr-en"))
    assert found == {"en-de": (["a", "b"], ["x", "y"]), "fr-en": (["p", "q"], ["a", "b"])}
    assert Folder(tmp_path).pairs("train") == [
        "de-en", "de-fr", "en-de", "en-fr", "fr-de", "fr-en",
    ]  # fmt: skip


def test_pair_files_serve_both_directions_and_validation_has_three_names(tmp_path: Path) -> None:
    write(tmp_path, val_en__de_en="a\n", val_en__de_de="x\n")
    assert Folder(tmp_path).pairs("valid") == ["de-en", "en-de"]
    assert read_pairs(tmp_path, "valid", ("de-en",)) == {"de-en": (["x"], ["a"])}


def test_lines_are_what_newlines_part_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, train_en="a\u2028b\r\n\nc\nd\n", train_de=" x \ny\n\nz\n")
    assert read_pairs(tmp_path, "train", ("en-de",))["en-de"] == (["a\u2028b", "d"], ["x", "z"])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data folder .*nowhere is not there"):
        read_pairs(tmp_path / "nowhere", "train", ("en-de",))


def test_unequal_files_are_named_with_their_counts(tmp_path: Path) -> None:
    write(tmp_path, train_en="a\nb\nc\n", train_de="x\ny\n")
    with pytest.raises(InputError, match=r"train\.en has 3 lines but .*train\.de has 2"):
        read_pairs(tmp_path, "train", ("en-de",))


def test_an_unknown_pair_is_named_with_those_there_are(tmp_path: Path) -> None:
    write(tmp_path, train_en="a\n", train_de="x\n")
    with pytest.raises(InputError, match=r"no train files for pair en-xx .*it has de-en, en-de"):
        read_pairs(tmp_path, "train", ("en-xx",))


def test_invalid_utf8_is_named_with_file_and_line(tmp_path: Path) -> None:
    write(tmp_path, train_en="a\nb\n", train_de=b"x\n\xff\xfe\n")
    with pytest.raises(InputError, match=r"train\.de, line 2: not valid UTF-8"):
        read_pairs(tmp_path, "train", ("en-de",))


def test_files_without_a_sentence_pair(tmp_path: Path) -> None:
    write(tmp_path, train_en="\na\n", train_de="x\n\n")
    with pytest.raises(InputError, match="it holds no sentence pair"):
        read_pairs(tmp_path, "train", ("en-de",))


def data(**fields: object) -> TrainingData:
    text = support.text()
    source, target = text["en-fr"]
    text["en-fr"] = (source[:10], target[:10])  # 200, 200 and 10 sentences
    return TrainingData.encoded(text, support.tokenizer(), support.train_config(**fields))


def shares(training: TrainingData, steps: int = 300) -> np.ndarray:
    pairs = np.concatenate([training.batch(step).pair for step in range(steps)])
    return np.bincount(pairs, minlength=3) / len(pairs)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_directions_are_drawn_with_size_to_the_power_of_1_over_T(temperature: float) -> None:
    training = data(temperature=temperature, buckets=(8, 12, 40))
    assert not any(training.too_long.values())
    want = np.array([200.0, 200.0, 10.0]) ** (1 / temperature)
    found = shares(training)
    np.testing.assert_allclose(found, want / want.sum(), atol=0.02)
    other = np.array([200.0, 200.0, 10.0]) ** (1 / (6 - temperature))
    assert np.abs(found - other / other.sum()).max() > 0.05


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    first, second = data(), data()
    for step in (0, 7, 123456):
        for a, b in zip(first.batch(step), second.batch(step), strict=True):
            np.testing.assert_array_equal(a, b)
    assert (first.batch(0).source != first.batch(1).source).any()
    assert (first.batch(0).source != data(seed=1).batch(0).source).any()


def test_a_batch_holds_sentence_pairs_of_its_directions() -> None:
    training, tokenizer = data(), support.tokenizer()
    text = {pair: set(zip(*sides, strict=True)) for pair, sides in support.text().items()}
    batch = training.batch(3)
    assert batch.source.shape == batch.target_in.shape == batch.target_out.shape == (16, 16)
    assert all(part.dtype == np.int32 for part in batch)
    for row, index in enumerate(batch.pair):
        pair = support.PAIRS[index]
        source = [int(t) for t in batch.source[row] if t != PAD]
        target = [int(t) for t in batch.target_out[row] if t != PAD]
        assert source[0] == tokenizer.encode_source([""], pair.split("-")[1])[0][0]
        assert source[-1] == target[-1] == EOS
        sides = tokenizer.decode([source[1:-1], target[:-1]])
        assert tuple(sides) in text[pair]
        shifted = [BOS, *batch.target_out[row][:-1]]
        np.testing.assert_array_equal(batch.target_in[row], shifted)


def batches_equal(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# Sampling


def draws(sizes: list[list[int]], rows: list[int], steps: int, seed: int = 0) -> list[Draw]:
    schedule = Schedule(np.array(sizes), rows, 5.0, seed)
    return [schedule.draw(step) for step in range(steps)]


def seen_per_epoch(drawn: list[Draw], bucket: int, pair: int, size: int) -> list[np.ndarray]:
    """How often each sentence came, for each run of `size` draws of a bucket and direction.

    Rows of a batch stand in any order, so an epoch's end is known to within a batch only: those
    that came too early are counted where they came.
    """
    order = [d.sentence[d.pair == pair] for d in drawn if d.bucket == bucket]
    flat = np.concatenate(order)
    cuts = range(size, len(flat) + 1, size)
    return [np.bincount(flat[:cut], minlength=size) for cut in cuts]


def spread(drawn: list[Draw], size: int) -> int:
    """Largest difference between how often two sentences came, at the end of any epoch."""
    return max(int(np.ptp(count)) for count in seen_per_epoch(drawn, 0, 0, size))


def test_every_sentence_comes_once_before_any_comes_again() -> None:
    # Epochs of 12 draws end where batches of 4 do: there counts are equal to the last one.
    drawn = draws([[12]], [4], 30)
    assert spread(drawn, 12) == 0
    # Drawing with replacement, which this is not, would be noticed.
    rng = np.random.default_rng(0)
    replaced = [d._replace(sentence=rng.integers(0, 12, 4)) for d in drawn]
    assert spread(replaced, 12) > 1
    first, second = (np.concatenate([d.sentence for d in drawn[i : i + 3]]) for i in (0, 3))
    assert not np.array_equal(first, second)  # each epoch has its own order


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    sizes=st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=3),
    rows=st.integers(1, 24),
    seed=st.integers(0, 3),
)
def test_counts_of_draws_differ_by_one_at_most(
    sizes: list[list[int]], rows: int, seed: int
) -> None:
    if not np.sum(sizes):
        with pytest.raises(ValueError, match="no sentence to draw"):
            Schedule(np.array(sizes), [rows] * len(sizes), 5.0, seed)
        return
    drawn = draws(sizes, [rows] * len(sizes), 40, seed)
    assert all(len(d.pair) == len(d.sentence) == rows for d in drawn)
    for bucket, row in enumerate(sizes):
        for pair, size in enumerate(row):
            own = [d.sentence[d.pair == pair] for d in drawn if d.bucket == bucket]
            flat = np.concatenate([*own, np.zeros(0, np.int64)])
            count = np.bincount(flat, minlength=max(size, 1))
            assert len(count) == max(size, 1)  # no number beyond the last sentence
            assert np.ptp(count) <= 1
            if not size:
                assert not len(flat)


def test_a_batch_has_each_direction_in_its_expected_number_rounded_up_or_down() -> None:
    drawn = draws([[1000, 1000, 50]], [32], 200)
    share = np.array([1000, 1000, 50]) ** 0.2
    expected = share / share.sum() * 32
    counts = np.array([np.bincount(d.pair, minlength=3) for d in drawn])
    assert (np.abs(counts - expected) < 1).all()
    np.testing.assert_allclose(counts.mean(axis=0), expected, atol=0.1)
    wrong = np.array([1000, 1000, 50]) / 2050 * 32  # p ~ size
    assert (np.abs(counts - wrong) > 1).any()


def test_draws_do_not_depend_on_what_was_asked_before() -> None:
    sizes, rows = np.array([[30, 7], [5, 50]]), [6, 3]
    steps = [0, 1, 2, 5000, 1023, 1024, 1025, 3, 4999, 5000, 0]
    asked = Schedule(sizes, rows, 5.0, 1)
    for step in steps:
        a, b = asked.draw(step), Schedule(sizes, rows, 5.0, 1).draw(step)
        assert a.bucket == b.bucket
        np.testing.assert_array_equal(a.pair, b.pair)
        np.testing.assert_array_equal(a.sentence, b.sentence)


# Shards and the iterator


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_make_up_the_global_batch(count: int) -> None:
    training = data(buckets=(8, 16))
    for step in range(6):
        whole = training.batch(step)
        parts = [training.batch(step, (i, count)) for i in range(count)]
        assert len({part.source.shape for part in parts}) == 1
        joined = Batch(*(np.concatenate(sides) for sides in zip(*parts, strict=True)))
        assert batches_equal(whole, joined)
        turned = Batch(*(np.concatenate(sides[::-1]) for sides in zip(*parts, strict=True)))
        assert batches_equal(whole, turned) == (count == 1)


def test_rows_that_cannot_be_shared_evenly_are_an_error_that_says_what_would_fit() -> None:
    training = data(buckets=(16,))  # 16 rows
    with pytest.raises(InputError, match=r"bucket 16 has 16 sentences, which 3 .* row_multiple=3"):
        training.iterator(0, (0, 3))
    with pytest.raises(ValueError, match=r"shard must be \(i, n\) with 0 <= i < n"):
        training.batch(0, (2, 2))
    fitting = data(buckets=(16,), row_multiple=3)
    assert fitting.config.batch_rows(16) == 15
    assert fitting.batch(0, (2, 3)).source.shape == (5, 16)
    with pytest.raises(ValueError, match=r"batch_tokens must hold row_multiple.*=32 pairs"):
        data(buckets=(16,), row_multiple=32)


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(stop=st.integers(0, 30), more=st.integers(1, 5), shard=st.sampled_from([0, 1]))
def test_a_run_that_is_resumed_at_any_step_sees_the_same_batches(
    stop: int, more: int, shard: int
) -> None:
    training = shared_data()
    with training.iterator(0, (shard, 2)) as first:
        for _ in range(stop):
            next(first)
        state = first.get_state()
        expected = [next(first) for _ in range(more)]
    assert first.step == stop + more
    with data(buckets=(8, 16)).iterator(0, (shard, 2)) as second:
        next(second)
        second.set_state(state)
        assert second.step == stop
        found = [next(second) for _ in range(more)]
    with training.iterator(stop, (shard, 2)) as third:
        again = [next(third) for _ in range(more)]
    with training.iterator(stop + 1, (shard, 2)) as late:
        shifted = [next(late) for _ in range(more)]
    for step, (a, b, c, d) in enumerate(zip(expected, found, again, shifted, strict=True), stop):
        assert batches_equal(a, training.batch(step, (shard, 2)))
        assert batches_equal(a, b)
        assert batches_equal(a, c)
        assert not batches_equal(a, d)


@functools.cache
def shared_data() -> TrainingData:
    return data(buckets=(8, 16))


def test_a_state_of_another_text_is_refused() -> None:
    text = support.text()
    text["en-de"][1][0] += " eins"
    other = TrainingData.encoded(text, support.tokenizer(), support.train_config())
    same = TrainingData.encoded(support.text(), support.tokenizer(), support.train_config())
    with same.iterator(3) as iterator, other.iterator() as refusing:
        state = iterator.get_state()
        with pytest.raises(InputError, match="the training text is another than when"):
            refusing.set_state(state)
        iterator.set_state(state)
    swapped = {pair: support.text()[pair] for pair in reversed(support.PAIRS)}
    turned = TrainingData.encoded(swapped, support.tokenizer(), support.train_config())
    assert len({same.fingerprint, other.fingerprint, turned.fingerprint}) == 3


def test_what_goes_wrong_in_the_background_arrives_in_the_loop() -> None:
    def make(step: int) -> Batch:
        if step == 2:
            raise InputError("no such batch")
        return shared_data().batch(step)

    with BatchIterator(make) as iterator:
        assert len([next(iterator), next(iterator)]) == 2
        with pytest.raises(InputError, match="no such batch"):
            next(iterator)


# What is left out


def test_long_sentences_are_left_out_and_counted() -> None:
    training = data(buckets=(5,))
    lengths = {
        pair: [
            max(len(s), len(t))
            for s, t in zip(
                support.tokenizer().encode_source(sides[0], pair[3:]),
                support.tokenizer().encode_target(sides[1]),
                strict=True,
            )
        ]
        for pair, sides in support.text().items()
    }
    lengths["en-fr"] = lengths["en-fr"][:10]
    assert training.too_long == {p: sum(n > 5 for n in ns) for p, ns in lengths.items()}
    assert any(training.too_long.values())


def test_no_sentence_short_enough_is_an_error() -> None:
    with pytest.raises(InputError, match=r"en-de: every .* longer than the longest bucket, 2"):
        data(buckets=(2,))
    # One direction of several, too: a model would else be said to know it.
    text = support.text() | {"de-fr": (["eins " * 40], ["un"])}
    with pytest.raises(InputError, match="pair de-fr: every sentence is longer"):
        TrainingData.encoded(text, support.tokenizer(), support.train_config())


def test_batches_far_beyond_the_text_are_an_error() -> None:
    text = support.text(2, ("en-de",))
    few = len(text["en-de"][0])
    most = support.train_config(batch_tokens=32 * 1000 * few)
    assert TrainingData.encoded(text, support.tokenizer(), most).batch(0).pair.shape == (
        1000 * few,
    )
    over = support.train_config(batch_tokens=32 * (1000 * few + 1))
    with pytest.raises(
        InputError, match=r"batches of 2,001 sentences, .* only 2 .*; at most 64,00"
    ):
        TrainingData.encoded(text, support.tokenizer(), over)


@pytest.mark.skipif(not support.REAL.is_dir(), reason="no ../shared/data beside the project")
def test_real_text_is_read_whole() -> None:
    found = read_pairs(support.REAL, "train", ("en-de", "fr-en"))
    assert all(len(side) > 28_900 for sides in found.values() for side in sides)
    assert len(Folder(support.REAL).pairs("valid")) == 12


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        support.train_config().steps = 3  # type: ignore[misc]
