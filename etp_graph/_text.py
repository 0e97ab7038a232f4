"""Format counts, shares, aligned columns and wrapped lists for the tables of plans, costs, results and the demo."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from io import StringIO

from rich.box import Box
from rich.console import Console
from rich.table import Table


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return each row as a line of aligned columns: the first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    ]


WIDTH = 120
"""Width in characters of the text under a table. The width of the table itself depends on its names."""

# plain ASCII, so that a plan prints on every terminal and into every log
RULED = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)

_SHOWN = 12


def si(count: int, suffix: str = "") -> str:
    """Format a count with four digits and a unit prefix (``4.089 G``); counts below 1000 stay as they are.

    ``suffix`` is the unit of measurement (``4.089 GB``).
    """
    if abs(count) < 1000:
        return f"{count} {suffix}".rstrip()
    thousands = next((n for n in range(1, 5) if abs(count) < 999.95 * 1000**n), 5)
    return f"{count / 1000**thousands:#.4g}".rstrip(".") + f" {'kMGTP'[thousands - 1]}{suffix}"


def percent(part: float, whole: float) -> str:
    """Format a share in percent (``12.3 %``). A positive share is never shown as zero."""
    share = 100 * part / whole if whole else 0.0
    return "< 0.1 %" if 0 < share < 0.05 else f"{share:.1f} %"


def paragraph(title: str, names: Iterable[str], *, every: bool) -> list[str]:
    """Return the lines of a title and its list of names; empty if there are no names."""
    names = list(names)
    if not names:
        return []
    shown = names if every or len(names) <= _SHOWN else [*names[:_SHOWN], f"and {len(names) - _SHOWN} more"]
    return textwrap.wrap(
        title + ", ".join(shown), WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def wrapped_rows(table: Table) -> list[str]:
    """Return the lines of the table, with the same width on every terminal, without colours or trailing spaces."""
    stream = StringIO()
    console = Console(
        file=stream, width=10_000, color_system=None, force_terminal=False, legacy_windows=False, emoji=False
    )
    console.print(table)
    return [line.rstrip() for line in stream.getvalue().splitlines()]
