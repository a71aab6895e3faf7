"""runs/study.sh keeps what it made, and opens the test text last; training itself is left out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from taskmoe.tests.wmt import support

# Stands for python: `-m taskmoe.wmt COMMAND` writes that command's results at once.
COMMAND = """#!{python}
import json, os, sys
from pathlib import Path

words = sys.argv[1:]
if words[:2] != ["-m", "taskmoe.wmt"]:
    os.execv(sys.executable, [sys.executable, *words])
command, given = words[2], dict(zip(words[3:], words[4:]))
with Path("{root}", "commands").open("a") as file:
    print(*words[2:], file=file)

def write(path, value):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value) + "\\n")

if command in ("train", "distill"):
    steps, work = int(given["--steps"]), Path(given["--workdir"])
    cosine = "schedule=inverse_sqrt" not in words
    write(work / "config.json", {{"train": {{"steps": steps}} if cosine else {{}}}})
    write(work / "log.jsonl", {{"step": steps}})
    write(work / "model" / "config.json", {{"pairs": ["en-de", "de-en"]}})
elif command == "evaluate":
    write(given["--json"], {{"scores": {{}}}})
    if "--out" in given:
        Path(given["--out"]).mkdir(exist_ok=True)
else:
    write(Path(given["--out"], "manifest.json"), {{}})
    write(Path(given["--out"], "config.json"), {{"pairs": given.get("--pairs", "").split(",")}})
"""


class Study:
    """A study of few systems, with one seed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.python = folder, folder / "python"
        self.work = folder / "work"
        self.python.write_text(COMMAND.format(python=sys.executable, root=folder))
        self.python.chmod(0o755)

    def run(self, code: int = 0, **settings: str) -> str:
        """What a run with these settings says on stderr; code: what it ends with."""
        own = {"WORK": self.work, "DATA": "--data text", "STEPS": "6000", "VOCAB": "400"}
        own |= {"TEACHING": "10", "LIMIT": "5", "SEEDS": "0", "PYTHON": self.python}
        own |= {"ALL": "dense token pruned"}
        environment = os.environ | {name: str(x) for name, x in {**own, **settings}.items()}
        script = str(support.ROOT / "runs" / "study.sh")
        ended = subprocess.run(
            ["bash", script], env=environment, check=False, capture_output=True, text=True
        )
        assert ended.returncode == code, ended.stderr
        return ended.stderr

    def commands(self) -> list[list[str]]:
        """The commands so far, which are forgotten then."""
        file = self.folder / "commands"
        words = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        file.unlink(missing_ok=True)
        return words

    def files(self) -> set[str]:
        return {str(path.relative_to(self.work)) for path in self.work.rglob("*")}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path)


def test_other_steps_of_a_fixed_schedule_are_refused_before_anything_goes(study: Study) -> None:
    study.run()
    before = study.files()
    assert "token-0/translations" in before
    assert "pruned-0/de/test.json" in before
    for systems in ("dense token pruned", "token"):
        said = study.run(2, STEPS="8000", SYSTEMS=systems)
        assert "a training of 6000 steps, which its schedule fixes, not of 8000" in said
        assert "give STEPS=6000" in said
        assert study.files() == before
    # Nor of a training that is half done, which has no model yet.
    (study.work / "token-0" / "checkpoints" / "100").mkdir(parents=True)
    (study.work / "token-0" / "model" / "config.json").unlink()
    (study.work / "token-0" / "model").rmdir()
    assert "token-0 is a training of 6000 steps" in study.run(2, STEPS="8000", SYSTEMS="token")
    assert (study.work / "pruned-0" / "de" / "test.json").exists()


@pytest.mark.parametrize("name", ["log.jsonl", "config.json"])
def test_a_damaged_file_ends_it_before_anything_goes(study: Study, name: str) -> None:
    study.run()
    (study.work / "token-0" / name).write_text('{"ste')
    before = study.files()
    assert f"token-0/{name} is damaged" in study.run(2)
    assert study.files() == before


def test_the_test_text_opens_when_all_are_trained_and_scored(study: Study) -> None:
    free = {"SETTINGS": "--set schedule=inverse_sqrt"}
    study.run(**free)
    study.commands()
    study.run(**free)
    assert study.commands() == []
    # One goes on; what was scored of it is stale, and the others have fewer steps.
    said = study.run(2, STEPS="8000", SYSTEMS="token", **free)
    assert "dense, seed 0, is not trained for 8000 steps and scored on the validation" in said
    made = study.files()
    assert not {"token-0/test.json", "token-0/translations", "pruned-0"} & made
    assert {"token-0/valid.json", "dense-0/test.json", "dense-0/model"} <= made
    assert not any("test" in words for words in study.commands())
    study.run(STEPS="8000", **free)
    assert sum("test" in words for words in study.commands()) == 4  # of pruned models two
    # A language of a pruned system that has no score yet.
    (study.work / "pruned-0" / "de" / "valid.json").unlink()
    (study.work / "dense-0" / "test.json").unlink()
    said = study.run(2, STEPS="8000", SYSTEMS="dense", PHASES="test", **free)
    assert "pruned, seed 0, is not trained for 8000 steps and scored" in said
    assert study.commands() == []


def test_scores_without_their_model_are_stale(study: Study) -> None:
    study.run(ALL="dense")
    (study.work / "dense-0" / "model" / "config.json").unlink()
    (study.work / "dense-0" / "model").rmdir()
    study.commands()
    study.run(ALL="dense")
    assert [words[0] for words in study.commands()] == ["train", "evaluate", "evaluate"]


def test_sizes_are_for_training_alone(study: Study) -> None:
    study.run(ALL="token distilled", SIZES="--set d_model=64", SETTINGS="--set batch_tokens=512")
    given = {words[0]: words for words in study.commands()}
    assert "d_model=64" in given["train"]
    assert "batch_tokens=512" in given["train"]
    assert "d_model=64" not in given["distill"]
    assert "batch_tokens=512" in given["distill"]
    assert json.loads((study.work / "distilled-0" / "log.jsonl").read_text())["step"] == 6000
