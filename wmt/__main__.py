"""Command line: `python -m taskmoe.wmt prepare | train | evaluate | translate | extract`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from taskmoe.wmt import cldr
from taskmoe.wmt.command_line import Parser, write_bytes, write_text
from taskmoe.wmt.config import PRESETS, ModelConfig, SideRouting, TrainConfig, split_pair
from taskmoe.wmt.data import Pairs, TrainingData, available_pairs, read_pairs
from taskmoe.wmt.devices import use_present_devices
from taskmoe.wmt.errors import InputError
from taskmoe.wmt.model import Model, load_model, save_model
from taskmoe.wmt.progress import bar
from taskmoe.wmt.scoring import Score, averages, score
from taskmoe.wmt.subnetwork import extract
from taskmoe.wmt.tokenizer import Tokenizer, train_tokenizer
from taskmoe.wmt.training import Progress, check_workdir, train
from taskmoe.wmt.transformer import param_count
from taskmoe.wmt.translation import Decoding, translate

out = Console(soft_wrap=True, highlight=False)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, or 2 after one line on stderr where the input does not fit."""
    parser = Parser(prog="python -m taskmoe.wmt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (run, add) in COMMANDS.items():
        add(commands.add_parser(name, help=run.__doc__, description=run.__doc__))
    arguments = parser.parse_args(argv)
    use_present_devices()
    try:
        COMMANDS[arguments.command][0](arguments)
    except (InputError, FloatingPointError, OSError) as error:
        line = " ".join(str(error).split())
        print(f"{parser.prog} {arguments.command}: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; a work directory goes on from its newest checkpoint", file=sys.stderr)
        return 130
    return 0


def _prepare(a: argparse.Namespace) -> None:
    """Write the embedded CLDR corpus, 30 directions, into a folder."""
    config = _build(cldr.CldrConfig, {"seed": a.seed})
    with bar("writing the corpus", "sentences") as progress:
        _own_words(cldr.write_corpus, a.out, config, progress=progress)
    table = Table("pair", "train", "valid", "test", title=str(a.out))
    for language in cldr.LANGUAGES:
        counts = [_count(a.out / f"{s}.en-{language}.en") for s in ("train", "valid", "test")]
        table.add_row(f"en-{language}", *(f"{n:,}" for n in counts))
    out.print(table)


def _train(a: argparse.Namespace) -> None:
    """Train a model up to --steps in all; a run that was stopped goes on where it was."""
    folder, pairs = _data(a, "train", None)
    text = read_pairs(folder, "train", pairs)
    model_fields, train_fields = (dict(fields) for fields in PRESETS[a.config])
    for name, value in map(_override, a.set):
        homes = ((ModelConfig, model_fields), (TrainConfig, train_fields))
        home = next((f for cls, f in homes if name in cls.__dataclass_fields__), None)
        if home is None or name == "pairs":
            raise InputError(f"--set: no field {name!r} of ModelConfig or TrainConfig to set")
        home[name] = value
    for name in ("encoder", "decoder"):
        if getattr(a, name) is not None:
            model_fields[name] = getattr(a, name)
    for name in ("steps", "seed"):
        if getattr(a, name) is not None:
            train_fields[name] = getattr(a, name)
    train_config = _build(TrainConfig, train_fields)
    model_config = _build(ModelConfig, {"pairs": pairs, **model_fields})

    source = str(folder.resolve())
    begun = check_workdir(a.workdir, model_config, train_config, source)
    vocabulary = a.workdir / "spm.model"
    if begun:
        tokenizer = Tokenizer.load(vocabulary)
    else:
        tokenizer = _tokenizer(text, model_config.vocab_size, train_config)
    data = TrainingData(text, tokenizer, train_config)
    if not begun:  # all input is read and fits: only now is anything written
        write_bytes(vocabulary, tokenizer.model)
    table = Table("direction", "sentences", "too long", title=f"{folder}")
    for pair, size in data.sizes.items():
        table.add_row(pair, f"{size:,}", f"{data.too_long[pair]:,}")
    out.print(table)

    with bar("training", "steps", enabled=sys.stderr.isatty()) as progress:

        def report(p: Progress) -> None:
            progress(p.step, p.steps)
            router = f"  busiest expert {p.busiest:.2f}x" if p.busiest else ""
            speed = f"{p.tokens_per_s:,.0f} tokens/s"
            out.print(f"step {p.step}/{p.steps}  loss {p.loss:.3f}  {speed}{router}")

        model = train(
            a.workdir,
            model_config,
            train_config,
            data,
            tokenizer,
            source=source,
            report=report,
            note=out.print,
        )
    out.print(f"{param_count(model.params):,} parameters in {a.workdir / 'model'}")


def _evaluate(a: argparse.Namespace) -> None:
    """Translate a split and print BLEU for each direction with sacreBLEU's signature."""
    model = _load(a.model)
    folder, pairs = _data(a, a.split, model)
    text = read_pairs(folder, a.split, pairs)
    if a.limit is not None:
        text = {p: (s[: a.limit], t[: a.limit]) for p, (s, t) in text.items()}
    requests = [(pair, line) for pair, (source, _) in text.items() for line in source]
    with bar("translating", "sentences", enabled=sys.stderr.isatty()) as progress:
        found = iter(translate(model, requests, _decoding(a), progress))
    scores: dict[str, Score] = {}
    table = Table("direction", "BLEU", "sentences", title=f"{a.model} on {folder}, {a.split}")
    for pair, (_, references) in text.items():
        scores[pair] = score(pair, [next(found) for _ in references], references)
        table.add_row(pair, f"{scores[pair].bleu:.2f}", str(scores[pair].sentences))
    for name, value in averages(scores).items():
        table.add_row(f"average {name}", f"{value:.2f}", "")
    out.print(table)
    for signature in sorted({s.signature for s in scores.values()}):
        out.print(f"signature: {signature}")
    if a.json is not None:
        result = {
            "model": str(a.model),
            "scores": {p: s._asdict() for p, s in scores.items()},
            "averages": averages(scores),
        }
        write_text(a.json, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def _translate(a: argparse.Namespace) -> None:
    """Translate lines from a file or standard input to standard output, in their order."""
    model = _load(a.model)
    pair = a.pair or (model.config.pairs[0] if len(model.config.pairs) == 1 else None)
    if pair is None:
        raise InputError(f"--pair must say which of {', '.join(model.config.pairs)}")
    _pair(pair)
    stream = sys.stdin.buffer.read() if a.input is None else _read_bytes(a.input)
    try:
        lines = stream.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        line = stream.count(b"\n", 0, error.start) + 1
        name = a.input or "standard input"
        raise InputError(f"{name}, line {line}: not valid UTF-8 ({error.reason})") from None
    if lines[-1] == "":
        lines.pop()
    with bar("translating", "sentences", enabled=sys.stderr.isatty()) as progress:
        found = translate(model, [(pair, line) for line in lines], _decoding(a), progress)
    sys.stdout.write("".join(f"{line}\n" for line in found))


def _extract(a: argparse.Namespace) -> None:
    """Cut one task's sub-network out of a model into a model folder of its own."""
    model = _load(a.model)
    small = extract(model, a.task)
    save_model(small, a.out)
    before, after = param_count(model.params), param_count(small.params)
    out.print(
        f"{a.out}: task {a.task}, directions {', '.join(small.config.pairs)}; "
        f"{after:,} of {before:,} parameters"
    )


def _add_data(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", required=True, help="folder of parallel text, or cldr (embedded)")
    p.add_argument("--pairs", help="directions like en-de,de-en; all that there are by default")


def _add_decoding(p: argparse.ArgumentParser) -> None:
    p.add_argument("--beam", type=int, default=4, help="hypotheses; 1 is greedy (default 4)")
    p.add_argument("--alpha", type=float, default=0.6, help="length penalty (default 0.6)")
    p.add_argument("--batch", type=int, default=64, help="sentences at once (default 64)")


def _add_prepare(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--seed", type=int, default=0)


def _add_train(p: argparse.ArgumentParser) -> None:
    _add_data(p)
    p.add_argument("--config", choices=list(PRESETS), default="tiny")
    p.add_argument("--workdir", type=Path, required=True, help="checkpoints, log and model")
    p.add_argument("--steps", type=int, help="optimiser steps in all, resumed ones included")
    p.add_argument("--seed", type=int)
    for side in ("encoder", "decoder"):
        p.add_argument(
            f"--{side}", choices=get_args(SideRouting), help="routing; target by default"
        )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="override a field of ModelConfig or TrainConfig; may be given again",
    )


def _add_evaluate(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", type=Path, required=True, help="model folder or work directory")
    _add_data(p)
    p.add_argument("--split", choices=("valid", "test", "train"), default="valid")
    p.add_argument("--limit", type=int, help="first sentences of each direction only")
    _add_decoding(p)
    p.add_argument("--json", type=Path, help="write the scores here too")


def _add_translate(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", type=Path, required=True, help="model folder or work directory")
    p.add_argument("--pair", help="direction; not needed where the model knows but one")
    p.add_argument("--input", type=Path, help="file with a sentence a line; default stdin")
    _add_decoding(p)


def _add_extract(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", type=Path, required=True, help="model folder or work directory")
    p.add_argument("--task", required=True, help="a task of the model such as de, or en-de")
    p.add_argument("--out", type=Path, required=True, help="new model folder")


COMMANDS = {
    "prepare": (_prepare, _add_prepare),
    "train": (_train, _add_train),
    "evaluate": (_evaluate, _add_evaluate),
    "translate": (_translate, _add_translate),
    "extract": (_extract, _add_extract),
}


def _data(a: argparse.Namespace, split: str, model: Model | None) -> tuple[Path, tuple[str, ...]]:
    """The folder that --data names and the directions to use."""
    if a.data == "cldr":
        folder = (a.workdir if model is None else a.model) / "data"
        with bar("writing the corpus", "sentences") as progress:
            _own_words(cldr.write_corpus, folder, cldr.CldrConfig(), progress=progress)
    else:
        folder = Path(a.data)
    if not folder.is_dir():
        raise InputError(f"data folder {folder} is not there")
    known = available_pairs(folder, split)
    if a.pairs:
        pairs = tuple(_pair(p) for p in a.pairs.split(","))
        if len(set(pairs)) != len(pairs):
            raise InputError(f"--pairs names a direction twice: {a.pairs}")
    elif model is not None:
        pairs = tuple(p for p in model.config.pairs if p in known) or model.config.pairs
    else:
        pairs = tuple(known)
    if not pairs:
        raise InputError(f"{folder} has no {split} files of any pair")
    return folder, pairs


def _pair(pair: str) -> str:
    _own_words(split_pair, pair)
    return pair


def _tokenizer(text: Pairs, size: int, config: TrainConfig) -> Tokenizer:
    """A vocabulary trained on the text of all directions, each sentence once a language."""
    lines: dict[str, list[str]] = {}
    for pair, sides in text.items():
        for language, side in zip(split_pair(pair), sides, strict=True):
            lines.setdefault(language, []).extend(side)
    lines = {language: list(dict.fromkeys(every)) for language, every in lines.items()}
    with out.status("training the vocabulary"):
        return train_tokenizer(lines, size, temperature=config.temperature, seed=config.seed)


def _load(folder: Path) -> Model:
    """A model folder, or the model of a work directory."""
    if (folder / "checkpoints").is_dir() and not (folder / "model").is_dir():
        raise InputError(f"{folder} has no model yet: run train on it to its last step")
    return load_model(folder / "model" if (folder / "model").is_dir() else folder)


def _decoding(a: argparse.Namespace) -> Decoding:
    return _build(Decoding, {"beam": a.beam, "alpha": a.alpha, "batch": a.batch})


def _build(cls: Any, fields: dict[str, Any]) -> Any:
    """A dataclass from a person's words: what does not fit is an InputError."""
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise InputError(str(error).replace(f"{cls.__name__}.__init__() got an ", "")) from None


def _own_words(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call with a person's words: a ValueError is theirs."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise InputError(str(error)) from None


def _override(item: str) -> tuple[str, Any]:
    name, equals, value = item.partition("=")
    if not equals:
        raise InputError(f"--set wants FIELD=VALUE, got {item!r}")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    return name, tuple(parsed) if isinstance(parsed, list) else parsed


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


if __name__ == "__main__":
    sys.exit(main())
