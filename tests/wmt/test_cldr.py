"""The embedded corpus: deterministic, whole, and disjoint by content."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from taskmoe.wmt.text import cldr
from taskmoe.wmt.text.data import read_pairs
from taskmoe.wmt.text.folders import Folder

SMALL = cldr.CldrConfig(train=60, valid=10, test=10)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cldr") / "corpus"
    cldr.write_corpus(folder, SMALL)
    return folder


def test_thirty_directions_of_the_sizes_that_were_asked_for(corpus: Path) -> None:
    assert sorted(cldr.PAIRS) == Folder(corpus).pairs("train")
    assert len(cldr.PAIRS) == 30
    for split, size in (("valid", 10), ("test", 10)):
        pairs = read_pairs(corpus, split, cldr.PAIRS)
        assert {len(source) for source, _ in pairs.values()} == {size}
    train = read_pairs(corpus, "train", cldr.PAIRS)
    assert len(train["en-cs"][0]) == 60  # the paper's richest language
    assert len(train["en-gu"][0]) == 30  # and its poorest
    for pair, sides in train.items():
        assert len(set(zip(*sides, strict=True))) == len(sides[0]), f"{pair} repeats itself"


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(
    corpus: Path, tmp_path: Path
) -> None:
    cldr.write_corpus(tmp_path / "again", SMALL)
    cldr.write_corpus(tmp_path / "other", cldr.CldrConfig(60, 10, 10, seed=1))
    names = sorted(p.name for p in corpus.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "again").iterdir())
    for name in names:
        assert (corpus / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    name = "train.en-fi.fi"
    assert (corpus / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_no_sentence_of_one_split_is_in_another(corpus: Path) -> None:
    said = {
        split: {
            line for _, target in read_pairs(corpus, split, cldr.PAIRS).values() for line in target
        }
        for split in cldr.SPLITS
    }
    assert not said["test"] & said["train"]
    assert not said["valid"] & said["train"]
    assert not said["valid"] & said["test"]


def test_wording_does_not_move_a_content_to_another_split() -> None:
    rng = np.random.default_rng(0)
    splits = set()
    for _ in range(300):
        content = cldr.draw(rng)
        split = cldr.split_of(content, SMALL)
        splits.add(split)
        assert cldr.split_of(tuple(reversed(content)), SMALL) == split
        reworded = tuple(
            (a[0], "or" if a[1] == "standard" else "standard", *reversed(a[2:]))
            if a[0] in ("territories", "languages")
            else a
            for a in content
        )
        assert cldr.split_of(reworded, SMALL) == split
    assert splits == set(cldr.SPLITS)


def test_what_is_said_is_what_cldr_says() -> None:
    date = (("date", 5542),)  # 5 March 1965
    assert cldr.say(date, "en") == "Friday, March 5, 1965"
    assert cldr.say(date, "de") == "Freitag, 5. März 1965"
    days = (("territories", "or", "FR", "IT"), ("quantity", 5, "duration-hour"))
    assert cldr.say(days, "en") == "France or Italy: 5 hours"
    assert cldr.say(days, "ru") == "Франция или Италия: 5 часов"
    assert cldr.say((("spelled", 21),), "fr") == "vingt et un"
    assert cldr.say((("spelled", 21),), "gu") is None  # num2words does not speak it


def test_a_folder_with_something_else_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in corpus.iterdir()}
    cldr.write_corpus(corpus, SMALL)
    assert before == {p.name: p.stat().st_mtime_ns for p in corpus.iterdir()}
    with pytest.raises(ValueError, match="another configuration"):
        cldr.write_corpus(corpus, cldr.CldrConfig(61, 10, 10))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="already holds something"):
        cldr.write_corpus(tmp_path / "mine", SMALL)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="valid must be at least 1, got 0"):
        cldr.CldrConfig(valid=0)


def test_an_interrupted_corpus_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cldr.write_corpus(tmp_path / "c", SMALL, progress=stop)
    assert not list(tmp_path.iterdir())


def test_two_processes_that_write_the_same_corpus_get_on(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"

    def other_is_faster(done: int, total: int) -> None:
        if done == total:
            shutil.copytree(corpus, folder)

    cldr.write_corpus(folder, SMALL, progress=other_is_faster)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in corpus.iterdir())
    assert [p.name for p in tmp_path.iterdir()] == ["c"]

    def other_is_another(done: int, total: int) -> None:
        if done == total:
            (tmp_path / "d").mkdir()
            (tmp_path / "d" / "corpus.json").write_text("{}")

    with pytest.raises(OSError, match="not empty"):
        cldr.write_corpus(tmp_path / "d", SMALL, progress=other_is_another)


def test_a_corpus_is_known_by_all_that_it_is_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {cldr.fingerprint(SMALL), cldr.fingerprint(cldr.CldrConfig(61, 10, 10))}
    assert cldr.fingerprint(SMALL) in names
    monkeypatch.setattr(cldr.metadata, "version", lambda package: f"{package} 9")
    assert len(names | {cldr.fingerprint(SMALL)}) == 3
