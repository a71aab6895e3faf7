"""Text that is given directly is prepared once: found again, waited for, and never half there."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.tests.wmt.test_training_set import PAIRS, content, folder_of_text, plan
from taskmoe.wmt.__main__ import main
from taskmoe.wmt.config import PRESETS, ModelConfig, TrainConfig
from taskmoe.wmt.text import blocks, kept_sets, preparing
from taskmoe.wmt.text import workers as working
from taskmoe.wmt.text.cleaning import clean
from taskmoe.wmt.text.data import TrainingData
from taskmoe.wmt.text.kept_sets import find_set, kept_set
from taskmoe.wmt.text.preparing import part_of, prepare
from taskmoe.wmt.text.sources import open_sources, read_all, read_held_out
from taskmoe.wmt.text.tokenizer import Tokenizer, train_tokenizer
from taskmoe.wmt.text.training_set import rows_file
from taskmoe.wmt.training import parallel
from taskmoe.wmt.training.loop import train


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LINES", 64)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where sets were prepared."""
    places: list[Path] = []
    write = kept_sets.write_set

    def counted(out: Path, *rest: Any) -> Any:
        places.append(out)
        return write(out, *rest)

    monkeypatch.setattr(kept_sets, "write_set", counted)
    return places


def test_a_set_is_prepared_once(tmp_path: Path, written: list[Path]) -> None:
    wanted, notes = plan(folder_of_text(tmp_path / "text")), []
    assert find_set(wanted, [tmp_path / "cache"]) is None
    first = kept_set(wanted, [tmp_path / "cache"], note=notes.append)
    again = kept_set(plan(tmp_path / "text"), [tmp_path / "cache"], note=notes.append)
    assert written == [first.folder] == [again.folder]
    assert first.folder.parent == tmp_path / "cache" / "sets"
    size = f"vocabulary of {support.tokenizer().vocab_size} pieces and text"
    assert notes == [f"{size} prepared in {first.folder}", f"{size} from {first.folder}"]
    assert content(first.folder) == content(prepare(tmp_path / "set", wanted).folder)
    found = find_set(wanted, [tmp_path / "other", tmp_path / "cache"])
    assert found is not None
    assert found.folder == first.folder


def test_any_other_text_or_setting_is_another_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[Path]
) -> None:
    folder = folder_of_text(tmp_path / "text")
    other = support.train_config(buckets=(4, 8, 16), vocab_sentences=150, max_ratio=2.0)
    changes: list[dict[str, Any]] = [{}, {"pairs": ("en-de",)}, {"config": other}]
    changes += [{"vocabulary": 330}, {"splits": {}}, {"held_out": {}}]
    for change in changes:
        kept_set(plan(folder, **change), [tmp_path / "cache"])
    with monkeypatch.context() as patch:
        patch.setattr(sentencepiece, "__version__", "0")
        kept_set(plan(folder), [tmp_path / "cache"])
    file = folder / "train.en"
    before = file.stat()
    file.write_text(file.read_text(encoding="utf-8").replace("one", "eno"), encoding="utf-8")
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    kept_set(plan(folder), [tmp_path / "cache"])
    assert len(set(written)) == len(written) == 8


def test_a_damaged_set_is_prepared_anew(tmp_path: Path, written: list[Path]) -> None:
    wanted, notes = plan(folder_of_text(tmp_path / "text")), []
    made = kept_set(wanted, [tmp_path])
    whole = content(made.folder)
    for name in ("manifest.json", "spm.model", rows_file(made.folder, "de-en").name):
        file = made.folder / name
        file.write_bytes(file.read_bytes()[:-2])
        assert find_set(wanted, [tmp_path]) is None
        kept_set(wanted, [tmp_path], note=notes.append)
        assert content(made.folder) == whole
    assert len(written) == 4
    assert notes[0] == f"{made.folder} is damaged; preparing it anew"


@pytest.mark.parametrize(
    ("owner", "reader"), [(Path, "read_text"), (Path, "read_bytes"), (np, "load")]
)
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_set_that_cannot_be_opened_for_want_of_handles_is_not_damaged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: list[Path],
    owner: Any,
    reader: str,
    number: int,
) -> None:
    wanted = plan(folder_of_text(tmp_path / "text"))
    made = kept_set(wanted, [tmp_path])
    whole = content(made.folder)

    def planted(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(owner, reader, planted)
        for find in (find_set, kept_set):
            with pytest.raises(OSError, match=os.strerror(number)):
                find(wanted, [tmp_path, tmp_path / "other"])
        # It came to be after this run had looked for it.
        patch.setattr(kept_sets, "_first_whole", lambda *_: None)
        with pytest.raises(OSError, match=os.strerror(number)):
            kept_set(wanted, [tmp_path, tmp_path / "other"])
    assert content(made.folder) == whole
    kept_set(wanted, [tmp_path])
    assert written == [made.folder]


def test_no_handles_for_a_lock_are_no_reason_to_prepare_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[Path]
) -> None:
    wanted = plan(folder_of_text(tmp_path / "text"))
    opened = Path.open

    def planted(path: Path, *how: Any, **more: Any) -> Any:
        if path.suffix == ".lock":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", planted)
    with pytest.raises(OSError, match=r"Too many open files: .*cache/sets/.*\.lock"):
        kept_set(wanted, [tmp_path / "cache", tmp_path / "work"])
    assert not written
    assert not (tmp_path / "work").exists()


