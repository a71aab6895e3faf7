"""An engine in a process of its own: what it translates, how long it takes and what memory.

Started with the engine's name and the folder that `write_workload` filled. A question is
{"batches": [...], "beam": K, "timed": bool}; the answer is what was found, or the seconds of each
batch, and the most memory that the process had meanwhile beyond what its libraries take.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from taskmoe.bench.harness.worker import Worker, serve
from taskmoe.bench.serving.serve import engines
from taskmoe.bench.serving.serve.engines import OURS, THEIRS, Batch, Ids, Translate
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.ctranslate2_export import VOCABULARY_MAP, specification
from taskmoe.wmt.model.quantization import quantized
from taskmoe.wmt.model.saved import flatten, structure_of
from taskmoe.wmt.model.transformer import Params

LEAST_S = 0.5


class Engine(Worker):
    """The process of an engine. names as in `engines`; folder: what `write_workload` filled."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__("taskmoe.bench.serving.serve.worker", [name, str(folder)])

    def translate(self, batches: list[Batch], beam: int) -> Any:
        """{"found": ids of every batch, "memory_bytes": of the process at most}."""
        return self._ask(batches, beam, timed=False)

    def time(self, batches: list[Batch], beam: int) -> list[float]:
        """Seconds of each batch."""
        return list(self._ask(batches, beam, timed=True)["seconds"])

    def _ask(self, batches: list[Batch], beam: int, timed: bool) -> Any:
        every = [dataclasses.asdict(batch) for batch in batches]
        return self.ask({"batches": every, "beam": beam, "timed": timed})


@dataclasses.dataclass(frozen=True)
class Workload:
    """A dense network, its vocabulary, and what it translates.

    ends: translations end by `</s>`. words: ids that the softmax looks at; None is all.
    """

    params: Params
    config: ModelConfig
    pieces: list[str]
    sentences: Ids
    source: str
    ends: bool
    words: list[int] | None = None


def write_workload(folder: Path, work: Workload, positions: int | None) -> None:
    """What the processes read; positions: of CTranslate2's table, None leaves its files out."""
    fields = {"config": work.config.to_json(), "pieces": work.pieces, "words": work.words}
    (folder / "workload.json").write_text(json.dumps(fields), encoding="utf-8")
    for name, tree in (("float32", work.params), ("int8", quantized(work.params))):
        arrays = {k: np.asarray(v) for k, v in flatten(tree).items()}
        save_file(arrays, folder / f"{name}.safetensors")
    if positions is not None:
        spec = specification(work.params, work.config, work.pieces, positions)
        (folder / "ctranslate2").mkdir()
        spec.save(str(folder / "ctranslate2"))
        if work.words is not None:
            line = f"\t{' '.join(work.pieces[i] for i in work.words)}\n"
            (folder / "ctranslate2" / VOCABULARY_MAP).write_text(line, encoding="utf-8")


def engine(name: str, folder: Path) -> Translate:
    """The engine of that name, loaded."""
    work = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
    if name in THEIRS:
        return engines.theirs(folder / "ctranslate2", THEIRS[name], work["pieces"])
    config = ModelConfig.from_dict(json.loads(work["config"]))
    arrays: Mapping[str, np.ndarray] = load_file(folder / f"{OURS[name]}.safetensors")
    template = structure_of(config, int8=OURS[name] == "int8")
    leaves = [jax.numpy.asarray(arrays[name]) for name in flatten(template)]
    params = jax.tree.unflatten(jax.tree.structure(template), leaves)
    words = None if work["words"] is None else np.array(work["words"], np.int32)
    return engines.ours(params, config, words)


def answered(translate: Translate, libraries: int, question: Any) -> Iterator[dict[str, Any]]:
    """Translate the batches of a question."""
    batches = [Batch(**fields) for fields in question["batches"]]
    beam = question["beam"]
    if question["timed"]:
        yield {"seconds": seconds(translate, batches, beam)}
        return
    for batch in batches:  # what is compiled now takes memory that serving does not
        translate(batch, beam)
    _forget_peak()
    found = [row for batch in batches for row in translate(batch, beam)]
    # A system that is short of memory takes pages of the libraries back.
    yield {"found": found, "memory_bytes": max(0, peak_bytes() - libraries)}


def seconds(translate: Translate, batches: list[Batch], beam: int) -> list[float]:
    """Of each batch: medians over turns that take `LEAST_S` together.

    The first turn does not count where there are more: it wakes cores and fills caches, which takes
    longer than a small network does.
    """
    turns: list[list[float]] = []
    while sum(map(sum, turns)) < LEAST_S:
        turns.append([_timed(translate, batch, beam) for batch in batches])
    return [float(s) for s in np.median(turns[1:] or turns, axis=0)]


def _timed(translate: Translate, batch: Batch, beam: int) -> float:
    began = time.perf_counter()
    translate(batch, beam)
    return time.perf_counter() - began


def peak_bytes() -> int:
    """The most memory that this process held since `_forget_peak`, or ever where it cannot."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(fields["VmHWM"].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _forget_peak() -> None:
    """On Linux the peak is what is held now."""
    forgets = Path("/proc/self/clear_refs")
    if forgets.exists():
        forgets.write_text("5")


if __name__ == "__main__":
    _forget_peak()
    before = peak_bytes()
    loaded = engine(sys.argv[1], Path(sys.argv[2]))
    sys.exit(serve(lambda question: answered(loaded, before, question)))
