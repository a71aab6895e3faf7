"""The study gathers scores, sizes and speeds; wrong sub-networks and unequal training are seen."""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taskmoe.bench.__main__ import main
from taskmoe.bench.harness.results import Spread, from_json
from taskmoe.bench.story.study import measure as study
from taskmoe.bench.story.study.runs import folders_of, gather
from taskmoe.bench.story.study.spec import SYSTEMS
from taskmoe.bench.story.study.view import cells, findings, view
from taskmoe.tests.wmt import support
from taskmoe.wmt.model.pruning import expert_usage, prune
from taskmoe.wmt.model.saved import Model, save_model
from taskmoe.wmt.model.subnetwork import extract
from taskmoe.wmt.text.scoring import score

ROUTINGS = {
    "narrow": ("dense", "dense"),
    "dense": ("dense", "dense"),
    "token": ("token", "token"),
    "sentence": ("sentence", "sentence"),
    "target": ("target", "target"),
    "token-target": ("token", "target"),
    "static": ("static", "static"),
    "distilled": ("dense", "dense"),
}
BLEU = dict(zip(SYSTEMS, (19.5, 20.0, 24.0, 19.0, 25.0, 26.0, 21.0, 22.0, 18.0, 18.5), strict=True))


def row(name: str, test: list[float]) -> study.Row:
    return study.Row(name, [0], test, test, {}, 1, 1, 0, 0, Spread(1.0, 1.0, 1.0))