def test_a_second_run_waits_and_finds_the_set(tmp_path: Path, written: list[Path]) -> None:
    wanted = plan(folder_of_text(tmp_path / "text"))
    begun, waits = threading.Event(), threading.Event()
    said: dict[str, list[str]] = {"first": [], "second": []}

    def first(stage: str, *_: Any) -> None:
        if stage == "vocabulary":
            begun.set()
            assert waits.wait(60)

    def second(line: str) -> None:
        said["second"].append(line)
        waits.set()

    runs = [
        threading.Thread(target=kept_set, args=(wanted, [tmp_path], *how))
        for how in ((first, said["first"].append), (lambda *_: None, second))
    ]
    runs[0].start()
    assert begun.wait(60)
    runs[1].start()
    for run in runs:
        run.join(60)
    (out,) = written
    assert said["first"][0].endswith(f"prepared in {out}")
    waiting, found = said["second"]
    assert waiting == f"another run prepares this text in {part_of(out)}; waiting for it"
    assert found.endswith(f"from {out}")


@pytest.mark.parametrize("fault", ["file", "full"])
def test_a_cache_that_takes_no_more_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    wanted, notes = plan(folder_of_text(tmp_path / "text")), []
    cache, work = tmp_path / "cache", tmp_path / "work"
    allocate = os.posix_fallocate

    def full(handle: int, *rest: int) -> None:
        if str(cache) in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(handle, *rest)

    if fault == "file":
        cache.write_text("")
    else:
        monkeypatch.setattr(os, "posix_fallocate", full)
    made = kept_set(wanted, [cache, work], note=notes.append)
    assert made.folder.parent == work / "sets"
    assert re.match(rf"{cache}.*: .*, so the text is prepared in {made.folder}$", notes[0])
    assert notes[1].endswith(f"prepared in {made.folder}")
    assert fault == "file" or not list(cache.glob("sets/[!.]*"))  # what is no use there is gone
    kept_set(wanted, [cache, work], note=notes.append)
    assert notes[2].endswith(f"from {made.folder}")
    with pytest.raises(InputError, match=r"so the text cannot be prepared; name another --cache"):
        kept_set(plan(tmp_path / "text", splits={}), [cache])


def test_a_run_goes_on_where_it_was_begun(tmp_path: Path, written: list[Path]) -> None:
    wanted = plan(folder_of_text(tmp_path / "text"))
    cache, work = tmp_path / "cache", tmp_path / "work"

    def stop(stage: str, *_: Any) -> None:
        if stage == "encoding":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_set(wanted, [work], stop)
    assert kept_set(wanted, [cache, work]).folder.parent == work / "sets"


def test_a_killed_run_leaves_its_part_and_the_next_goes_on(tmp_path: Path) -> None:
    folder_of_text(tmp_path / "text")
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from taskmoe.tests.wmt.test_kept_sets import blocks, kept_set, plan\n"
        "blocks.LINES = 64\n"
        "def report(stage, done, total):\n"
        "    if stage == 'encoding' and done > 100:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "at = Path(sys.argv[1])\n"
        "kept_set(plan(at / 'text', vocabulary=330), [at / 'cache'], report)\n"
    )
    env = os.environ | {"PYTHONPATH": str(support.ROOT / ".types"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, timeout=100)
    assert done.returncode == -signal.SIGKILL
    (part,) = (tmp_path / "cache" / "sets").glob("*.part")
    encoded = len(list(part.glob("*/*.rows.npz")))
    assert encoded > 1
    stages: list[int] = []

    def report(stage: str, at: int, total: int | None) -> None:
        assert not stage.startswith("reading") or at == 0
        if stage == "encoding":
            stages.append(at)

    wanted = plan(tmp_path / "text", vocabulary=330)
    made = kept_set(wanted, [tmp_path / "cache"], report)
    assert stages[0] > 100  # what was encoded is not encoded again
    assert content(made.folder) == content(prepare(tmp_path / "set", wanted).folder)
    assert not part.exists()


def test_little_text_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise RuntimeError("a process was started")

    monkeypatch.setattr(working.concurrent.futures, "ProcessPoolExecutor", start)
    wanted = plan(folder_of_text(tmp_path / "text"))
    prepare(tmp_path / "one", wanted, None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(preparing, "_FEW", 100)
    with pytest.raises(RuntimeError, match="a process was started"):
        prepare(tmp_path / "two", wanted, None)


# The command

SMALL = {"d_model": 16, "d_ff": 16, "num_heads": 2, "num_experts": 4, "vocab_size": 330}
TRAINING: dict[str, Any] = {"batch_tokens": 512, "buckets": (16,), "checkpoint_every": 2}


def words(tmp_path: Path, steps: int, *more: str) -> list[str]:
    found = ["train", "--data", str(tmp_path / "text"), "--pairs", ",".join(PAIRS)]
    found += ["--workdir", str(tmp_path / "work"), "--cache", str(tmp_path / "cache")]
    for name, value in {**SMALL, **TRAINING, "buckets": 16}.items():
        found += ["--set", f"{name}={value}"]
    return [*found, "--steps", str(steps), *more]


def test_training_prepares_its_text_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], written: list[Path]
) -> None:
    folder_of_text(tmp_path / "text")
    assert main(words(tmp_path, 2, "--validate-every", "2")) == 0
    assert f"and text prepared in {written[0]}\n" in capfd.readouterr().out
    assert main(words(tmp_path, 4, "--validate-every", "2")) == 0
    printed = capfd.readouterr().out
    assert f"and text from {written[0]}\n" in printed
    assert "resuming at step 2 of 4" in printed
    assert len(written) == 1
    # Without the cache it goes on too, by its own vocabulary.
    shutil.rmtree(tmp_path / "cache")
    assert main(words(tmp_path, 6, "--validate-every", "2")) == 0
    assert "resuming at step 4 of 6" in capfd.readouterr().out
    assert main(words(tmp_path, 6, "--validate-every", "2")) == 0
    assert len(written) == 2
    assert main(words(tmp_path, 1, "--init", str(tmp_path / "work"), "--workdir",
                      str(tmp_path / "new"))) == 0  # fmt: skip
    assert len(written) == 2  # it has the same text and vocabulary


