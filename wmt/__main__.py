"""Command line: `python -m taskmoe.wmt COMMAND`; each has --help."""

from __future__ import annotations

import importlib
import io
import sys

import jax

from taskmoe.cli.command_line import Parser, missing_package
from taskmoe.cli.devices import use_present_devices
from taskmoe.cli.errors import InputError
from taskmoe.wmt.training import lost_peers
from taskmoe.wmt.training.stopping import Stopped

#: Modules of taskmoe.wmt.commands, with `add_arguments(parser)` and `run(arguments)`.
COMMANDS = (
    *("prepare", "train", "evaluate", "translate", "average"),
    *("extract", "prune", "distill", "quantize", "shortlist", "export"),
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, or 2 after one line on stderr where the input does not fit."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is no reason
        if isinstance(stream, io.TextIOWrapper):  # to end
            stream.reconfigure(errors="backslashreplace")
    parser = Parser(prog="python -m taskmoe.wmt", description=__doc__)
    parser.answer_version(argv)
    try:
        modules = {n: importlib.import_module(f"taskmoe.wmt.commands.{n}") for n in COMMANDS}
    except ModuleNotFoundError as error:
        parser.error(missing_package(error, "wmt"))
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, module in modules.items():
        text = module.run.__doc__
        module.add_arguments(commands.add_parser(name, help=text, description=text))
    arguments = parser.parse_args(argv)
    use_present_devices()
    try:
        with lost_peers.left_at_once():
            modules[arguments.command].run(arguments)
    except Stopped as stopped:
        return _ended(f"{stopped}; the same command goes on", stopped.code)
    except KeyboardInterrupt:
        return _ended("interrupted", 130)
    except (InputError, FloatingPointError, OSError) as error:
        line = " ".join(str(error).split())
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        words = " ".join(str(error).split())
        if isinstance(error, jax.errors.JaxRuntimeError) and "memory" not in words.lower():
            raise
        hint = (
            "a smaller model or batch_tokens, remat=true or accumulate above 1 need less"
            if arguments.command in ("train", "distill")
            else "a smaller --batch, --beam or --max-source needs less"
        )
        line = f"out of memory ({words}); {hint}"
    else:
        return 0
    return _ended(f"{parser.prog} {arguments.command}: error: {line}", 2)


def _ended(line: str, code: int) -> int:
    print(line, file=sys.stderr, flush=True)
    return lost_peers.end_soon(code)


if __name__ == "__main__":
    sys.exit(main())
