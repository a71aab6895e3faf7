"""The paper's comparison: scores, sizes and decoding speed of what runs/study-*.sh trained.

Reads the folder of a study, one folder a system and seed with its scores. Counts the parameters of
each system and of what serves one direction, compares every extracted sub-network's translations
of the validation text with the whole model's, and times the decoding of one direction, systems in
turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.console import out
from taskmoe.bench.harness.results import keep
from taskmoe.bench.harness.timing import alternate
from taskmoe.bench.serving import systems as serving
from taskmoe.bench.story import paper
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar
from taskmoe.wmt.commands.shared import load
from taskmoe.wmt.config import split_pair
from taskmoe.wmt.model.saved import Model
from taskmoe.wmt.model.subnetwork import extract
from taskmoe.wmt.model.transformer import Params, encode, param_count
from taskmoe.wmt.model.translation import Decoding, translate
from taskmoe.wmt.text.folders import Columns, Pairs
from taskmoe.wmt.text.sources import open_sources, read_split
from taskmoe.wmt.text.tokenizer import BOS, PAD
from taskmoe.wmt.training.distillation import gain_kept

#: System -> what it is: routing of its encoder and decoder, or how it came about.
SYSTEMS = {
    "dense": "dense",
    "token": "token/token",
    "sentence": "sentence/sentence",
    "target": "target/target",
    "token-target": "token/target",
    "static": "static by target",
    "distilled": "dense, distilled from token/token",
    "pruned": "token/token, pruned for each target",
}
#: System that is cut out of another -> that one, whose parameters are the whole.
WHOLE = {"pruned": "token"}
ROWS = 256  # sentences of one direction that are decoded in a round
HEADINGS = (
    *("system", "BLEU", "seeds", "over dense", "paper", "over dense there"),
    *("parameters", "to serve one direction", "tokens/s", "extracted alike"),
)


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("workdir", type=Path, help="folder that runs/study-*.sh wrote")
    p.add_argument("--data", action="append", required=True, help="its sources, as for evaluate")
    p.add_argument("--rounds", type=int, default=5, help="times that each is measured")
    p.add_argument("--quick", action="store_true", help="20 validation sentences a direction only")
    p.add_argument("--json", type=Path, help="write the results here")
    p.add_argument("--png", type=Path, help="draw scores and sizes here")


def run(a: argparse.Namespace) -> int:
    """Gather, check, time and print; 1 where a sub-network translates otherwise than its model."""
    if a.rounds < 1:
        raise InputError(f"--rounds must be at least 1, got {a.rounds}")
    finished = {name: finished_seeds(a.workdir, name) for name in SYSTEMS}
    seeds = sorted(set.intersection(*map(set, finished.values())))
    if not seeds:
        raise InputError(f"{a.workdir} has no seed that every system has a test.json of")
    if left := sorted({seed for found in finished.values() for seed in found} - set(seeds)):
        numbers = ", ".join(map(str, left))
        out.print(f"left out, as not all systems have a test.json of it: seed {numbers}")
    systems = [gather(a.workdir, name, seeds) for name in SYSTEMS]
    settings = same_training(a.workdir, systems)
    pairs = load(systems[0].folders[0]).config.pairs
    models = {s.name: _model_of(s, pairs[0]) for s in systems}
    text = read_split(open_sources(a.data), "valid", pairs)
    if a.quick:
        text = {pair: (x[:20], y[:20]) for pair, (x, y) in text.items()}
    rows = []
    served: dict[str, Model] = {}
    for system in systems:
        model = models[system.name]
        served[system.name] = _served(model, pairs[0])
        rows.append(
            {
                "system": system.name,
                "seeds": system.seeds,
                "valid": system.valid,
                "test": system.test,
                "directions": system.directions,
                "parameters": param_count(models[WHOLE.get(system.name, system.name)].params),
                "served": param_count(served[system.name].params),
                **alike(system.name, model, text),
            }
        )
    for row, speed in zip(rows, _speeds(served, pairs[0], text, a.rounds), strict=True):
        row["tokens_per_s"] = speed
    result = {
        "command": "study",
        "machine": machine.describe(),
        "rounds": a.rounds,
        "sentences": systems[0].sentences,
        **settings,
        "rows": rows,
    }
    keep(result, chart, a)
    table = Table(*HEADINGS, title=str(a.workdir))
    for cells in table_cells(result):
        table.add_row(*cells)
    out.print(table)
    out.print(*findings(result), sep="\n", soft_wrap=True)
    return int(any(r["translations"] != r["identical"] for r in rows))


class System(NamedTuple):
    """A system's runs.

    folders: of its models of the first seed: one, of "pruned" one a target language. valid, test:
    mean BLEU over the directions, a number a seed. directions: test BLEU of each, mean over seeds.
    sentences: test sentences of all directions.
    """

    name: str
    folders: list[Path]
    seeds: list[int]
    valid: list[float]
    test: list[float]
    directions: dict[str, float]
    sentences: int


def finished_seeds(workdir: Path, name: str) -> list[int]:
    """Seeds of a system whose models all have a test.json; InputError where there is none."""
    numbers = (path.name[len(name) + 1 :] for path in workdir.glob(f"{name}-*"))
    runs = {int(n): _folders(workdir, name, int(n)) for n in numbers if n.isdigit()}
    done = [s for s, p in runs.items() if p and all((x / "test.json").is_file() for x in p)]
    if not done:
        raise InputError(f"{workdir} has no {name}-SEED with a test.json: runs/study-*.sh first")
    return sorted(done)


def _folders(workdir: Path, name: str, seed: int) -> list[Path]:
    path = workdir / f"{name}-{seed}"
    return sorted(path.glob("*/")) if name == "pruned" else [path]


def gather(workdir: Path, name: str, seeds: list[int]) -> System:
    """Scores of one system's runs. Raises InputError where a file is damaged."""
    done = {seed: _folders(workdir, name, seed) for seed in seeds}
    means: dict[str, list[float]] = {"valid": [], "test": []}
    directions: dict[str, list[float]] = {}
    sentences = 0
    for folders in done.values():
        for split, level in means.items():
            scores = {p: s for folder in folders for p, s in _scores(folder / f"{split}.json")}
            level.append(float(np.mean([s["bleu"] for s in scores.values()])))
        for pair, found in scores.items():  # of the test text, the last of the splits
            directions.setdefault(pair, []).append(found["bleu"])
        sentences = sum(s["sentences"] for s in scores.values())
    models = done[seeds[0]]
    each = {pair: float(np.mean(bleu)) for pair, bleu in directions.items()}
    return System(name, models, list(done), means["valid"], means["test"], each, sentences)


