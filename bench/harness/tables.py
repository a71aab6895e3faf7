"""Tables and paragraphs of Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence


def paragraph(*sentences: str) -> str:
    """Sentences as one paragraph, wrapped at 100 columns."""
    text = " ".join(" ".join(sentences).split())
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells that look like numbers are aligned to the right."""
    rows = [list(row) for row in rows]

    def numeric(column: int) -> bool:
        cells = [row[column] for row in rows if row[column]]
        return bool(cells) and all(cell[0] in "+-−.0123456789" for cell in cells)

    rule = ["---:" if numeric(i) else "---" for i in range(len(headings))]
    lines = [list(headings), rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
