"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells that look like numbers are aligned to the right."""
    rows = [list(row) for row in rows]

    def numeric(column: int) -> bool:
        cells = [row[column] for row in rows if row[column]]
        return bool(cells) and all(cell[0] in "+-−.0123456789" for cell in cells)

    rule = ["---:" if numeric(i) else "---" for i in range(len(headings))]
    lines = [list(headings), rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
