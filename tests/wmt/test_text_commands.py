"""The commands on every kind of source and mixes of them, by their arguments."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.__main__ import main
from taskmoe.wmt.text.data import read_pairs
from taskmoe.wmt.text.folders import Folder
from taskmoe.wmt.text.sources import open_sources, read_all

datasets = pytest.importorskip("datasets")

TINY = [
    "--set", "d_model=16", "--set", "d_ff=16", "--set", "num_heads=2", "--set", "num_experts=4",
    "--set", "encoder_layers=2", "--set", "decoder_layers=2", "--set", "vocab_size=330",
    "--set", "buckets=[16]", "--set", "batch_tokens=256",
]  # fmt: skip
ALONE = [*TINY, "--data-parallel", "1", "--encoder", "dense", "--decoder", "dense"]  # soon compiled


@pytest.fixture
def kinds(tmp_path: Path) -> dict[str, str]:
    """A source of every kind: kind -> its name. All but the folder have 20 pairs en-de."""
    english, german = support.sentences("en", 20, 5), support.sentences("de", 20, 5)
    rows = "".join(f"{a}\t{b}\n" for a, b in zip(english, german, strict=True))
    (tmp_path / "words.en-de.tsv").write_text(rows, encoding="utf-8")
    (tmp_path / "more.tsv.gz").write_bytes(gzip.compress(f"en\tde\n{rows}".encode()))
    pairs = [{"translation": {"en": a, "de": b}} for a, b in zip(english, german, strict=True)]
    datasets.Dataset.from_list(pairs).save_to_disk(tmp_path / "hub")
    (tmp_path / "empty.tsv").write_text("en\tde\n", encoding="utf-8")
    return {
        "odd": f"{tmp_path}/x[/y]",
        "empty": str(tmp_path / "empty.tsv"),
        "folder": str(support.write_folder(tmp_path / "folder")),
        "tsv": str(tmp_path / "words.en-de.tsv"),
        "gzip": str(tmp_path / "more.tsv.gz"),
        "hub": f"hf:{tmp_path}/hub",
    }


def fails(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr."""
    capfd.readouterr()
    assert main(list(arguments)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


def cells(printed: str, row: str) -> list[str]:
    """Numbers of a table's row."""
    (line,) = (x for x in printed.splitlines() if x.split()[:1] == [row])
    return line.replace(",", "").split()[1:]


def test_each_kind_of_source_and_all_of_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kinds: dict[str, str]
) -> None:
    kinds = {name: source for name, source in kinds.items() if name not in ("odd", "empty")}
    mixes = [[kind] for kind in kinds] + [list(kinds)]
    for i, mix in enumerate(mixes):
        data = [x for kind in mix for x in ("--data", kinds[kind])]
        chosen = [*data, "--pairs", "en-de,de-en"]
        assert main(["prepare", *chosen, "--out", str(tmp_path / f"out{i}")]) == 0
        read = sum(200 if kind == "folder" else 20 for kind in mix)
        columns = [int(n) for n in cells(capfd.readouterr().out, "en-de")]
        assert columns[0] == read
        assert columns[7] == read - sum(columns[1:7]) > 0
    assert columns[5] >= 40  # the same 20 pairs stand in three sources
    assert columns[6] > 0
    assert main(["train", *chosen, "--workdir", str(tmp_path / "w"), "--steps", "1", *ALONE]) == 0
    assert [int(n) for n in cells(capfd.readouterr().out, "en-de")[:7]] == columns[:7]
    # The checkpoint knows the text that it was trained on.
    with (tmp_path / "words.en-de.tsv").open("a") as file:
        file.write("six six six six\tsechs sechs sechs sechs\n")
    again = ["train", *chosen, "--workdir", str(tmp_path / "w"), "--steps", "2", *ALONE]
    assert "the training text is another than when" in fails(capfd, *again)
    everything = [*chosen, "--set", "drop_held_out=false", "--out", str(tmp_path / "all")]
    assert main(["prepare", *everything]) == 0
    assert cells(capfd.readouterr().out, "en-de")[6] == "0"


