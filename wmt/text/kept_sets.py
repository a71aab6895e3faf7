"""Training sets that are kept: text that was prepared once is found again by what it was made of.

A set lies in `FOLDER/sets/KEY`, the key a hash of all that the set depends on: of
`Plan.description()` and of versions. Another file, direction, limit or vocabulary is another set.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from taskmoe.cli.command_line import remove_folder
from taskmoe.cli.errors import InputError, exhausted
from taskmoe.kernels import __version__
from taskmoe.wmt.text.preparing import Plan, Report, part_of, write_set
from taskmoe.wmt.text.training_set import TrainingSet, is_training_set

Note = Callable[[str], None]
#: Errors after which a part is given up, for the room that it takes.
_FULL = (errno.ENOSPC, errno.EDQUOT)


def find_set(plan: Plan, folders: Sequence[Path]) -> TrainingSet | None:
    """The set of a plan, whole, in the first of the folders that has it; None where none has.

    Raises OSError where no handles or memory are left to look into it.
    """
    return _first_whole(_places(plan, folders), plan)


def kept_set(
    plan: Plan,
    folders: Sequence[Path],
    report: Report = lambda *_: None,
    note: Note = lambda _: None,
) -> TrainingSet:
    """The set of a plan, which is prepared where no folder has it.

    folders: where it may lie, the best place first; where one cannot be written, or is full, the
      set is prepared in the next. report: as of `prepare`. note: called with lines that say where
      the set is from.
    Of several runs that want a set at once one prepares it and the others wait. One that is killed
    leaves its part, with which the next goes on. Raises InputError where the text is wrong, and
    where no folder can be written; OSError where no handles or memory are left, which harms no set.
    """
    places = _places(plan, folders)
    if (found := _first_whole(places, plan)) is not None:
        note(_said(found, "from"))
        return found
    places.sort(key=lambda out: not _is_there(part_of(out)))  # where it was begun it goes on
    for number, out in enumerate(places):
        try:
            with _alone_at(out, note):
                found = _whole(out, plan)
                how = "from"
                if found is None:
                    if out.exists():
                        note(f"{out} is damaged; preparing it anew")
                        shutil.rmtree(out)
                    try:
                        found, how = write_set(out, plan, None, report), "prepared in"
                    except OSError as error:  # while no other run may be at work in the part
                        if number + 1 < len(places) and error.errno in _FULL:
                            with contextlib.suppress(OSError):
                                remove_folder(part_of(out))
                        raise
            note(_said(found, how))
            return found
        except OSError as error:
            if exhausted(error):  # as it would be in any other folder
                raise
            why = f"{error.filename or out}: {error.strerror or error}"
            if number + 1 == len(places):
                raise InputError(
                    f"{why}, so the text cannot be prepared; name another --cache"
                ) from None
            note(f"{why}, so the text is prepared in {places[number + 1]}")
    raise ValueError("no folder is given")


def _places(plan: Plan, folders: Sequence[Path]) -> list[Path]:
    made_by = [__version__, sentencepiece.__version__]
    description = json.dumps([plan.description(), made_by], sort_keys=True)
    key = hashlib.sha256(description.encode()).hexdigest()[:32]
    return [folder / "sets" / key for folder in folders]


def _first_whole(places: Sequence[Path], plan: Plan) -> TrainingSet | None:
    return next((made for out in places if (made := _whole(out, plan)) is not None), None)


def _whole(out: Path, plan: Plan) -> TrainingSet | None:
    """The set in a folder; None where there is none, or a damaged one."""
    try:
        if is_training_set(out):
            made = TrainingSet(out)
            for pair in plan.pairs:
                made.rows(pair)
            return made
    except (InputError, OSError) as error:
        if exhausted(error):
            raise
    return None


def _is_there(path: Path) -> bool:
    with contextlib.suppress(OSError):  # of a folder that may not be looked into
        return path.exists()
    return False


def _said(made: TrainingSet, how: str) -> str:
    return f"vocabulary of {made.tokenizer.vocab_size:,} pieces and text {how} {made.folder}"


@contextlib.contextmanager
def _alone_at(out: Path, note: Note) -> Iterator[None]:
    """Wait until no other run prepares this set."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f".{out.name}.lock").open("w") as file:  # stays: others may hold it already
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"another run prepares this text in {part_of(out)}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
