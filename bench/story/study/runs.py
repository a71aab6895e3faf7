"""What the folder of a study holds: a folder a system and seed, with scores and translations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from taskmoe.bench.story.study.spec import WHOLE
from taskmoe.cli.errors import InputError
from taskmoe.wmt.commands.shared import sizes_of
from taskmoe.wmt.config import split_pair
from taskmoe.wmt.text.textfiles import read_lines

MIXTURES = ("token", "sentence", "target", "token-target", "static")


class System(NamedTuple):
    """A system's runs.

    folders: of its models of the first seed: one, of a pruned system one a target language. valid,
    test: mean BLEU over the trained directions, a number a seed. directions: test BLEU of each, the
    zero-shot ones too, mean over seeds. sentences: test sentences of all directions. scores: test
    BLEU of each direction, a seed each. translations: of the test text, direction -> lines, a seed
    each; none at all where one seed's were not kept.
    """

    name: str
    folders: list[Path]
    seeds: list[int]
    valid: list[float]
    test: list[float]
    directions: dict[str, float]
    sentences: int
    scores: list[dict[str, float]]
    translations: list[dict[str, list[str]]]


def finished_seeds(workdir: Path, name: str) -> list[int]:
    """Seeds of a system whose models all have a test.json; InputError where there is none."""
    numbers = (path.name[len(name) + 1 :] for path in workdir.glob(f"{name}-*"))
    runs = {int(n): folders_of(workdir, name, int(n)) for n in numbers if n.isdigit()}
    done = [s for s, p in runs.items() if p and all((x / "test.json").is_file() for x in p)]
    if not done:
        raise InputError(f"{workdir} has no {name}-SEED with a test.json: runs/study-*.sh first")
    return sorted(done)


def folders_of(workdir: Path, name: str, seed: int) -> list[Path]:
    """Where a system's models of a seed are."""
    path = workdir / f"{name}-{seed}"
    parts = (part for part in path.glob("*/") if not part.name.startswith("."))  # half written
    return sorted(parts) if name in WHOLE else [path]


def gather(workdir: Path, name: str, seeds: list[int], trained: tuple[str, ...]) -> System:
    """Scores and translations of one system's runs.

    trained: the directions that count in means. Raises InputError where a file is damaged, and
    where seeds have scores of different directions.
    """
    done = [folders_of(workdir, name, seed) for seed in seeds]
    scores = {split: [_scores(folders, split) for folders in done] for split in ("valid", "test")}
    for split, every in scores.items():
        for seed, score in zip(seeds, every, strict=True):
            if score.keys() != every[0].keys():
                raise InputError(
                    f"{workdir}: the {split} scores of {name}-{seed} are of {', '.join(score)}, "
                    f"those of {name}-{seeds[0]} of {', '.join(every[0])}: score both alike"
                )
    bleu = {
        split: [{pair: score["bleu"] for pair, score in seed.items()} for seed in every]
        for split, every in scores.items()
    }
    lines = [_translations(folders) for folders in done]

    def means(split: str) -> list[float]:
        return [float(np.mean([b for p, b in run.items() if p in trained])) for run in bleu[split]]

    return System(
        name,
        done[0],
        seeds,
        means("valid"),
        means("test"),
        {p: float(np.mean([run[p] for run in bleu["test"]])) for p in bleu["test"][-1]},
        sum(score["sentences"] for score in scores["test"][-1].values()),
        bleu["test"],
        lines if all(lines) else [],
    )


def _translations(folders: list[Path]) -> dict[str, list[str]]:
    """Direction -> translations of the test text; {} where a model's were not kept."""
    found: dict[str, list[str]] = {}
    for folder in folders:
        kept = folder / "translations"
        if not kept.is_dir():
            return {}
        for pair in _scores([folder], "test"):
            found[pair] = read_lines(kept / f"test.{pair}.{split_pair(pair)[1]}")
    return found


def same_training(workdir: Path, systems: list[System]) -> dict[str, Any]:
    """What all systems were trained with. Raises InputError where one differs in more than it must.

    Returns "training" (TrainConfig's fields), "model" (ModelConfig's, of the first mixture, or of
    the dense one), and "taught".
    """
    found = {
        run: _configuration(workdir / run)
        for system in systems
        if system.name not in WHOLE
        for run in (f"{system.name}-{seed}" for seed in system.seeds)
    }
    first = {run.rpartition("-")[0]: config for run, config in reversed(found.items())}
    dense, student = first["dense"], first.get("distilled")
    mixture = next((first[name] for name in MIXTURES if name in first), dense)
    taught = None if student is None else student["train"].get("max_sentences")
    for run, config in found.items():
        # A student's text is its teacher's, of as much as the students of the other seeds had.
        own = {"max_sentences": taught} if run.startswith("distilled-") else {}
        for field, value in (dense["train"] | own).items():
            if field != "seed" and config["train"].get(field) != value:
                raise InputError(
                    f"{workdir / run}: {field} is {config['train'].get(field)!r}, not {value!r} as "
                    "in the other runs: not the same training"
                )
    return {"training": dense["train"], "model": mixture["model"], "taught": taught}


def spent(workdir: Path, name: str, seed: int) -> dict[str, float]:
    """Steps, epochs, tokens and seconds of a system's training; {} where nothing tells of them.

    Nothing does of pruned models, which are not trained, nor in logs of earlier versions. Raises
    InputError where the log is damaged.
    """
    run = workdir / f"{name}-{seed}"
    if not (run / "log.jsonl").is_file():
        return {}
    log, fields = _log(run), ("sentences", "tokens", "seconds")
    if any(field not in line for line in log.values() for field in fields):
        return {}
    sentences, tokens, seconds = (sum(line[field] for line in log.values()) for field in fields)
    sizes = sizes_of(run)
    epochs = {"epochs": sentences / sum(sizes.values())} if sizes else {}
    return {"steps": max(log), **epochs, "tokens": tokens, "seconds": seconds}


def _configuration(run: Path) -> dict[str, Any]:
    """A run's config.json, with the steps that its log ends at where the schedule keeps none."""
    config = _read(run / "config.json", "train", "model")
    if "steps" not in config["train"]:
        config["train"]["steps"] = max(_log(run))
    return config


def _log(run: Path) -> dict[int, dict[str, Any]]:
    """Step -> its report in a run's log, the last one where an earlier version wrote several.

    Raises InputError where there is none.
    """
    path = run / "log.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        reports = {int(line["step"]): line for line in lines if "score" not in line}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if not reports:
        raise InputError(f"{path} is damaged: it has no report")
    return reports


def _scores(folders: list[Path], split: str) -> dict[str, dict[str, Any]]:
    """Direction -> scores of a system's models of one seed."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        path = folder / f"{split}.json"
        for pair, score in _read(path, "scores")["scores"].items():
            for field in ("bleu", "sentences"):
                if not isinstance(score, dict) or not isinstance(score.get(field), int | float):
                    raise InputError(f"{path} is damaged: {pair} has no number {field}")
            found[pair] = score
    return found


def _read(path: Path, *wanted: str) -> dict[str, Any]:
    """A JSON object that has these objects in it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(found[name], dict) for name in wanted):
            raise ValueError(f"no object {' or '.join(wanted)}")
        return dict(found)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
