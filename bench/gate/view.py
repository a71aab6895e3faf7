"""What changed, as a table, and the verdict in one line that names the culprit."""

from __future__ import annotations

from taskmoe.bench.gate import verdicts
from taskmoe.bench.gate.measure import Checked
from taskmoe.bench.gate.verdicts import Change
from taskmoe.bench.harness.view import Table, View


def view(checked: Checked) -> View:
    """What changed and every timing; the exit code is 1 on a regression."""
    failed = [change for change in checked.changes if change.fails]
    tables = [_table(checked)]
    if checked.updated is not None:
        moved = sum(c.verdict != "same" for c in checked.changes)
        count = f"{moved} of {len(checked.changes)} facts changed"
        return View(f"baseline {checked.updated} rewritten: {count}", "", tables)
    meant = "Where that is meant: python -m taskmoe.bench check --update, and commit it."
    stored = [c for c in failed if c.fact != verdicts.TIMED_FACT or checked.against is None]
    findings = [*checked.notes, *([meant] if stored else [])]
    answer = last_line(checked.changes, failed)
    return View(answer, "", tables, findings=findings, code=int(bool(failed)))


def _table(checked: Checked) -> Table:
    changes = checked.changes
    static = [c for c in changes if c.fact != verdicts.TIMED_FACT]
    said = []
    if static:
        same = sum(c.verdict == "same" for c in static)
        where = "" if checked.everything else " (--all shows them)"
        said.append(f"{same} of {len(static)} static facts are as stored{where}.")
    if len(static) < len(changes):
        said.append(
            "Timings: seconds of a run over those of a calibration run beside it, and the "
            f"{verdicts.CONFIDENCE:.0%} interval of the change."
        )
    shown = [
        c for c in changes if checked.everything or c.verdict != "same" or c.interval is not None
    ]
    colours = {"REGRESSION": "bold red", "better": "green"}
    styles = {i: colours[c.verdict] for i, c in enumerate(shown) if c.verdict in colours}
    rows = [
        (c.subject, c.fact, _number(c.old), _number(c.new), change_words(c), c.verdict)
        for c in shown
    ]
    headings = ("subject", "fact", "old", "new", "change", "verdict")
    return Table("Old against new", headings, rows, " ".join(said), styles)


def change_words(c: Change) -> str:
    """By how much a fact changed, in its own direction; of a timing with its interval."""
    if c.interval is not None:
        return f"{c.interval.median:+.1%} ({c.interval.low:+.1%} to {c.interval.high:+.1%})"
    if isinstance(c.old, str) or isinstance(c.new, str) or c.old is None or c.new is None:
        return ""
    share = f"{c.new / c.old - 1:+.1%}" if c.old else ""
    # Of an exact fact a small change counts too, and its share would say that there is none.
    small = c.verdict != "same" and share in ("", "+0.0%", "-0.0%")
    whole = isinstance(c.old, int) and isinstance(c.new, int)
    return f"{c.new - c.old:+,{'' if whole else '.6g'}}" if small else share


def last_line(changes: list[Change], failed: list[Change]) -> str:
    """What came out of it, in one line that names the culprit where there is one."""
    if not failed:
        open_ones = sum(c.verdict == "undecided" for c in changes)
        rest = f", {open_ones} undecided within the limit of rounds" if open_ones else ""
        return f"no regression in {len(changes)} facts{rest}"
    worst = max(failed, key=lambda c: float("inf") if c.worse is None else c.worse)
    others = list(dict.fromkeys(c.subject for c in failed if c.subject != worst.subject))
    more = f" (also: {'; '.join(others)})" if others else ""
    old, new = _number(worst.old) or "none", _number(worst.new)
    if worst.fact == "error":
        return f"regression: {worst.subject} does not compile: {new}{more}"
    by = change_words(worst)
    return f"regression: {worst.subject}: {worst.fact} {old} -> {new}, {by}{more}"


def _number(value: float | str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
