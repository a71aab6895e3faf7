"""Language codes in both spellings, and what is none."""

from pathlib import Path

import pytest

from taskmoe.cli.errors import InputError
from taskmoe.wmt.text.languages import code, direction, primary, spelled
from taskmoe.wmt.text.sources import open_source


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("de", "de"), ("pt-BR", "pt_BR"), ("pt_br", "pt_BR"), ("zh-Hans", "zh_Hans"),
        ("zh_hant_tw", "zh_Hant_TW"), ("es-419", "es_419"), ("ca-valencia", "ca_valencia"),
        ("deu", "deu"), ("eng_Latn", "eng_Latn"), ("gsw", "gsw"), ("id", "id"),
        *((word, None) for word in ("log", "yaml", "txt", "bak", "tmp", "src", "tok", "json")),
        *((word, None) for word in ("EN", "x", "", "Deutsch", "de-", "d e", "xx", "gz")),
        *((pair, None) for pair in ("en-de", "pt-br")),
    ],
)  # fmt: skip
def test_codes(written: str, kept: str | None) -> None:
    assert code(written) == kept
    assert kept is None or code(kept) == kept


def test_the_language_of_a_code() -> None:
    found = {x: primary(x) for x in ("pt_BR", "zho_Hans", "zh-TW", "jpn", "words")}
    assert found == {"pt_BR": "pt", "zho_Hans": "zh", "zh-TW": "zh", "jpn": "ja", "words": "words"}


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (" en-de ", "en-de"), ("en-pt-BR", "en-pt_BR"), ("pt-BR-en", "pt_BR-en"),
        ("zh-Hans-zh-Hant", "zh_Hans-zh_Hant"), ("en-zh_hans", "en-zh_Hans"), ("a1-b2", "a1-b2"),
    ],
)  # fmt: skip
def test_directions(written: str, kept: str) -> None:
    assert direction(written) == kept


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("en-pt-br", "with regions in capitals like 'en-pt-BR', got 'en-pt-br'"),
        ("en", "must be two different language codes"),
        ("en-en", "must be two different"),
        ("en-log-txt", "must be two different"),
        ("", "must be two different"),
    ],
)
def test_what_is_no_direction(written: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        direction(written)


def test_a_name_is_found_in_either_spelling() -> None:
    names = {"pt_BR", "en-pt_BR", "my_code", "de"}
    found = [spelled(x, names) for x in ("pt-BR", "en-pt-BR", "my_code", "de", "fr", "en-fr")]
    assert found == ["pt_BR", "en-pt_BR", "my_code", "de", "fr", "en-fr"]


def test_a_named_code_is_taken_as_it_stands() -> None:
    assert direction("en-zh_hans", ("zh_hans",)) == "en-zh_hans"


def put(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


def test_only_languages_are_text_and_the_rest_is_told(tmp_path: Path) -> None:
    lines = "one\ntwo\n"
    names = ["train.en", "train.de", "train.pt-BR", "train.log", "train.yaml", "train.xx"]
    names += [
        "train.en-zh-Hans.en",
        "train.en-zh-Hans.zh-Hans",
        "train.en-de.align",
        "train.tmp.gz",
    ]
    source = open_source(put(tmp_path, dict.fromkeys(names, lines)))
    assert source.pairs("train") == [
        "de-en", "de-pt_BR", "en-de", "en-pt_BR", "en-zh_Hans", "pt_BR-de", "pt_BR-en",
        "zh_Hans-en",
    ]  # fmt: skip
    assert source.read("train", "en-pt_BR") == (["one", "two"], ["one", "two"])
    assert source.left_aside("train") == [
        "train.en-de.align", "train.log", "train.tmp.gz", "train.xx", "train.yaml",
    ]  # fmt: skip
    named = open_source(str(tmp_path), named={"en", "xx"})
    assert "en-xx" in named.pairs("train")
    assert "train.xx" not in named.left_aside("train")


def test_a_header_names_languages_and_other_columns(tmp_path: Path) -> None:
    text = "id\ten\tpt-BR\tscore\n1\tone\tum\t0.5\n2\ttwo\tdois\t0.7\n"
    source = open_source(put(tmp_path, {"train.tsv": text}) + "/train.tsv")
    assert source.pairs("train") == ["en-pt_BR", "pt_BR-en"]
    assert source.read("train", "en-pt_BR") == (["one", "two"], ["um", "dois"])
    assert source.left_aside("train") == ["column score", "column id"]
    words = text.replace("\n1", "\nsatu").replace("\n2", "\ndua")  # Indonesian
    indonesian = open_source(put(tmp_path, {"train.tsv": words}) + "/train.tsv")
    assert "en-id" in indonesian.pairs("train")
    assert open_source(put(tmp_path, {"dev.tsv": text})).left_aside("valid") == [
        "dev.tsv, column score", "dev.tsv, column id",
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_told_with_how_to_convert_it(tmp_path: Path, encoding: str) -> None:
    text = "one sentence\nanother one\n"
    for name in ("train.en", "train.de"):
        (tmp_path / name).write_bytes(text.encode(encoding))
    end = "BE" if encoding.endswith("be") else "LE"
    with pytest.raises(InputError, match=rf"train\.en, line 1: .*iconv -f UTF-16{end} -t UTF-8"):
        open_source(str(tmp_path)).read("train", "en-de")


def test_a_lone_nul_is_no_utf_16(tmp_path: Path) -> None:
    put(tmp_path, {"train.en": "one\ntw\0o\n", "train.de": "eins\nzwei\n"})
    with pytest.raises(InputError, match=r"train\.en, line 2: a NUL character, so no UTF-8 text$"):
        open_source(str(tmp_path)).read("train", "en-de")


def test_lines_may_end_in_any_way(tmp_path: Path) -> None:
    put(tmp_path, {"train.en": ""})
    (tmp_path / "train.en").write_bytes(b"one\rtwo\rthree\r")
    (tmp_path / "train.de").write_bytes(b"eins\r\nzwei\r\ndrei")
    (tmp_path / "train.fr").write_bytes(b"un\nde\rux\ntro\ris")
    read = open_source(str(tmp_path)).read
    assert read("train", "en-de") == (["one", "two", "three"], ["eins", "zwei", "drei"])
    assert read("train", "en-fr")[1] == ["un", "de\rux", "tro\ris"]
