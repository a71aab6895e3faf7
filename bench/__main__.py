"""Command line: `python -m taskmoe.bench NAME`, each NAME with a question of its own.

demo, ops, exchange, decode, beam, serve, task, training, text, study, ablation, tpu, tune,
check, report; each takes --json FILE and --help.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from taskmoe.cli.command_line import Parser, missing_package
from taskmoe.cli.errors import InputError

#: Command -> package of its four parts: docstring, `spec`, `measure` and `view`.
COMMANDS = {
    "demo": "taskmoe.bench.story.demo",
    "ops": "taskmoe.bench.ops",
    "exchange": "taskmoe.bench.exchange",
    "decode": "taskmoe.bench.serving.decode",
    "beam": "taskmoe.bench.serving.beam",
    "serve": "taskmoe.bench.serving.serve",
    "task": "taskmoe.bench.serving.task",
    "training": "taskmoe.bench.training",
    "text": "taskmoe.bench.text",
    "study": "taskmoe.bench.story.study",
    "ablation": "taskmoe.bench.story.ablation",
    "tpu": "taskmoe.bench.tpu",
    "tune": "taskmoe.bench.tune",
    "check": "taskmoe.bench.gate",
    "report": "taskmoe.bench.report",
}


#: The one command that is no benchmark: it walks the others' views.
REPORT = "taskmoe.bench.report"
HARNESS = "taskmoe.bench.harness.command"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code, or 2 after one line where the input does not fit."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="python -m taskmoe.bench", description=__doc__)
    parser.answer_version(argv)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    # Only the named command is imported: some set flags that count before JAX starts.
    named = [name for name in COMMANDS if name in argv[:1]]
    for name, path in COMMANDS.items():
        if named and name not in named:
            commands.add_parser(name, help=argparse.SUPPRESS)
            continue
        try:
            module = importlib.import_module(path)
            options = importlib.import_module(path if path == REPORT else f"{path}.spec")
            importlib.import_module(HARNESS)
        except ModuleNotFoundError as error:
            parser.error(missing_package(error, "bench"))
        lines = (module.__doc__ or "").strip()
        sub = commands.add_parser(name, help=lines.splitlines()[0], description=lines)
        options.add_arguments(sub)
        if path != REPORT:
            sub.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args(argv)
    try:
        path = COMMANDS[arguments.command]
        if path == REPORT:
            return int(importlib.import_module(path).run(arguments))
        return int(importlib.import_module(HARNESS).run(path, arguments))
    except (InputError, OSError) as error:
        print(f"{parser.prog} {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
