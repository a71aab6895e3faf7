"""What the commands share: arguments, data and models by name, and errors in a person's words."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from taskmoe.cli.errors import InputError
from taskmoe.moe.exchange import STRATEGIES
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.beams import HERE, Spread
from taskmoe.wmt.model.saved import Model, load_model
from taskmoe.wmt.model.shortlist import Shortlist
from taskmoe.wmt.model.translation import Decoding
from taskmoe.wmt.text.scoring import TOKENIZERS
from taskmoe.wmt.training.parallel import (
    check_mesh,
    exchange_table,
    make_mesh,
    spread_model,
)
from taskmoe.wmt.training.workdir import SIZES, interrupted_model

out = Console(soft_wrap=True, highlight=False, markup=False)
err = Console(soft_wrap=True, highlight=False, markup=False, stderr=True)


def add_decoding(p: argparse.ArgumentParser) -> None:
    """Arguments of beam search."""
    p.add_argument("--beam", type=int, default=4, help="hypotheses; 1 is greedy")
    p.add_argument("--alpha", type=float, default=0.6, help="length penalty")
    p.add_argument("--batch", type=int, default=64, help="sentences at once")
    p.add_argument(
        "--max-source",
        type=int,
        default=512,
        metavar="N",
        help="source tokens; what a sentence has beyond is cut off, and said",
    )

    p.add_argument(
        "--shortlist",
        type=Path,
        metavar="FILE",
        help="look at few words of the vocabulary, which `shortlist` wrote into FILE: faster",
    )


def add_tokenize(p: argparse.ArgumentParser) -> None:
    """How text is cut into words for BLEU."""
    p.add_argument(
        "--tokenize",
        choices=TOKENIZERS,
        help="cut words for BLEU so (default: zh, ja-mecab or ko-mecab for Chinese, Japanese, "
        "Korean, else intl; 13a is sacreBLEU's own default)",
    )


def add_expert_parallel(p: argparse.ArgumentParser) -> None:
    """Devices that share experts, and how rows travel between them."""
    p.add_argument(
        "--expert-parallel",
        type=int,
        default=1,
        metavar="N",
        help="devices that share the experts of a mixture",
    )
    p.add_argument(
        "--exchange",
        choices=("auto", *STRATEGIES),
        default="auto",
        help="how rows travel to their experts; auto sends and holds the fewest",
    )


def spread(a: argparse.Namespace, model: Model) -> tuple[Model, Spread]:
    """The model with its experts over --expert-parallel devices, and where they lie."""
    if a.expert_parallel == 1:
        return model, HERE
    mesh = make_mesh(1, a.expert_parallel)
    check_mesh(mesh, model.config)
    params = spread_model(model.params, model.config, mesh)
    for side in ("encoder", "decoder"):
        if model.config.moe(side) is None:
            continue
        at_once = {f"{a.batch} sentences": (a.batch * (a.beam if side == "decoder" else 1), 1)}
        print_exchange(model.config, mesh, a.exchange, at_once, (side,), err)
    return dataclasses.replace(model, params=params), Spread(mesh, a.exchange)


def print_exchange(
    config: ModelConfig,
    mesh: Mesh | None,
    strategy: str,
    batches: Mapping[str, tuple[int, int]],
    sides: Sequence[str] = ("encoder", "decoder"),
    console: Console = out,
) -> None:
    """What `parallel.exchange_table` knows, a line a side."""
    rows = exchange_table(config, mesh, strategy, batches)
    for side in sides:
        said = [f"{name} {how} {mb:.3g} MB" for name, at, how, mb in rows if at == side]
        if said:
            console.print(f"exchange, {side}, a layer and device: {', '.join(said)}")


def check_needed(a: argparse.Namespace, needed: str, *names: str) -> None:
    """Raise InputError where arguments were given that do nothing without one.

    Those that are not given are None or [].
    """
    if getattr(a, needed) is not None:
        return
    for name in names:
        if getattr(a, name) not in (None, []):
            raise InputError(f"{_flag(name)} needs {_flag(needed)}")


def check_apart(a: argparse.Namespace, chosen: str, *names: str) -> None:
    """As `check_needed`, where they do nothing beside one, such as --text."""
    if not getattr(a, chosen):
        return
    for name in names:
        if getattr(a, name) is not None:
            raise InputError(f"{_flag(name)} does nothing with {_flag(chosen)}; leave one out")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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


def decoding(a: argparse.Namespace, model: Model) -> Decoding:
    """What the arguments of `add_decoding` say, for a model."""
    fields: dict[str, Any] = {n: getattr(a, n) for n in ("beam", "alpha", "batch", "max_source")}
    if a.shortlist is not None:
        fields["shortlist"] = Shortlist.load(a.shortlist, model.tokenizer)
    return build(Decoding, fields)


#: Fields that have an argument of their own -> that argument.
FLAGS = {"steps": "--steps", "seed": "--seed", "beam": "--beam", "alpha": "--alpha"}
FLAGS |= {"batch": "--batch", "max_source": "--max-source"}


def build(cls: Any, fields: dict[str, Any]) -> Any:
    """A dataclass from a person's words: what does not fit is an InputError that names the flag."""
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        name, space, rest = str(error).partition(" ")
        flag = FLAGS.get(name, f"--set {name}" if name in cls.__dataclass_fields__ else name)
        raise InputError(f"{flag}{space}{rest}") from None


def own_words(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call with a person's words: a ValueError is theirs."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise InputError(str(error)) from None
