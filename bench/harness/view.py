"""What a result means, and the one renderer: on the terminal, as Markdown, HTML and PNG.

A benchmark's `view(result)` gives a `View`: every table, chart and sentence is written there, once.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich import table as rich_table
from rich.console import Console

from taskmoe.cli.command_line import write_bytes

matplotlib.use("Agg")  # charts go to files; a machine without a screen has no other way

Row = tuple[str, ...]
R = TypeVar("R")
#: Heading -> what a result says under it.
Columns = Mapping[str, Callable[[R], str]]
#: Cells up to this length stay on one line of the terminal.
UNCUT = 34


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as words. styles: of some rows on the terminal, by their place."""

    title: str
    headings: Row
    rows: Sequence[Row]
    note: str = ""
    styles: dict[int, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, title: str, results: Iterable[R], columns: Columns[R], note: str = "") -> Table:
        """A row a result."""
        rows = [tuple(say(result) for say in columns.values()) for result in results]
        return cls(title, tuple(columns), rows, note)

    def only(self, headings: Sequence[str], keep: Callable[[Row], bool] = lambda _: True) -> Table:
        """The same with these columns, and the rows to keep."""
        at = [self.headings.index(heading) for heading in headings]
        rows = [tuple(row[i] for i in at) for row in self.rows if keep(row)]
        return Table(self.title, tuple(headings), rows)


@dataclasses.dataclass(frozen=True)
class Chart:
    """name: of its file, without ending. title: what it shows, for who cannot see it."""

    name: str
    title: str
    draw: Callable[[], Figure]


@dataclasses.dataclass(frozen=True)
class View:
    """What a result means.

    answer: the benchmark's question answered, in a sentence or two. about: sizes and rounds.
    short: the table that goes with the answer; None: the first. tables: all of them. findings: what
    they say, in sentences. code: the command's exit code.
    """

    answer: str
    about: str
    tables: Sequence[Table]
    charts: Sequence[Chart] = ()
    findings: Sequence[str] = ()
    short: Table | None = None
    code: int = 0


def show(view: View, console: Console) -> None:
    """Print a view on the terminal."""
    for table in view.tables:
        console.print(_rich(table))
    console.print(*view.findings, *([view.answer] if view.answer else []), sep="\n", soft_wrap=True)


def _rich(table: Table) -> rich_table.Table:
    found = rich_table.Table(title=table.title, caption=table.note or None)
    for place, heading in enumerate(table.headings):
        right = _numeric(table.rows, place)
        longest = max((len(row[place]) for row in table.rows), default=0)
        width = longest if longest <= UNCUT else None  # headings may wrap, such cells do not
        found.add_column(heading, justify="right" if right else "left", min_width=width)
    for place, row in enumerate(table.rows):
        found.add_row(*row, style=table.styles.get(place, ""))
    return found


def brief(view: View, charts: str) -> str:
    """Answer, first chart and short table as Markdown; charts: the folder of the pictures."""
    parts = [paragraph(view.answer)]
    parts += [f"![{c.title}]({charts}/{c.name}.png)" for c in view.charts[:1]]
    table = view.short or (view.tables[0] if view.tables else None)
    if table is not None:
        parts.append(markdown(table.headings, table.rows))
    return "\n\n".join(parts)


def whole(view: View, charts: str) -> str:
    """Everything as Markdown; charts: the folder of the pictures as the text's file sees it."""
    parts = [paragraph(view.about), paragraph(view.answer)]
    parts += [f"![{chart.title}]({charts}/{chart.name}.png)" for chart in view.charts]
    for table in view.tables:
        parts += [f"**{table.title}**", markdown(table.headings, table.rows)]
        parts += [paragraph(table.note)] if table.note else []
    parts.append(paragraph(*view.findings))
    return "\n\n".join(part for part in parts if part)


def page(view: View, title: str) -> str:
    """Everything as one HTML page with its charts inside: a file to open or to send."""
    parts = [f"<p class=answer>{html.escape(view.answer)}</p>", f"<p>{html.escape(view.about)}</p>"]
    for chart in view.charts:
        png = base64.b64encode(_png(chart.draw())).decode()
        name = html.escape(chart.title, quote=True)
        parts.append(f'<img alt="{name}" src="data:image/png;base64,{png}">')
    for table in view.tables:
        parts += [f"<h2>{html.escape(table.title)}</h2>", _html(table)]
        parts += [f"<p>{html.escape(table.note)}</p>"] if table.note else []
    parts += [f"<p>{html.escape(finding)}</p>" for finding in view.findings]
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; }}
.answer {{ font-size: 1.2rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; padding: 0.2rem 0.8rem; border-bottom: 1px solid #ddd; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
img {{ max-width: 100%; display: block; margin: 1rem 0; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def _html(table: Table) -> str:
    right = [_numeric(table.rows, place) for place in range(len(table.headings))]

    def line(cells: Sequence[str], kind: str) -> str:
        each = (
            f"<{kind}{' class=number' if number else ''}>{html.escape(cell)}</{kind}>"
            for cell, number in zip(cells, right, strict=True)
        )
        return f"<tr>{''.join(each)}</tr>"

    rows = [line(table.headings, "th"), *(line(row, "td") for row in table.rows)]
    return "<div class=wide><table>\n" + "\n".join(rows) + "\n</table></div>"


def draw(view: View, folder: Path) -> None:
    """Write all charts as PNG into a folder."""
    for chart in view.charts:
        save_figure(chart.draw(), folder / f"{chart.name}.png")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG beside its place, rename it there, and let go of it."""
    write_bytes(path, _png(figure))


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    plt.close(figure)
    return png.getvalue()


def paragraph(*sentences: str) -> str:
    """Sentences as one paragraph, wrapped at 100 columns."""
    text = " ".join(" ".join(sentences).split())
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells that look like numbers are aligned to the right."""
    rows = [list(row) for row in rows]
    rule = ["---:" if _numeric(rows, i) else "---" for i in range(len(headings))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(headings), rule, *rows])


def _numeric(rows: Sequence[Sequence[str]], column: int) -> bool:
    """Whether all of a column's cells look like numbers."""
    cells = [row[column] for row in rows if row[column]]
    return bool(cells) and all(cell[0] in "+-−.0123456789" for cell in cells)
