"""Standard output of the commands: as wide as the terminal, or 180 columns where there is none."""

from __future__ import annotations

import sys

from rich.console import Console

out = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
