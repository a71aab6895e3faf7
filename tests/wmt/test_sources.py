"""Every kind of source, mixes of them, and one sentence for whatever is wrong with one."""

import functools
import gzip
import json
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.text import cldr
from taskmoe.wmt.text.cleaning import clean
from taskmoe.wmt.text.data import TrainingData
from taskmoe.wmt.text.sources import (
    all_pairs,
    open_source,
    open_sources,
    read_all,
    read_held_out,
    read_split,
)

datasets = pytest.importorskip("datasets")

EN_DE = (["a", "b"], ["x", "y"])


def put(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def records(*texts: dict[str, Any]) -> Any:
    return datasets.Dataset.from_list([{"translation": t} for t in texts])


# Files


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_files_of_a_folder_are_plain_or_gzipped(tmp_path: Path, packed: str) -> None:
    put(tmp_path / f"train.en-de.en{packed}", "a\nb\n")
    put(tmp_path / f"train.en-de.de{packed}", "x\r\ny")
    put(tmp_path / f"train.en-fr.tsv{packed}", "a\tp\n\tq\n\n")
    put(tmp_path / f"valid.tsv{packed}", "en\tde\tfr\nc\tz\tr\n")
    source = open_source(str(tmp_path))
    assert source.pairs("train") == ["de-en", "en-de", "en-fr", "fr-en"]
    assert source.read("train", "en-de") == EN_DE
    assert source.read("train", "de-en") == EN_DE[::-1]
    assert source.read("train", "en-fr") == (["a", "", ""], ["p", "q", ""])
    assert len(source.pairs("valid")) == 6
    assert source.read("valid", "fr-de") == (["r"], ["z"])
    assert source.pairs("test") == []


def test_the_file_that_is_named_after_the_direction_stands_first(tmp_path: Path) -> None:
    put(tmp_path / "train.en", "multi\n")
    put(tmp_path / "train.de", "multi\n")
    assert open_source(str(tmp_path)).read("train", "en-de")[0] == ["multi"]
    put(tmp_path / "train.de-en.tsv", "tsv\ttsv\n")
    assert open_source(str(tmp_path)).read("train", "en-de")[0] == ["tsv"]
    for a, b in (("de", "en"), ("en", "de")):
        put(tmp_path / f"train.{a}-{b}.en", f"{a}-{b}\n")
        put(tmp_path / f"train.{a}-{b}.de", f"{a}-{b}\n")
        assert open_source(str(tmp_path)).read("train", "en-de")[0] == [f"{a}-{b}"]
    put(tmp_path / "train.en-de.en.gz", "packed\n")
    assert open_source(str(tmp_path)).read("train", "en-de")[0] == ["en-de"]
    assert open_source(str(tmp_path)).read("train", "de-en")[0] == ["de-en"]


def test_a_tab_separated_file_alone(tmp_path: Path) -> None:
    by_name = put(tmp_path / "corpus-1.en-de.tsv", "a\tx\nb\ty\n")
    by_header = put(tmp_path / "words.tsv.gz", "\ufeffen\tde\tpt_BR\r\na\tx\t1\r\nb\ty\t2\r\n")
    both = put(tmp_path / "other.en-de.tsv", "de\ten\nx\ta\ny\tb\n")
    no_header = put(tmp_path / "is.en-de.tsv", "no\tis\na\tx\n")  # two codes, but others
    for path in (by_name, by_header, both):
        assert open_source(str(path)).read("train", "en-de") == EN_DE
    assert len(open_source(str(by_header)).pairs("train")) == 6
    assert open_source(str(no_header)).read("train", "en-de") == (["no", "a"], ["is", "x"])


def test_which_split_a_single_file_serves(tmp_path: Path) -> None:
    test = put(tmp_path / "test.en-de.tsv", "a\tx\n")
    corpus = put(tmp_path / "corpus.en-de.tsv", "a\tx\n")
    assert [bool(open_source(str(test)).pairs(s)) for s in ("train", "valid", "test")] == [0, 0, 1]
    assert open_source(str(corpus)).pairs("train") == ["de-en", "en-de"]
    assert open_source(f"{corpus}@valid").pairs("train") == []
    assert open_source(f"{corpus}@valid").pairs("valid") == ["de-en", "en-de"]
    with pytest.raises(
        InputError, match=r"only a \.tsv file, Moses files or sacrebleu: test set take @valid"
    ):
        open_source(f"{tmp_path}@valid")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.en-de.tsv",
            "a\tx\nb\n",
            r"en-de\.tsv, line 2: 1 columns where 2 are wanted, en, de",
        ),
        ("a.en-de.tsv", "a\tx\tz\n", "line 1: 3 columns where 2 are wanted"),
        ("a.tsv", "one line\tand more\n", "which languages are its columns"),
        ("a.tsv", "en\ten\n", "a language stands twice"),
        ("a.en-de.tsv", b"a\tx\n\xff\tx\n", r"a\.en-de\.tsv, line 2: not valid UTF-8"),
        ("a.en-de.tsv.gz", None, "is no whole gzip file"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    path = put(tmp_path / name, content or "a\tx\n" * 100)
    if content is None:
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=message):
        open_source(str(path)).read("train", "en-de")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data folder .*gone is not there"):
        open_source(str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"data file .*gone\.tsv is not there"):
        open_source(str(tmp_path / "gone.tsv"))
    path = put(tmp_path / "a.en-de.tsv", "a\tx\n")
    with pytest.raises(InputError, match="no train text of pair en-fr"):
        open_source(str(path)).read("train", "en-fr")


