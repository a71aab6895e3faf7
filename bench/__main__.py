"""Command line: `python -m taskmoe.bench NAME`, each NAME with a question of its own.

demo, ops, exchange, decode, beam, task, study, tpu, check, report; each takes --json FILE and
--help.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from taskmoe.cli.command_line import Parser, missing_package
from taskmoe.cli.errors import InputError

#: Command -> module with a docstring, `add_arguments(parser)` and `run(arguments) -> int`.
COMMANDS = {
    "demo": "taskmoe.bench.story.demo",
    "ops": "taskmoe.bench.ops.measure",
    "exchange": "taskmoe.bench.exchange.measure",
    "decode": "taskmoe.bench.serving.decode",
    "beam": "taskmoe.bench.serving.beam",
    "task": "taskmoe.bench.serving.task",
    "study": "taskmoe.bench.story.study",
    "tpu": "taskmoe.bench.tpu.lab",
    "check": "taskmoe.bench.gate",
    "report": "taskmoe.bench.report",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code, or 2 after one line where the input does not fit."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="python -m taskmoe.bench", description=__doc__)
    parser.answer_version(argv)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    # Only the named command is imported: some set flags that count before JAX starts.
    named = [name for name in COMMANDS if name in argv[:1]]
    modules: dict[str, Any] = {}
    for name, path in COMMANDS.items():
        if named and name not in named:
            commands.add_parser(name, help=argparse.SUPPRESS)
            continue
        try:
            modules[name] = importlib.import_module(path)
            if hasattr(modules[name], "__path__"):
                options = importlib.import_module(f"{path}.spec")
                command = importlib.import_module("taskmoe.bench.harness.command")
            else:
                options = modules[name]
        except ModuleNotFoundError as error:
            parser.error(missing_package(error, "bench"))
        lines = (modules[name].__doc__ or "").strip()
        sub = commands.add_parser(name, help=lines.splitlines()[0], description=lines)
        options.add_arguments(sub)
    arguments = parser.parse_args(argv)
    try:
        if hasattr(modules[arguments.command], "__path__"):
            return int(command.run(COMMANDS[arguments.command], arguments))
        return int(modules[arguments.command].run(arguments))
    except (InputError, OSError) as error:
        print(f"{parser.prog} {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
