"""Parallel text as the commands' arguments name it: sources, directions, cleaning, vocabulary."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar
from taskmoe.wmt.commands.shared import out
from taskmoe.wmt.config import TrainConfig
from taskmoe.wmt.model.saved import Model
from taskmoe.wmt.text.cleaning import Account, clean
from taskmoe.wmt.text.folders import SPLITS, Pairs
from taskmoe.wmt.text.languages import codes_of, direction
from taskmoe.wmt.text.preparing import Plan
from taskmoe.wmt.text.sources import (
    Source,
    all_pairs,
    names_of,
    no_text,
    open_source,
    open_sources,
    read_all,
    read_held_out,
    read_split,
)
from taskmoe.wmt.text.tokenizer import Tokenizer
from taskmoe.wmt.text.training_set import TrainingSet, is_training_set


def add_data(p: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Arguments that name parallel text."""
    p.add_argument(
        "--data",
        required=required,
        action="append",
        metavar="SOURCE",
        help="a training set or a folder of parallel text, a .tsv file, Moses files NAME.de-en, "
        "hf:NAME/CONFIG (Hugging Face), sacrebleu:NAME (a test set), or cldr (embedded); files may "
        "be gzipped, a pattern like 'corpus/*.tsv' names several, and @valid or @test behind files "
        "or a test set says what they serve as; may be given again",
    )
    p.add_argument(
        "--pairs",
        action="append",
        help="directions like en-de,en-pt-BR, of any two words; all between languages that there "
        "are by default; may be given again",
    )
    p.add_argument(
        "--cache",
        type=Path,
        help="keeps prepared text and the embedded corpus (default $XDG_CACHE_HOME/taskmoe)",
    )


class Named(NamedTuple):
    """What the arguments of `add_data` name: sources, and the directions to train on.

    title: the sources' names. identity: the sources, the same from any working directory. opened:
    the training set that all of it is.
    """

    sources: list[Source]
    pairs: tuple[str, ...]
    title: str
    identity: str
    opened: TrainingSet | None = None


def training_set(a: argparse.Namespace) -> TrainingSet | None:
    """The training set that --data names; None where it names other sources.

    Raises InputError where it names both.
    """
    sets = [word for word in a.data if is_training_set(Path(word))]
    if not sets:
        return None
    if len(a.data) > 1:
        other = next(word for word in a.data if word != sets[0])
        raise InputError(
            f"--data {other}: a training set, {sets[0]}, is all the text of a run; prepare one of "
            "both"
        )
    return TrainingSet(Path(sets[0]))


def text_of_set(a: argparse.Namespace, opened: TrainingSet) -> Named:
    """What a training set has for a run in the directions of --pairs, by default in all."""
    there = opened.manifest.directions
    pairs = wanted_pairs(a.pairs, codes_of(there)) or tuple(there)
    if missing := [pair for pair in pairs if pair not in there]:
        raise InputError(
            f"{opened.folder} has no training text of {missing[0]}; it has {', '.join(there)}"
        )
    source = open_source(str(opened.folder), named=codes_of(pairs))
    return Named([source], pairs, str(opened.folder), opened.manifest.identity, opened)


@contextmanager
def named_text(a: argparse.Namespace, config: TrainConfig) -> Iterator[Named]:
    """The sources and directions of a training run, with a bar while they are read.

    Raises InputError for text that is not there, and for a source that has text of none of the
    directions.
    """
    wanted = wanted_pairs(a.pairs)
    with _sources(a, config.max_sentences, codes_of(wanted)) as sources:
        pairs = wanted or choose_pairs(sources, "train", None)
        known = all_pairs(sources, "train")
        if missing := [pair for pair in pairs if pair not in known]:
            raise InputError(no_text(sources, "train", missing[0]))
        for source in sources:
            if not any(set(pairs).intersection(source.pairs(split)) for split in SPLITS):
                raise InputError(f"{source.name} has no text of {', '.join(pairs)}")
        for line in _left_aside(sources, "train"):
            out.print(line)
        identity = " + ".join(source.identity for source in sources)
        yield Named(sources, pairs, names_of(sources), identity)