def test_training_where_the_cache_cannot_be_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], written: list[Path]
) -> None:
    folder_of_text(tmp_path / "text")
    (tmp_path / "cache").write_text("")
    assert main(words(tmp_path, 2)) == 0
    printed = capfd.readouterr().out
    assert f"{tmp_path}/cache/sets: Not a directory, so the text is prepared in" in printed
    assert main(words(tmp_path, 4)) == 0
    assert f"from {tmp_path}/work/sets/" in capfd.readouterr().out
    assert len(written) == 1
    nowhere = words(tmp_path, 2, "--workdir", str(tmp_path / "cache" / "work"))
    assert main(nowhere) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "Not a directory" in line


@pytest.mark.parametrize(("told", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_text_is_prepared(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    told: signal.Signals,
    code: int,
) -> None:
    folder_of_text(tmp_path / "text")
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "drawn_vocabulary", lambda *_: signal.raise_signal(told))
        assert main(words(tmp_path, 2)) == code
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(": what was done is kept; the same command goes on")
    assert not (tmp_path / "work").exists()
    assert list(tmp_path.glob("cache/sets/*.part/*/read.json"))
    assert main(words(tmp_path, 2)) == 0


def in_memory(tmp_path: Path, workdir: Path, steps: int) -> Tokenizer:
    """A run as older versions began it: with text that was encoded into memory."""
    sources = open_sources([str(tmp_path / "text")])
    sizes, trained = PRESETS["tiny"]
    config = TrainConfig(**{**trained, **TRAINING, "steps": steps})
    read = read_all(sources, "train", PAIRS)
    text, _ = clean(read, config, read_held_out(sources, {"en", "de"}))
    lines = {"de": text["en-de"][1], "en": text["en-de"][0]}
    made = train_tokenizer(lines, SMALL["vocab_size"], seed=7)  # not what is made today
    workdir.mkdir(exist_ok=True)
    (workdir / "spm.model").write_bytes(made.model)
    model = ModelConfig(**{**sizes, "pairs": PAIRS, **SMALL})
    data = TrainingData.encoded(text, made, config)
    mesh = parallel.make_mesh()
    train(workdir, model, config, data, made, source=sources[0].identity, mesh=mesh)
    return made


def test_a_run_that_an_older_version_began_goes_on_bit_for_bit(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder_of_text(tmp_path / "text")
    own = in_memory(tmp_path, tmp_path / "work", 4)
    in_memory(tmp_path, tmp_path / "whole", 8)
    capfd.readouterr()
    assert main(words(tmp_path, 8)) == 0
    assert "resuming at step 4 of 8" in capfd.readouterr().out
    (one,) = (tmp_path / "cache" / "sets").glob("*/spm.model")
    assert one.read_bytes() == own.model
    trained = [tmp_path / name / "model" / "params.safetensors" for name in ("work", "whole")]
    assert trained[0].read_bytes() == trained[1].read_bytes()
    lines = [json.loads(x) for x in (tmp_path / "work/log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 8
    for file in (tmp_path / "text").glob("train.*"):  # planted: a line more
        file.write_text(file.read_text() + "one more\n")
    assert main(words(tmp_path, 12)) == 2
    assert "go on with this one by --allow text" in capfd.readouterr().err