def test_prepare_writes_cleaned_text_that_reads_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kinds: dict[str, str]
) -> None:
    out, table = tmp_path / "out", tmp_path / "sizes.json"
    data = ["--data", kinds["folder"], "--data", kinds["tsv"]]
    limits = ["--text", "--set", "max_characters=20", "--json", str(table)]
    assert main(["prepare", *data, "--out", str(out), *limits]) == 0
    printed = capfd.readouterr().out
    sizes = json.loads(table.read_text(encoding="utf-8"))
    assert sizes["sources"] == [kinds["folder"], kinds["tsv"]]
    assert sizes["train"]["en-de"]["read"] == 220
    assert sizes["train"]["en-de"]["long"] > 0
    assert cells(printed, "en-de")[7] == str(sizes["train"]["en-de"]["kept"])
    assert cells(printed, "en-de")[8] == str(sizes["valid"]["en-de"]) == "12"
    pairs = tuple(Folder(out).pairs("train"))
    assert len(pairs) == 6
    for pair, columns in read_pairs(out, "train", pairs).items():
        assert len(columns[0]) == sizes["train"][pair]["kept"]
        assert max(map(len, columns[0])) <= 20
    valid = Folder(Path(kinds["folder"])).read("valid", "fr-de")
    assert Folder(out).read("valid", "fr-de") == valid
    assert not (out / "train.fr-en.fr").exists()  # train.en-fr serves both directions

    again = ["prepare", *data, "--text", "--out", str(out)]
    assert "already holds something" in fails(capfd, *again)
    assert "no field 'width' of TrainConfig" in fails(capfd, *again, "--set", "width=3")
    assert "give one" in fails(capfd, "prepare", "--out", str(tmp_path / "x"), "--pairs", "en-de")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--set vocab_size=abc",
            "--set vocab_size must be a whole number of at least 1, got 'abc'",
        ),
        ("--set vocab_size=2.5", "--set vocab_size must be a whole number of at least 1, got 2.5"),
        ("--set vocab_size=0", "--set vocab_size must be a whole number of at least 1, got 0"),
        (
            "--set vocab_sise=9",
            "no field 'vocab_sise' of TrainConfig to set; did you mean vocab_si",
        ),
        ("--dry-run --json {out}.json", "--json does nothing with --dry-run; leave one out"),
        ("--dry-run --workers 2", "--workers does nothing with --dry-run; leave one out"),
        ("--text --workers 2", "--workers does nothing with --text; leave one out"),
        ("--text --vocabulary {out}", "--vocabulary does nothing with --text; leave one out"),
    ],
)
def test_prepare_names_what_does_not_fit(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    data, out = support.write_folder(tmp_path / "data"), tmp_path / "out"
    words = ["prepare", "--data", str(data), "--out", str(out)]
    assert message in fails(capfd, *words, *arguments.format(out=out).split())
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    embedded = ["prepare", "--out", str(out), "--cache", str(out)]
    assert "--cache: only for the sources of --data" in fails(capfd, *embedded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data", "{tsv}", "--data", "{hub}", "--pairs", "en-fr"],
            "no train text for pair",
        ),
        (
            ["--data", "{folder}", "--data", "{tsv}", "--pairs", "en-fr"],
            "has no text of en-fr",
        ),
        (["--data", "{tsv}", "--data", "{tsv}"], "is named twice"),
        (["--data", "{tsv}@test"], "has no train text of any pair"),
        (["--data", "sacrebleu:wmt99"], "sacrebleu knows no such test set"),
        (["--data", "hf:{folder}/gone/de-en/x"], "hf:.*gone/de-en/x: opening it failed"),
        (["--data", "{tsv}", "--set", "max_ratio=0.5"], "max_ratio must be at least 1, got 0.5"),
        (["--data", "{tsv}", "--set", "max_characters=1"], "no sentence pair is left"),
        (["--data", "{tsv}", "--set", "max_sentences=0"], "max_sentences must be at least 1"),
        (["--data", "{tsv}", "--validate-every", "1"], "has no valid text of any direction"),
        (["--data", "{odd}"], r"data folder .*x\[/y\] is not there"),
        (["--data", "{empty}"], "pair de-en: the training text holds no sentence pair"),
        (
            "--data {tsv} --coordinator here --num-processes 1 --process-id 0".split(),
            "--coordinator must be HOST:PORT, got 'here'",
        ),
        (["--data", "{tsv}", "--set", "row_multiple=9"], "batch_tokens must hold row_multiple"),
    ],
)
def test_a_source_that_does_not_fit_is_one_line(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    kinds: dict[str, str],
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", _refuse)
    given = [argument.format(**kinds) for argument in arguments]
    line = fails(capfd, "train", "--workdir", str(tmp_path / "w"), *TINY, *given)
    assert re.search(message, line), line
    assert not (tmp_path / "w").exists()


def test_names_that_look_like_markup(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kinds: dict[str, str]
) -> None:
    data = support.write_folder(tmp_path / "b[red]")
    assert main(["prepare", "--data", str(data), "--out", str(tmp_path / "[bold]c")]) == 0
    assert "b[red] in" in capfd.readouterr().out.replace("\n", "")
    assert "x[/y]" in fails(capfd, "prepare", "--data", kinds["odd"], "--out", str(tmp_path / "d"))


def test_a_direction_without_valid_text_is_named_and_the_others_are_scored(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kinds: dict[str, str]
) -> None:
    data, work = Path(kinds["folder"]), tmp_path / "w"
    (data / "valid.fr").unlink()
    given = ["train", "--data", str(data), "--pairs", "en-de,en-fr", "--workdir", str(work)]
    assert main([*given, "--steps", "1", "--validate-every", "1", *ALONE]) == 0
    printed = capfd.readouterr().out
    assert "no valid text, so not scored on the way: en-fr" in printed
    assert "step 1  score " in printed


def _refuse(*_: Any, **__: Any) -> Any:
    raise ConnectionError("no network")


def test_text_in_no_language_is_named_with_what_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("train.src", "train.tgt"):
        (tmp_path / name).write_text("one\ntwo\n")
    arguments = ["prepare", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    line = fails(capfd, *arguments)
    assert "has no train text of any pair" in line
    assert "left aside, in no language: train.src, train.tgt; --pairs takes any two words" in line
    assert main([*arguments, "--pairs", "src-tgt"]) == 0


def test_patterns_and_moses_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("news", 0), ("talks", 1)):
        for language in ("de", "en"):
            text = "".join(f"{x}\n" for x in support.sentences(language, 30, seed))
            (tmp_path / f"{name}.de-en.{language}").write_text(text, encoding="utf-8")
    rows = zip(support.sentences("en", 20, 2), support.sentences("de", 20, 2), strict=True)
    (tmp_path / "web.en-de.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    names = [source.name for source in open_sources([str(tmp_path / "*.de-en")])]
    assert names == [str(tmp_path / "news.de-en"), str(tmp_path / "talks.de-en")]
    every = open_sources([str(tmp_path / "*.de-en"), str(tmp_path / "*.tsv")])
    text = read_all(every, "train", ("en-de",))["en-de"]
    assert len(text[0]) == 80
    assert text[0][30:60] == support.sentences("en", 30, 1)
    (held,) = open_sources([str(tmp_path / "talks.de-en") + "@valid"])
    assert held.pairs("train") == []
    assert held.pairs("valid") == ["de-en", "en-de"]
    with pytest.raises(InputError, match=r"it fits no folder, \.tsv file or Moses files"):
        open_sources([str(tmp_path / "*.fr-en")])

    data = ["--data", str(tmp_path / "*.de-en"), "--pairs", "en-de", "--out", str(tmp_path / "o")]
    assert "--out FOLDER says where" in fails(capfd, "prepare", *data[:4])
    assert main(["prepare", *data[:4], "--dry-run"]) == 0
    printed = capfd.readouterr().out
    assert "60" in printed
    assert support.sentences("en", 1)[0] in printed
    assert not (tmp_path / "o").exists()
    (tmp_path / "talks.de-en.en").write_text("one\n")
    assert "has 1 lines but" in fails(capfd, "prepare", *data)
