"""Reading parallel text, refusing what is wrong, and batches that depend on the step alone."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from taskmoe.tests.wmt import support
from taskmoe.wmt.data import TrainingData, available_pairs, read_pairs
from taskmoe.wmt.errors import InputError
from taskmoe.wmt.tokenizer import BOS, EOS, PAD


def write(folder: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name.replace("__", "-").replace("_", ".")).write_bytes(data)
    return folder


def test_multi_parallel_files_serve_every_direction(tmp_path: Path) -> None:
    write(tmp_path, train_en="a\nb\n", train_de="x\ny\n", train_fr="p\nq")
    found = read_pairs(tmp_path, "train", ("en-de", "fr-en"))
    assert found == {"en-de": (["a", "b"], ["x", "y"]), "fr-en": (["p", "q"], ["a", "b"])}
    assert available_pairs(tmp_path, "train") == [
        "de-en", "de-fr", "en-de", "en-fr", "fr-de", "fr-en",
    ]  # fmt: skip


def test_pair_files_serve_both_directions_and_validation_has_three_names(tmp_path: Path) -> None:
    write(tmp_path, val_en__de_en="a\n", val_en__de_de="x\n")
    assert available_pairs(tmp_path, "valid") == ["de-en", "en-de"]
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
    return TrainingData(text, support.tokenizer(), support.train_config(**fields))


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
    with pytest.raises(InputError, match="longer than the longest bucket, 2 tokens"):
        data(buckets=(2,))


@pytest.mark.skipif(not support.REAL.is_dir(), reason="no ../shared/data beside the project")
def test_real_text_is_read_whole() -> None:
    found = read_pairs(support.REAL, "train", ("en-de", "fr-en"))
    assert all(len(side) > 28_900 for sides in found.values() for side in sides)
    assert len(available_pairs(support.REAL, "valid")) == 12


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        support.train_config().steps = 3  # type: ignore[misc]