# Mixes


def test_sources_mix_freely_in_their_order(tmp_path: Path) -> None:
    support.write_folder(tmp_path / "folder", 3)
    tsv = put(tmp_path / "a.en-de.tsv", "a\tx\nb\ty\n\tz\n")
    records({"en": "c", "de": "z"}, {"en": "d", "de": "w"}).save_to_disk(tmp_path / "hub")
    names = [str(tsv), str(tmp_path / "folder"), f"hf:{tmp_path}/hub"]
    sources = open_sources(names)
    assert all_pairs(sources, "train") == ["de-en", "de-fr", "en-de", "en-fr", "fr-de", "fr-en"]
    text = read_all(sources, "train", ("en-de", "fr-en"))
    own = support.sentences("en", 3)
    assert text["en-de"][0] == ["a", "b", "", *own, "c", "d"]
    assert text["fr-en"][1] == own
    assert read_all(sources, "train", ("en-de",), 1)["en-de"][0] == ["a", own[0], "c"]
    assert read_split(sources, "train", ("en-de",))["en-de"][0] == ["a", "b", *own, "c", "d"]
    with pytest.raises(InputError, match=r"no train text for pair en-cs in .*there is de-en"):
        read_all(sources, "train", ("en-cs",))
    with pytest.raises(InputError, match=r"a\.en-de\.tsv is named twice"):
        open_sources([str(tsv), str(tsv)])


def test_held_out_text_is_that_of_all_directions_between_the_languages(tmp_path: Path) -> None:
    put(tmp_path / "valid.en-de.tsv", "a\tx\n")
    put(tmp_path / "test.en-fr.tsv", "b\tp\n")
    put(tmp_path / "test.cs-fr.tsv", "c\tq\n")
    found = read_held_out(open_sources([str(tmp_path)]), {"en", "fr", "de"})
    assert found == {"en": {"a", "b"}, "de": {"x"}, "fr": {"p"}}


# Hugging Face


