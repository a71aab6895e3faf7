"""--set FIELD=VALUE: fields of a run's configuration by name, and what there are."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_origin, get_type_hints

from rich import box
from rich.console import Console
from rich.table import Table

from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import ModelConfig, TrainConfig

#: Set by arguments of their own.
_OWN = {"pairs"}


class _Set(argparse.Action):
    """Collects what --set names; `--set help` lists the fields and ends, as --help does."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if values == "help":
            _print_help(set(self.const))
            parser.exit()
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), values])


def add_set(p: argparse.ArgumentParser, fields: Sequence[str], what: str) -> None:
    """The argument; fields: those that it sets. what: whose they are."""
    p.add_argument(
        "--set",
        action=_Set,
        const=fields,
        default=[],
        metavar="FIELD=VALUE",
        help=f"set a field of {what}; may be given again, and --set help lists them",
    )


def read_set(items: Sequence[str], fields: Sequence[str], what: str) -> dict[str, Any]:
    """The fields that --set names, with values of their types.

    fields: those that may be set. what: whose they are. Raises InputError for what is no
    FIELD=VALUE and for other fields, with the nearest one.
    """
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--set wants FIELD=VALUE, got {item!r}")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            meant = f"; did you mean {near[0]}?" if near else "; --set help lists them"
            raise InputError(f"--set: no field {name!r} of {what} to set{meant}")
        found[name] = _value(name, value)
    return found


def settable(*kinds: type[ModelConfig | TrainConfig]) -> list[str]:
    """Fields of configurations that --set may name."""
    return [name for kind in kinds for name in kind.__dataclass_fields__ if name not in _OWN]


def _value(name: str, word: str) -> Any:
    """JSON, or a word as it is; several with commas between are a list where the field is one."""
    try:
        parsed = json.loads(word)
    except (ValueError, RecursionError):
        hints = {**get_type_hints(ModelConfig), **get_type_hints(TrainConfig)}
        if get_origin(hints.get(name)) is tuple:
            return tuple(_value("", part.strip()) for part in word.split(","))
        parsed = word
    if isinstance(parsed, list):
        return tuple(parsed)
    return (parsed,) if name == "buckets" and isinstance(parsed, int) else parsed


def _print_help(fields: set[str]) -> None:
    table = Table("field", "default", "meaning", box=box.SIMPLE)
    for kind in (ModelConfig, TrainConfig):
        told = dict(meanings(kind))
        for name, field in kind.__dataclass_fields__.items():
            if name in fields:
                missing = repr(field.default).startswith("<")
                default = "" if missing else json.dumps(field.default)
                table.add_row(name, default, told.get(name, ""))
    Console().print(table)


def meanings(kind: type[ModelConfig | TrainConfig]) -> Iterator[tuple[str, str]]:
    """(field, what it means) of a class's docstring, where fields stand before a colon."""
    text = " ".join((kind.__doc__ or "").partition("\n")[2].split())
    name = "|".join(kind.__dataclass_fields__)
    heads = list(re.finditer(rf"(?<!\S)((?:{name})(?:, (?:{name}))*): ", text))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    for head, end in zip(heads, ends, strict=True):
        yield from ((field, text[head.end() : end].strip()) for field in head[1].split(", "))
