"""Scores of a run while it trains: the best model is kept, and a run that no longer gains ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from taskmoe.cli.command_line import write_text
from taskmoe.cli.errors import InputError
from taskmoe.wmt.model.saved import Model, save_model


class Validation(NamedTuple):
    """How a run is scored.

    score: model -> BLEU, or any number of which more is better. every: steps between scores; the
    last step is scored too. patience: scores in a row without a new best after which the run ends,
    None for never. text: says what the score is of, such as a hash; scores of different text are
    not compared.
    """

    score: Callable[[Model], float]
    every: int
    patience: int | None = None
    text: str = ""

    def is_due(self, step: int, steps: int) -> bool:
        """Whether a step is scored."""
        return step % self.every == 0 or step == steps


class History:
    """The scores of a work directory, in `scores.json`, and its best model, in `best`."""

    def __init__(self, workdir: Path, step: int, text: str | None) -> None:
        """Scores up to a step that the run goes on from; later ones will be taken anew.

        text: what new scores are of, None where there will be none.
        Raises InputError where the file is damaged or its scores are of another text.
        """
        self._workdir, self._text = workdir, text
        self._path = workdir / "scores.json"
        self.scores: dict[int, float] = {}
        if self._path.is_file():
            try:
                file = json.loads(self._path.read_text(encoding="utf-8"))
                found = {int(at): float(score) for at, score in file["scores"].items()}
                of = str(file["text"])
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise InputError(f"{self._path} is damaged: {error}") from None
            self.scores = {at: score for at, score in found.items() if at <= step}
            if self.scores and text not in (None, of):
                raise InputError(
                    f"the scores in {self._path} are of other valid text; give the same text and "
                    "--validate-sentences, or remove that file to begin anew"
                )

    def add(self, step: int, score: float, model: Model) -> bool:
        """Note a score, keep the model if it is the best; returns whether it is."""
        best = not self.scores or score > max(self.scores.values())
        if best:  # before the score: a run killed in between scores this step again
            save_model(model, self._workdir / "best", replace=True)
        self.scores[step] = score
        kept = {"text": self._text, "scores": self.scores}
        write_text(self._path, json.dumps(kept, indent=2) + "\n")
        return best

    @property
    def best(self) -> tuple[int, float]:
        """Step and score of the best, the first of equals; (0, -inf) where there is none."""
        return max(self.scores.items(), key=lambda item: item[1], default=(0, float("-inf")))

    def without_gain(self) -> int:
        """Scores since the best."""
        return sum(step > self.best[0] for step in self.scores)
