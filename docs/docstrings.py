"""The project's docstrings as Markdown, for mkdocstrings.

They say `name: what it is` line by line, and equations stand indented. Names become a list; stars
and underscores mean themselves.
"""

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*): (\S.*)")


def escaped(line: str) -> str:
    """What stands between backticks is left alone."""
    parts = line.split("`")
    parts[::2] = [re.sub(r"([*_<>\\])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def markdown(text: str) -> str:
    """A docstring as Markdown that shows what it says."""
    lines: list[str] = []
    in_list = False
    for line in text.splitlines():
        if in_list and line.startswith("  "):
            lines.append(f"    {escaped(line.strip())}")
        elif line.startswith("    "):  # an equation
            lines.append(line)
        elif found := ARGUMENT.fullmatch(line):
            lines += [] if in_list else [""]
            lines.append(f"- **`{found[1]}`**: {escaped(found[2])}")
            in_list = True
        else:
            lines += [""] if in_list else []
            lines.append(escaped(line))
            in_list = False
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called with each object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