def training_text(
    a: argparse.Namespace, config: TrainConfig
) -> tuple[Named, Pairs, dict[str, Account]]:
    """Read and clean what the arguments of `add_data` name, all in memory; and its accounts.

    Raises InputError as `named_text` does, and for text that is wrong or nothing after cleaning.
    """
    with named_text(a, config) as named:
        text = read_all(named.sources, "train", named.pairs, config.max_sentences)
        held_out = _held_out(named, config)
    return named, *clean(text, config, held_out)


def text_plan(a: argparse.Namespace, config: TrainConfig, vocabulary: Tokenizer | int) -> Plan:
    """How a training set is made of what the arguments of `add_data` name.

    vocabulary: one that is there, or the size of one to train. Reads the text to score; raises
    InputError as `named_text` does, and where that is wrong.
    """
    with named_text(a, config) as named:
        return Plan(
            named.sources,
            named.pairs,
            _held_out(named, config),
            splits_to_score(named),
            config,
            vocabulary,
            named.title,
            named.identity,
        )


def splits_to_score(named: Named) -> dict[str, Pairs]:
    """Validation and test text, which stays as it is."""
    splits = {}
    for split in ("valid", "test"):
        there = set(all_pairs(named.sources, split))
        splits[split] = read_all(named.sources, split, [p for p in named.pairs if p in there])
    return splits


def _held_out(named: Named, config: TrainConfig) -> dict[str, set[str]]:
    if not config.drop_held_out:
        return {}
    return read_held_out(named.sources, set(codes_of(named.pairs)))


def text_to_score(
    a: argparse.Namespace, split: str, model: Model | None, limit: int | None = None
) -> tuple[Pairs, str]:
    """(a split's text, the sources' names) of what the arguments of `add_data` name.

    limit: lines of a direction to take of each source at most.
    """
    codes = codes_of(model.config.pairs) if model is not None else frozenset()
    wanted = wanted_pairs(a.pairs, codes)
    with _sources(a, limit, codes | codes_of(wanted)) as sources:
        pairs = wanted or choose_pairs(sources, split, model)
        text = read_split(sources, split, pairs, limit)
    for line in _left_aside(sources, split):
        out.print(line)
    return text, names_of(sources)


def wanted_pairs(given: list[str] | None, named: Collection[str] = ()) -> tuple[str, ...]:
    """The directions of --pairs in their order; named: codes that are taken as they stand."""
    words = [word for each in given or () for word in each.split(",")]
    pairs = tuple(direction(word, named) for word in words)
    if twice := [pair for place, pair in enumerate(pairs) if pair in pairs[:place]]:
        raise InputError(f"--pairs names a direction twice: {twice[0]}")
    return pairs


def _left_aside(sources: list[Source], split: str) -> list[str]:
    """What looks like text of a split but is in no language, a line a source."""
    lines = []
    for source in sources:
        if names := source.left_aside(split):
            which = ", ".join(names[:5]) + (f" and {len(names) - 5} more" * (len(names) > 5))
            lines.append(f"{source.name}: left aside, in no language: {which}")
    return lines


def choose_pairs(sources: list[Source], split: str, model: Model | None) -> tuple[str, ...]:
    """The directions of the model that there are, else all there are."""
    known = all_pairs(sources, split)
    if not known:
        aside = "; ".join(_left_aside(sources, split))
        hint = f" ({aside}; --pairs takes any two words for languages)" if aside else ""
        raise InputError(f"{names_of(sources)} has no {split} text of any pair{hint}")
    if model is None:
        return tuple(known)
    return tuple(p for p in model.config.pairs if p in known) or model.config.pairs


@contextmanager
def _sources(
    a: argparse.Namespace, limit: int | None, named: Collection[str]
) -> Iterator[list[Source]]:
    """The sources of --data, with a bar while they are read."""
    with bar("reading text", "sentences", enabled=sys.stderr.isatty()) as progress:
        yield open_sources(a.data, limit=limit, cache=a.cache, named=named, progress=progress)