def scores(level: float, pairs: tuple[str, ...] = support.PAIRS) -> str:
    return json.dumps({"scores": {p: {"bleu": level, "sentences": 4} for p in pairs}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of every system, the second a BLEU point better, as runs/study.sh leaves them."""
    root = tmp_path_factory.mktemp("study")
    support.write_folder(root / "data")
    for seed in (0, 1):
        for name, (encoder, decoder) in ROUTINGS.items():
            run = root / f"{name}-{seed}"
            save_model(support.model(encoder=encoder, decoder=decoder), run / "model")
            (run / "checkpoints").mkdir()
            config = {"train": {"steps": 5, "seed": seed, "max_sentences": None}, "model": {}}
            if name == "distilled":
                config["train"]["max_sentences"] = 7
            (run / "config.json").write_text(json.dumps(config))
            for split in ("valid", "test"):
                (run / f"{split}.json").write_text(scores(BLEU[name] + seed))
        token = support.model(encoder="token", decoder="token")
        small = prune(token, expert_usage(token, support.text(4)), 2)
        for name in ("pruned", "reaped"):
            for pairs in (("en-de",), ("de-en",), ("en-fr",)):
                part = root / f"{name}-{seed}" / pairs[0][3:]
                save_model(small, part)
                for split in ("valid", "test"):
                    (part / f"{split}.json").write_text(scores(BLEU[name] + seed, pairs))
    return root


def words(folder: Path, *more: str) -> list[str]:
    return ["study", str(folder), "--data", str(folder / "data"), "--rounds", "2", *more]


def test_what_is_gathered(folder: Path, tmp_path: Path, capsys: Any) -> None:
    found, picture = tmp_path / "study.json", tmp_path / "study.png"
    assert main(words(folder, "--json", str(found), "--png", str(picture))) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads(found.read_text())
    rows = {r["system"]: r for r in result["rows"]}
    assert list(rows) == list(SYSTEMS)
    for name, row in rows.items():
        assert row["test"] == [BLEU[name], BLEU[name] + 1]
        assert row["directions"] == dict.fromkeys(support.PAIRS, BLEU[name] + 0.5)
        assert row["seeds"] == [0, 1]
        assert row["tokens_per_s"]["median"] > 0
    for name in ("target", "token-target", "static"):
        assert rows[name]["identical"] == rows[name]["translations"] == 36
        assert rows[name]["served"] < rows[name]["parameters"]
    assert rows["target"]["served"] == rows["static"]["served"] == rows["dense"]["parameters"]
    assert rows["pruned"]["served"] < rows["pruned"]["parameters"] == rows["token"]["parameters"]
    assert rows["dense"]["translations"] == 0
    assert result["sentences"] == 12
    assert result["taught"] == 7
    said = capsys.readouterr().out
    assert "Best first: token/target 26.50" in said
    assert "keeps 50% of the token-routed teacher's gain (the paper: 43%)" in said
    assert "Every system compares with dense (the paper's, d_ff) as in the paper." in said
    lines = {line[0]: line for line in cells(from_json(study.Studied, result).rows)}
    assert lines["token/target"][1:7] == ("26.50 ± 0.71", "2", "+6.00", "+6.50", "23.52", "+2.92")
    assert lines["static by target"][6] == ""


WRONG = dict(zip(SYSTEMS, (9, 8, 5, 8, 3, 2, 6, 6, 12, 9), strict=True))  # of 12 sentences
ZERO_SHOT = "de-fr"


@pytest.fixture
def translated(folder: Path, tmp_path: Path) -> Path:
    """The same runs with translations of the test text, and a direction that nothing trained on."""
    copy = tmp_path / "translated"
    shutil.copytree(folder, copy)
    text = {x: support.sentences(x, 12, seed=2) for x in support.WORDS}
    places = {pair: place for place, pair in enumerate((*support.PAIRS, ZERO_SHOT))}
    for language, lines in text.items():
        (copy / "data" / f"test.{language}").write_text("".join(f"{x}\n" for x in lines))
        (copy / "dense-0" / "sizes.json").write_text('{"en-de": 30, "de-en": 20, "en-fr": 10}')
    for name, seed in itertools.product(SYSTEMS, (0, 1)):
        for part in folders_of(copy, name, seed):
            kept = json.loads((part / "test.json").read_text())["scores"]
            kept |= {} if name in ("pruned", "reaped") else {ZERO_SHOT: {}}
            (part / "translations").mkdir()
            for pair in kept:
                lines = list(text[pair[3:]])
                for i in np.random.default_rng(seed).permutation(12)[places[pair] : WRONG[name]]:
                    lines[i] = f"un huit {lines[i]}"
                file = part / "translations" / f"test.{pair}.{pair[3:]}"
                file.write_text("".join(f"{line}\n" for line in lines))
                kept[pair] = score(pair, lines, text[pair[3:]])._asdict()
            (part / "test.json").write_text(json.dumps({"scores": kept}))
    return copy


def test_intervals_and_averages_apart(translated: Path, tmp_path: Path, capsys: Any) -> None:
    found, picture = tmp_path / "study.json", tmp_path / "study.png"
    more = ["--quick", "--high-resource", "20", "--json", str(found), "--png", str(picture)]
    assert main(words(translated, *more)) == 0
    result = json.loads(found.read_text())
    rows = {r["system"]: r for r in result["rows"]}
    assert "over_dense" not in rows["dense"]
    assert rows["target"]["over_dense"]["low"] > 0 > rows["pruned"]["over_dense"]["low"]
    assert rows["sentence"]["over_dense"] == {"low": 0.0, "high": 0.0}  # the same mistakes
    for name, base in itertools.product(SYSTEMS, ("dense", "narrow")):
        if name != base:
            ends = rows[name][f"over_{base}"]
            apart = np.mean(rows[name]["test"]) - np.mean(rows[base]["test"])
            assert ends["low"] <= apart <= ends["high"]
    assert result["bootstrap"]["samples"] == 1000
    ends = result["bootstrap"]["kept_of_task_moe"]
    assert 0 < ends["low"] < ends["high"] < 100

    bleu, groups = rows["target"]["directions"], rows["target"]["averages"]
    assert set(bleu) == {*support.PAIRS, ZERO_SHOT}
    trained = [bleu[pair] for pair in support.PAIRS]
    assert groups == pytest.approx(
        {
            "all": np.mean(trained),
            "en→xx": (bleu["en-de"] + bleu["en-fr"]) / 2,
            "xx→en": bleu["de-en"],
            "high resource": (bleu["en-de"] + bleu["de-en"]) / 2,
            "low resource": bleu["en-fr"],
            "zero-shot": bleu[ZERO_SHOT],
            "all with zero-shot": np.mean([*trained, bleu[ZERO_SHOT]]),
        }
    )
    assert np.mean(rows["target"]["test"]) == pytest.approx(groups["all"])
    assert "zero-shot" not in rows["pruned"]["averages"]
    said = " ".join(capsys.readouterr().out.split())
    (alike,) = re.findall(r"Not told apart from dense \(equal compute\): (.*?)\. ", said)
    assert "sentence/sentence +0.00 (+0.00 to +0.00)" in alike
    assert "(1,000 samples), with the trained seeds as they are." in said
    assert "95% interval of that share" in said
    assert "High resource: trained on 20 sentence pairs or more." in said


def test_translations_that_are_not_those_that_were_scored(
    translated: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.rmtree(translated / "static-1" / "translations")
    assert main(words(translated, "--quick", "--systems", "dense,static,target")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "No interval over dense (equal compute), as translations were not kept: static" in said
    file = translated / "target-1" / "translations" / "test.en-de.de"
    lines = file.read_text().splitlines(keepends=True)
    for wrong in ([*lines[1:], lines[0]], lines[:-1], [*lines, "eins\n"]):
        file.write_text("".join(wrong))
        assert main(words(translated, "--quick", "--systems", "dense,target")) == 2
        assert "target-1: its translations of en-de do not have the BLEU" in capsys.readouterr().err
    file.write_text("".join(lines[:3]))
    scored = translated / "target-1" / "test.json"
    result = json.loads(scored.read_text())
    wanted = support.sentences("de", 12, seed=2)[:3]
    ours = [line.strip() for line in lines[:3]]
    result["scores"]["en-de"] = score("en-de", ours, wanted)._asdict()
    scored.write_text(json.dumps(result))
    assert main(words(translated, "--quick", "--systems", "dense,target")) == 2
    assert "target-1 has 3 translations of en-de, dense-0 has 12" in capsys.readouterr().err


def test_results_without_intervals_say_so(folder: Path, capsys: Any) -> None:
    assert main(words(folder, "--quick", "--systems", "dense,target")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "There are no intervals: the translations of the test text were not kept" in said
    stored = support.ROOT / "bench" / "results" / "study-multi30k.json"
    result = json.loads(stored.read_text())
    for row in result["rows"]:  # as the first version wrote them
        for field in ("averages", "over_dense", "over_narrow"):
            row.pop(field, None)
    result.pop("bootstrap", None)
    shown = view(from_json(study.Studied, result))
    assert len(shown.tables) == 1
    assert "There are no intervals" in " ".join(shown.findings)


def test_differences_within_their_spread_are_named() -> None:
    tests = {name: [level, level + 1] for name, level in BLEU.items()} | {"sentence": [18.0, 22.0]}
    rows = [row(name, levels) for name, levels in tests.items()]
    (said,) = (line for line in findings(rows) if "spread over seeds" in line)
    # To dense's 20 and 21 it is -2 and +1.
    assert said.endswith("spread over seeds: sentence/sentence -0.50 ± 2.12.")
    one = [row(name, levels[:1]) for name, levels in tests.items()]
    assert not any("spread over seeds" in line for line in findings(one))


def test_a_seed_that_not_all_systems_have_is_left_out(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "dense-0" / "test.json").unlink()
    found = tmp_path / "study.json"
    assert main(words(copy, "--quick", "--json", str(found))) == 0
    assert "not all systems have a test.json of it: seed 0" in capsys.readouterr().out
    for row in json.loads(found.read_text())["rows"]:
        assert row["seeds"] == [1]
        assert row["test"] == [BLEU[row["system"]] + 1]
    (copy / "token-1" / "test.json").unlink()
    assert main(words(copy)) == 2
    assert "no seed that every system has a test.json of" in capsys.readouterr().err


def test_some_systems_alone(folder: Path, tmp_path: Path, capsys: Any) -> None:
    found = tmp_path / "study.json"
    options = ["--quick", "--systems", "target,dense", "--json", str(found)]
    assert main(words(folder, *options)) == 0
    result = json.loads(found.read_text())
    assert [r["system"] for r in result["rows"]] == ["dense", "target"]
    said = capsys.readouterr().out
    assert "Routing by target gains +5.00 over the dense model of equal compute." in said
    assert "The student" not in said


def test_pruned_models_are_timed_on_a_direction_of_theirs(folder: Path) -> None:
    pruned = gather(folder, "pruned", [0], support.PAIRS)
    assert len(pruned.folders) == 3
    for pair in support.PAIRS:
        assert pair in study._model_of(pruned, pair).config.pairs


def test_what_prune_had_half_written_is_no_model(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "pruned-0" / ".de-x1y2").mkdir()
    assert main(words(copy, "--quick", "--systems", "dense,token,pruned")) == 0


def test_a_system_on_the_other_side_of_dense_is_named() -> None:
    worse = [row(name, [level]) for name, level in (BLEU | {"token": 1.0}).items()]
    said = " ".join(findings(worse))
    assert "the paper's, d_ff) otherwise than in the paper: token/token." in said
    assert "There is nothing to keep of the token-routed teacher's gain over dense" in said


def test_a_wrong_sub_network_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Model, pair: str) -> Model:
        small = extract(model, pair)
        other = small.params | {"embedding": small.params["embedding"][::-1]}
        return Model(other, small.config, small.tokenizer)

    whole = support.model(encoder="target", decoder="target")
    assert study.alike("target", whole, support.text(4)) == {"translations": 12, "identical": 12}
    monkeypatch.setattr(study, "extract", wrong)
    assert study.alike("target", whole, support.text(4))["identical"] < 12


def test_what_trainings_took(folder: Path, tmp_path: Path, capsys: Any) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "token-0" / "sizes.json").write_text('{"en-de": 30, "de-en": 20}')
    lines = [
        *({"step": s, "sentences": 40, "tokens": 1_500_000, "seconds": 90.0} for s in (2, 4, 4, 5)),
        {"step": 5, "score": 12.0},
    ]
    for name in ("token-0", "dense-0"):
        (copy / name / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (copy / "target-0" / "log.jsonl").write_text('{"step": 5, "loss": 2.0}\n')  # an old version's
    assert main(words(copy, "--json", str(tmp_path / "study.json"))) == 0
    rows = json.loads((tmp_path / "study.json").read_text())["rows"]
    took = {r["system"]: r["spent"] for r in rows if r["spent"]}
    sums = {"steps": 5, "tokens": 4_500_000, "seconds": 270.0}
    assert took == {"dense": sums, "token": sums | {"epochs": 2.4}}
    said = capsys.readouterr().out
    assert "Trainings of the first seed (measured)" in said
    assert re.search(r"token/token +│ +24\.00 +│ +5 +│ +2\.4 +│ +4\.5 +│ +4 ", said)
    (copy / "token-0" / "log.jsonl").write_text("[1]\n")
    assert main(words(copy)) == 2
    assert "log.jsonl is damaged" in capsys.readouterr().err


def test_steps_of_a_schedule_without_an_end_are_those_of_the_log(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for config in copy.glob("*/config.json"):
        if (config.parent / "checkpoints").exists():
            kept = json.loads(config.read_text())
            del kept["train"]["steps"]
            config.write_text(json.dumps(kept))
            (config.parent / "log.jsonl").write_text('{"step": 3}\n{"step": 40}\n')
    assert main(words(copy, "--json", str(tmp_path / "study.json"))) == 0
    assert json.loads((tmp_path / "study.json").read_text())["training"]["steps"] == 40
    capsys.readouterr()
    for text, message in (('{"step": 41}', "steps is 41, not 40"), ("{", "log.jsonl is damaged")):
        (copy / "token-1" / "log.jsonl").write_text(text)
        assert main(words(copy)) == 2
        assert message in capsys.readouterr().err
    (copy / "token-1" / "log.jsonl").unlink()
    assert main(words(copy)) == 2
    assert "log.jsonl: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sentence-0/config.json", '{"train": {"steps": 6}, "model": {}}', "steps is 6"),
        ("sentence-1/config.json", '{"train": {"steps": 7}, "model": {}}', "steps is 7"),
        (
            "distilled-1/config.json",
            '{"train": {"steps": 5, "max_sentences": 8}, "model": {}}',
            "max_sentences is 8, not 7",
        ),
        ("token-0/config.json", "{}", "is damaged: 'train'"),
        ("target-1/test.json", '{"scores": 1}', "no object scores"),
        ("dense-0/test.json", "{", "is damaged"),
        ("dense-0/test.json", '{"scores": {"en-de": {}}}', "test.json is damaged: en-de has no"),
        ("token-1/valid.json", '{"scores": {"en-de": [1]}}', "en-de has no number bleu"),
        ("target-1/test.json", scores(1, ("en-de",)), "the test scores of target-1 are of en-de, "),
        ("dense-0/config.json", None, "No such file"),
    ],
)
def test_what_does_not_fit(
    folder: Path, tmp_path: Path, capsys: Any, name: str, text: str | None, message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if text is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(text)
    assert main(words(copy)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert name.split("/")[0].split("-")[0] in said


def test_no_results_and_no_rounds(tmp_path: Path, capsys: Any) -> None:
    assert main(words(tmp_path)) == 2
    assert "has no narrow-SEED with a test.json" in capsys.readouterr().err
    assert main([*words(tmp_path), "--systems", "token,target"]) == 2
    assert "--systems must hold dense" in capsys.readouterr().err
    assert main([*words(tmp_path), "--rounds", "0"]) == 2
    assert "--rounds must be at least 1" in capsys.readouterr().err
    assert main([*words(tmp_path), "--systems", "dense,reaped"]) == 2
    assert "--systems must hold token, which reaped is cut out of" in capsys.readouterr().err
    assert main([*words(tmp_path), "--high-resource", "0"]) == 2
    assert "--high-resource must be at least 1, got 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