def same_training(workdir: Path, systems: list[System]) -> dict[str, Any]:
    """What all systems were trained with. Raises InputError where one differs in more than it must.

    Returns "training" (TrainConfig's fields) and "model" (ModelConfig's, of the token-routed one).
    """
    found = {
        run: _read(workdir / run / "config.json", "train", "model")
        for system in systems
        if system.name not in WHOLE
        for run in (f"{system.name}-{seed}" for seed in system.seeds)
    }
    dense, token, student = (
        next(c for run, c in found.items() if run.rpartition("-")[0] == name)
        for name in ("dense", "token", "distilled")
    )
    taught = student["train"].get("max_sentences")
    for run, config in found.items():
        # A student's text is its teacher's, of as much as the students of the other seeds had.
        own = {"max_sentences": taught} if run.startswith("distilled-") else {}
        for field, value in (dense["train"] | own).items():
            if field != "seed" and config["train"].get(field) != value:
                raise InputError(
                    f"{workdir / run}: {field} is {config['train'].get(field)!r}, not {value!r} as "
                    "in the other runs: not the same training"
                )
    return {"training": dense["train"], "model": token["model"], "taught": taught}


def _scores(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return list(_read(path, "scores")["scores"].items())


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


def _model_of(system: System, pair: str) -> Model:
    """The model of a system's first seed; of several that which was made for a direction."""
    models = map(load, system.folders)
    return next(m for m in models if len(system.folders) == 1 or pair in m.config.pairs)


def _served(model: Model, pair: str) -> Model:
    """What serves one direction: the sub-network where there is one, else the whole model."""
    config = model.config
    tasks = [side for side in ("encoder", "decoder") if config.tasks(side)]
    return extract(model, pair) if tasks else model


def alike(name: str, model: Model, text: Pairs) -> dict[str, int]:
    """Translations of the validation text that sub-networks and the whole model have in common."""
    config = model.config
    if not any(config.tasks(side) for side in ("encoder", "decoder")):
        return {"translations": 0, "identical": 0}
    requests = [(pair, line) for pair, (lines, _) in text.items() for line in lines]
    with bar(f"{name}, whole", "sentences") as progress:
        whole = translate(model, requests, Decoding(mixed_tasks=True), progress)
    found: list[str] = []
    with bar(f"{name}, sub-networks", "directions") as progress:
        for number, (pair, (lines, _)) in enumerate(text.items()):
            found += translate(extract(model, pair), [(pair, line) for line in lines], Decoding())
            progress(number + 1, len(text))
    same = sum(mine == theirs for mine, theirs in zip(found, whole, strict=True))
    return {"translations": len(whole), "identical": same}


def _speeds(
    models: dict[str, Model], pair: str, text: Pairs, rounds: int
) -> list[dict[str, float]]:
    """Tokens decoded a second by each system, in turns: median, p10, p90.

    Of each reference the first positions are given, so that every system takes equally many steps.
    """
    programs = {name: _decoding(model, pair, text[pair]) for name, model in models.items()}
    speeds = []
    for timing in alternate(programs, rounds=rounds).values():
        each = ROWS * serving.POSITIONS / np.asarray(timing.seconds)
        low, median, high = np.quantile(each, (0.1, 0.5, 0.9))
        speeds.append({"median": float(median), "p10": float(low), "p90": float(high)})
    return speeds


def _decoding(model: Model, pair: str, text: Columns) -> Callable[[], jax.Array]:
    """A compiled decoding of `ROWS` sentences of one direction, the encoder's output given."""
    config = dataclasses.replace(model.config, pairs=(pair,))
    take = np.resize(np.arange(len(text[0])), ROWS)
    source = model.tokenizer.encode_source([text[0][i] for i in take], split_pair(pair)[1])
    target = model.tokenizer.encode_target([text[1][i] for i in take])
    sources = _padded(source, serving.SOURCE_LENGTH)
    given = _padded([[BOS, *ids] for ids in target], serving.POSITIONS)
    memory, _ = jax.jit(encode, static_argnums=1)(
        model.params, config, sources, sources != PAD, None
    )

    def program(params: Params, memory: jax.Array, given: jax.Array) -> jax.Array:
        return serving.decode(params, config, memory, given, serving.POSITIONS)[0]

    compiled = jax.jit(program).lower(model.params, memory, given).compile()
    return lambda: compiled(model.params, memory, given)


def _padded(ids: list[list[int]], width: int) -> np.ndarray:
    rows = np.full((len(ids), width), PAD, np.int32)
    for row, line in zip(rows, ids, strict=True):
        row[: min(len(line), width)] = line[:width]
    return rows


def table_cells(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of one line a system, for `HEADINGS`."""
    dense = float(np.mean(result["rows"][0]["test"]))
    lines: list[tuple[str, ...]] = []
    for r in result["rows"]:
        name, mean, speed = r["system"], float(np.mean(r["test"])), r["tokens_per_s"]
        spread = f" ± {np.std(r['test'], ddof=1):.2f}" if len(r["test"]) > 1 else ""
        theirs = paper.STUDY.get(name)
        lines.append(
            (
                SYSTEMS[name],
                f"{mean:.2f}{spread}",
                str(len(r["seeds"])),
                f"{mean - dense:+.2f}" if name != "dense" else "",
                "" if theirs is None else f"{theirs[0]:.2f}",
                f"{theirs[0] - theirs[1]:+.2f}" if theirs and theirs[1] and name != "dense" else "",
                f"{r['parameters']:,}",
                f"{r['served']:,}",
                f"{speed['median']:,.0f} ({speed['p10']:,.0f} to {speed['p90']:,.0f})",
                f"{r['identical']:,} of {r['translations']:,}" if r["translations"] else "",
            )
        )
    return lines


def findings(result: dict[str, Any]) -> list[str]:
    """What the scores say, sentence by sentence."""
    bleu = {r["system"]: float(np.mean(r["test"])) for r in result["rows"]}
    order = sorted(bleu, key=lambda name: -bleu[name])
    lines = ["Best first: " + ", ".join(f"{SYSTEMS[n]} {bleu[n]:.2f}" for n in order) + "."]
    otherwise = [
        SYSTEMS[n]
        for n, (theirs, dense) in paper.STUDY.items()
        if dense is not None and (bleu[n] > bleu["dense"]) != (theirs > dense)
    ]
    lines.append(
        "On the other side of dense than in the paper: " + ", ".join(otherwise) + "."
        if otherwise
        else "Every system is on the same side of dense as in the paper."
    )
    lines += _doubtful(result)
    gain = gain_kept(bleu["dense"], bleu["token"], bleu["distilled"], bleu["target"])
    for whose, share, theirs in (
        ("the token-routed teacher's", gain.of_teacher, paper.DISTILLATION_KEEPS["teacher"]),
        ("the task-routed model's", gain.of_task_moe, paper.DISTILLATION_KEEPS["task"]),
    ):
        if share is None or not np.isfinite(share):
            lines.append(f"Of {whose} gain over dense there is nothing to keep: there is none.")
        elif share <= 0:
            lines.append(
                f"The student does not reach dense and keeps nothing of {whose} gain over it "
                f"(the paper: {theirs}%)."
            )
        else:
            lines.append(f"The student keeps {share:.0f}% of {whose} gain (the paper: {theirs}%).")
    return lines


def _doubtful(result: dict[str, Any]) -> list[str]:
    """Systems whose differences to dense, seed by seed, spread more than they come to."""
    tests = {r["system"]: np.array(r["test"]) for r in result["rows"]}
    if len(tests["dense"]) < 2:
        return []
    apart = {n: tests[n] - tests["dense"] for n in tests if n != "dense"}
    small = {n: d for n, d in apart.items() if abs(d.mean()) < d.std(ddof=1)}
    said = ", ".join(
        f"{SYSTEMS[n]} {d.mean():+.2f} ± {d.std(ddof=1):.2f}" for n, d in small.items()
    )
    return [f"No larger than its spread over seeds is the difference to dense of {said}."] * bool(
        small
    )


def chart(result: dict[str, Any]) -> Figure:
    """Scores (a dot a seed) and parameters that serve one direction, a bar a system."""
    rows = result["rows"][::-1]
    names = [SYSTEMS[r["system"]] for r in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    at = np.arange(len(rows))
    left.barh(at, [np.mean(r["test"]) for r in rows], color="tab:blue", alpha=0.7)
    for y, r in enumerate(rows):
        left.plot(r["test"], [y] * len(r["test"]), "k.", markersize=5)
    left.set_yticks(at, names)
    left.set_xlabel("test BLEU, mean over directions (a dot a seed)")
    right.barh(at, [r["parameters"] / 1e6 for r in rows], color="lightgray", label="whole model")
    right.barh(
        at, [r["served"] / 1e6 for r in rows], 0.5, color="tab:orange", label="serves one direction"
    )
    right.set_xlabel("million parameters")
    figure.legend(loc="outside upper right", ncols=2, fontsize=8)
    return figure