def test_a_dataset_saved_with_splits(tmp_path: Path) -> None:
    splits = {
        "train": records(
            {"de": "x", "en": "a"}, {"de": "y ", "en": "b\nb"}, {"de": "z", "en": None}
        ),
        "validation": records({"de": "w", "en": "c"}, {"de": "v", "en": "d"}),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "hub")
    source = open_source(f"hf:{tmp_path}/hub")
    assert source.pairs("train") == source.pairs("valid") == ["de-en", "en-de"]
    assert source.pairs("test") == []
    assert source.read("train", "en-de") == (["a", "b b", ""], ["x", "y", "z"])
    assert source.read("valid", "de-en") == (["w", "v"], ["c", "d"])
    short = open_source(f"hf:{tmp_path}/hub", limit=1)
    assert short.read("train", "de-en") == (["x"], ["a"])
    assert len(short.read("valid", "de-en")[0]) == 2  # text to score is read whole


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_folder_of_data_files_is_streamed(tmp_path: Path, kind: str) -> None:
    rows = records({"de": "x", "en": "a"}, {"de": "y", "en": "b"})
    (tmp_path / "hub").mkdir()
    getattr(rows, f"to_{kind}")(str(tmp_path / "hub" / f"train.{kind.replace('json', 'jsonl')}"))
    assert open_source(f"hf:{tmp_path}/hub").read("train", "en-de") == EN_DE


def test_a_configuration_of_a_local_dataset(tmp_path: Path) -> None:
    for config, word in (("de-en", "x"), ("fr-en", "p")):
        line = json.dumps({"translation": {config[:2]: word, "en": "a"}})
        put(tmp_path / "hub" / config / "train.jsonl", line)
    head = "---\nconfigs:\n" + "".join(
        f"- config_name: {c}\n  data_files: {c}/train.jsonl\n" for c in ("de-en", "fr-en")
    )
    put(tmp_path / "hub" / "README.md", f"{head}---\n")
    shutil.move(tmp_path / "hub", tmp_path / "made")
    source = open_source(f"hf:{tmp_path}/made/fr-en")
    assert source.read("train", "fr-en") == (["p"], ["a"])
    with pytest.raises(InputError, match=r"hf:.*/made/cs-en: .* failed: .*cs-en"):
        open_source(f"hf:{tmp_path}/made/cs-en").pairs("train")


