"""What several specifications read from options: names, numbers, and lists of them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from taskmoe.cli.errors import InputError


def chosen(
    option: str, given: str | None, known: Iterable[str], default: Iterable[str]
) -> list[str]:
    """The comma-separated names, if all are known; the default if none are given.

    Raises InputError that names the option, such as "--ops".
    """
    names = list(default) if given is None else [name.strip() for name in given.split(",")]
    known = list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"{option} must be of {', '.join(known)}, got {unknown[0]!r}")
    return list(dict.fromkeys(names))


def need_at_least_one(a: argparse.Namespace, *options: str) -> None:
    """InputError that names the first of these options that is given and below 1."""
    for option in options:
        value = getattr(a, option)
        if value is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')} must be at least 1, got {value}")


def numbers(option: str, text: str, multiple_of: int = 1) -> list[int]:
    """Comma-separated positive multiples of a number; InputError that names the option."""
    try:
        found = [int(n) for n in text.split(",")]
    except ValueError:
        raise InputError(f"{option} must be numbers like 64,512, got {text}") from None
    if bad := [n for n in found if n < 1 or n % multiple_of]:
        what = f"multiples of {multiple_of}" if multiple_of > 1 else "at least 1"
        raise InputError(f"{option} must be {what}, got {bad[0]}")
    return found
