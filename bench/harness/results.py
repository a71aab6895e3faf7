"""Results as JSON: dataclasses to it and from it, by their types; where each stored one lies."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from taskmoe.cli.errors import InputError

RESULTS = Path("bench/results")
#: Of the files that are written; those without a number are of the same form.
VERSION = 1

R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float] | np.ndarray) -> Spread:
        """Of these samples."""
        return cls(*np.quantile(samples, (0.5, 0.1, 0.9)).tolist())

    def words(self, form: str, scale: float = 1.0) -> str:
        """Median and range, each in this format."""
        median, low, high = (format(scale * x, form) for x in (self.median, self.p10, self.p90))
        return f"{median} ({low} to {high})"


class Result:
    """What a benchmark found: a dataclass whose fields that may be None then are not written."""

    def to_json(self) -> dict[str, Any]:
        """The result as JSON has it."""
        return {"version": VERSION, **_plain(self)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {
            field.name: _plain(each)
            for field, each in fields.items()
            if each is not None or field.default is not None
        }
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def from_json(kind: type[R], value: Any) -> R:
    """A value of this type from JSON; what the type does not name is left out.

    Raises TypeError, KeyError or AttributeError where the value is of another form.
    """
    found: R = _read(kind, value)
    return found


def _read(kind: Any, value: Any) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind) if field.name in value]
        return kind(**{name: _read(hints[name], value[name]) for name in names})  # type: ignore[operator]
    if origin in (typing.Union, types.UnionType):
        some = next((one for one in inner if one is not type(None)), None)
        return None if value is None else _read(some, value)
    if origin is dict:
        return {name: _read(inner[1], each) for name, each in value.items()}
    if origin in (list, tuple):
        return origin(_read(inner[0], each) for each in value)
    return value


def load(kind: type[R], path: Path, command: str) -> R:
    """A stored result; InputError that names the command which makes it."""
    if not path.is_file():
        raise InputError(f"{path} is not there; make it with: {command}")
    try:
        return from_json(kind, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}); make it again with: {command}") from None