def test_records_of_another_form_are_named(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "text")
    with pytest.raises(InputError, match=r"hf:.*text, train record 1: no .* but text"):
        open_source(f"hf:{tmp_path}/text").pairs("train")
    records({"de": 1, "en": "a"}).save_to_disk(tmp_path / "number")
    with pytest.raises(InputError, match=r"train record 1: 'de' is no text but int"):
        open_source(f"hf:{tmp_path}/number").read("train", "de-en")
    with pytest.raises(InputError, match="has no train records of pair de-fr"):
        open_source(f"hf:{tmp_path}/number").read("train", "de-fr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"hf:.*empty: opening it failed"):
        open_source(f"hf:{tmp_path}/empty").pairs("train")


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the package datasets; pip install .*hf"):
        open_source("hf:wmt14/de-en").pairs("train")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, config: str | None, streaming: bool) -> Any:
        assert (name, config, streaming) == ("wmt14", "de-en", True)
        raise ConnectionError("Couldn't reach 'wmt14' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"hf:wmt14/de-en: opening it failed: Couldn't reach"):
        open_source("hf:wmt14/de-en").pairs("train")
    with pytest.raises(InputError, match="write hf:NAME/CONFIG"):
        open_source("hf:wmt14").pairs("train")


# sacreBLEU


@pytest.fixture
def sacrebleu_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sacrebleu's own folder in the form of wmt14 after its download, and no network."""
    from sacrebleu.dataset import DATASETS

    home = tmp_path / "sacrebleu"
    monkeypatch.setattr(DATASETS["wmt14"], "_outdir", str(home))
    monkeypatch.setattr(DATASETS["wmt14"], "_rawdir", str(home / "raw"))

    def refuse(*_: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return home


def test_a_test_set_that_sacrebleu_keeps(sacrebleu_folder: Path) -> None:
    raw = sacrebleu_folder / "raw"
    put(raw / "wmt14.test-filtered.tgz", "downloaded and unpacked before")
    for side, language, lines in (("src", "en", "ab"), ("ref", "de", "xy")):
        segments = "".join(f'<seg id="{i}">{x}</seg>\n' for i, x in enumerate(lines, 1))
        name = f"test/newstest2014-deen-{side}.{language}.sgm"
        put(raw / name, f'<doc docid="1" genre="news" origlang="en">\n{segments}</doc>\n')
    source = open_source("sacrebleu:wmt14")
    assert source.read("test", "en-de") == EN_DE
    assert source.pairs("valid") == source.pairs("train") == []
    assert "en-de" in source.pairs("test")
    assert open_source("sacrebleu:wmt14@valid").read("valid", "en-de") == EN_DE
    (sacrebleu_folder / "wmt14.en-de.ref").write_text("x\n")
    with pytest.raises(InputError, match=r"en-de\.src has 2 lines but .*ref has 1"):
        source.read("test", "en-de")


def test_a_test_set_that_cannot_be_downloaded(sacrebleu_folder: Path) -> None:
    with pytest.raises(InputError, match=r"sacrebleu:wmt14: .*no network.*needs the network once"):
        open_source("sacrebleu:wmt14").read("test", "en-de")
    with pytest.raises(InputError, match=r"knows no such test set; it knows .*wmt14/full"):
        open_source("sacrebleu:wmt1")
    assert open_source("sacrebleu:wmt17/dev").pairs("valid")
    assert not open_source("sacrebleu:wmt17/dev").pairs("test")


# The embedded corpus


def test_the_embedded_corpus_is_written_into_the_cache_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cldr, "CldrConfig", functools.partial(cldr.CldrConfig, 40, 4, 4))
    source = open_source("cldr", cache=tmp_path)
    assert source.pairs("train") == sorted(cldr.PAIRS)
    assert not list(tmp_path.iterdir())  # not before it is read
    english, german = source.read("train", "en-de")
    assert len(english) == len(german) > 20
    (folder,) = tmp_path.iterdir()
    before = (folder / "corpus.json").stat().st_mtime_ns
    assert open_source("cldr", cache=tmp_path).read("train", "en-de") == (english, german)
    assert (folder / "corpus.json").stat().st_mtime_ns == before


# Any bytes, and any name


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    kind=st.sampled_from(["", "hf:", "sacrebleu:", "cldr"]),
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    end=st.sampled_from(["", ".tsv", ".tsv.gz", "@test", ".tsv@valid", "/de-en"]),
)
def test_any_name_is_a_source_or_one_clear_error(kind: str, name: str, end: str) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise ConnectionError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", refuse)
        source = f"{kind}gone-{name}{end}" if name else f"{kind}{end}"
        if source not in ("cldr", "/de-en"):
            with pytest.raises(InputError):
                open_source(source).pairs("train")


LINES = st.lists(
    st.one_of(
        st.binary(max_size=12),
        st.sampled_from([b"one", b"eins\tun", b"\t", b"en\tde", "\u2581".encode(), b"<2de>", b""]),
        st.text(max_size=8).map(lambda text: text.encode("utf-8", "surrogatepass")),
    ),
    max_size=6,
).map(b"\n".join)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_bytes_are_text_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzzed")
    kinds = ("train.en", "train.de", "train.en-de.tsv", "train.fr.gz", "valid.en", "valid.de")
    for name in kinds:
        if data.draw(st.booleans()):
            content = data.draw(LINES)
            packed = name.endswith(".gz") and data.draw(st.booleans())
            (folder / name).write_bytes(gzip.compress(content) if packed else content)
    try:
        sources = open_sources([str(folder)])
        pairs = tuple(all_pairs(sources, "train"))
        text = read_all(sources, "train", pairs)
        config = support.train_config()
        text, accounts = clean(text, config, read_held_out(sources, {"en", "de"}))
        assert all(account.kept == len(text[p][0]) for p, account in accounts.items())
        if text:
            TrainingData.encoded(text, support.tokenizer(), config).batch(0)
    except InputError as error:
        said = str(error)
    else:
        said = "pair"
    assert any(word in said for word in (str(folder), "pair", "bucket")), said
