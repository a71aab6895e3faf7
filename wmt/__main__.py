"""Command line: `python -m taskmoe.wmt COMMAND`; each has --help."""

from __future__ import annotations

import io
import sys
from types import ModuleType

import jax

from taskmoe.wmt.command_line import Parser
from taskmoe.wmt.commands import (
    distill,
    evaluate,
    export,
    extract,
    prepare,
    prune,
    train,
    translate,
)
from taskmoe.wmt.devices import use_present_devices
from taskmoe.wmt.errors import InputError

COMMANDS: dict[str, ModuleType] = {
    "prepare": prepare,
    "train": train,
    "evaluate": evaluate,
    "translate": translate,
    "extract": extract,
    "prune": prune,
    "distill": distill,
    "export": export,
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, or 2 after one line on stderr where the input does not fit."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is no reason
        if isinstance(stream, io.TextIOWrapper):  # to end
            stream.reconfigure(errors="backslashreplace")
    parser = Parser(prog="python -m taskmoe.wmt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, command in COMMANDS.items():
        text = command.run.__doc__
        command.add_arguments(commands.add_parser(name, help=text, description=text))
    arguments = parser.parse_args(argv)
    use_present_devices()
    try:
        COMMANDS[arguments.command].run(arguments)
    except (InputError, FloatingPointError, OSError) as error:
        line = " ".join(str(error).split())
        print(f"{parser.prog} {arguments.command}: error: {line}", file=sys.stderr)
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        words = " ".join(str(error).split())
        if isinstance(error, jax.errors.JaxRuntimeError) and "memory" not in words.lower():
            raise
        hint = (
            "a smaller model or batch_tokens, remat=true or accumulate above 1 need less"
            if arguments.command in ("train", "distill")
            else "a smaller --batch, --beam or --max-source needs less"
        )
        print(
            f"{parser.prog} {arguments.command}: error: out of memory ({words}); {hint}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from the newest checkpoint"
        print(
            f"interrupted{goes_on if arguments.command in ('train', 'distill') else ''}",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
