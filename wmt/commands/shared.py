"""What the commands share: arguments, data and models by name, and errors in a person's words."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from taskmoe.cli.errors import InputError
from taskmoe.wmt.model.saved import Model, load_model
from taskmoe.wmt.model.translation import Decoding
from taskmoe.wmt.text.scoring import TOKENIZERS
from taskmoe.wmt.training.workdir import SIZES, interrupted_model

out = Console(soft_wrap=True, highlight=False, markup=False)


def add_decoding(p: argparse.ArgumentParser) -> None:
    """Arguments of beam search."""
    p.add_argument("--beam", type=int, default=4, help="hypotheses; 1 is greedy (default 4)")
    p.add_argument("--alpha", type=float, default=0.6, help="length penalty (default 0.6)")
    p.add_argument("--batch", type=int, default=64, help="sentences at once (default 64)")
    p.add_argument(
        "--max-source",
        type=int,
        default=512,
        metavar="N",
        help="source tokens; what a sentence has beyond is cut off, and said (default 512)",
    )


def add_tokenize(p: argparse.ArgumentParser) -> None:
    """How text is cut into words for BLEU."""
    p.add_argument(
        "--tokenize",
        choices=TOKENIZERS,
        help="cut words for BLEU so (default: zh, ja-mecab or ko-mecab for Chinese, Japanese, "
        "Korean, else intl; 13a is sacreBLEU's own default)",
    )


def check_limit(limit: int | None) -> None:
    """Raise InputError where --limit leaves no sentence."""
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1, got {limit}")


def sizes_of(folder: Path) -> dict[str, int]:
    """Sentence pairs of each direction that a model was trained on; {} if unknown."""
    for path in (folder / SIZES, folder.parent / SIZES):
        if path.is_file():
            try:
                return {str(pair): int(n) for pair, n in json.loads(path.read_text()).items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise InputError(f"{path} is damaged: {error}") from None
    return {}


def sizes_file(folder: Path) -> dict[str, bytes]:
    """What `sizes_of` says, as a file to lie in a folder of a model made from that one."""
    sizes = sizes_of(folder)
    return {SIZES: (json.dumps(sizes, indent=2) + "\n").encode()} if sizes else {}


def load(folder: Path) -> Model:
    """A model folder, or the model of a work directory: of a run that goes on, its newest."""
    if (folder / "model").is_dir():
        return load_model(folder / "model")
    if (folder / "checkpoints").is_dir():
        step, model = interrupted_model(folder)
        print(f"{folder} is not trained to its end: the model of step {step}", file=sys.stderr)
        return model
    return load_model(folder)


def decoding(a: argparse.Namespace) -> Decoding:
    """What the arguments of `add_decoding` say."""
    fields = ("beam", "alpha", "batch", "max_source")
    return build(Decoding, {name: getattr(a, name) for name in fields})


def build(cls: Any, fields: dict[str, Any]) -> Any:
    """A dataclass from a person's words: what does not fit is an InputError."""
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise InputError(str(error).replace(f"{cls.__name__}.__init__() got an ", "")) from None


def own_words(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call with a person's words: a ValueError is theirs."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise InputError(str(error)) from None


def override(item: str) -> tuple[str, Any]:
    """FIELD=VALUE of --set as a name and a value: JSON, or a word as it is."""
    name, equals, value = item.partition("=")
    if not equals:
        raise InputError(f"--set wants FIELD=VALUE, got {item!r}")
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = value
    return name, tuple(parsed) if isinstance(parsed, list) else parsed
