"""Plans and costs as plain text: what ``print(plan)`` shows."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from io import StringIO
from math import prod

import torch
from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .costs import Cost, CostModel
from .plan import Group, Index, Plan, as_tensor

WIDTH = 120
"""Width of the paragraphs under a table. The table itself is as wide as its names."""

# plain ASCII, so that a plan prints on every terminal and into every log
_RULED = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
_SHOWN = 12
_NAMES = 50


def si(count: int) -> str:
    """A count with four digits and a unit prefix: ``4.089 G``; below 1000 as it is."""
    if abs(count) < 1000:
        return str(count)
    thousands = next((n for n in range(1, 5) if abs(count) < 999.95 * 1000**n), 5)
    return f"{count / 1000**thousands:#.4g}".rstrip(".") + f" {'kMGTP'[thousands - 1]}"


def percent(part: float, whole: float) -> str:
    """A share in percent, ``12.3 %``; a part that is not zero never shows as zero."""
    share = 100 * part / whole if whole else 0.0
    return "< 0.1 %" if 0 < share < 0.05 else f"{share:.1f} %"


def parameters_at_stake(plan: Plan, group: Group) -> int:
    """How many numbers in the plan's parameters belong to units of this group."""
    own = set(plan.parameters)
    cut: dict[str, dict[int, list[Index]]] = {}
    for piece in group.slices:
        if piece.tensor in own:
            cut.setdefault(piece.tensor, {}).setdefault(piece.axis, []).append(piece.index)
    total = 0
    for tensor, by_axis in cut.items():
        shape = plan.tensors[tensor]
        outside = prod(size - _count(by_axis.get(axis, [])) for axis, size in enumerate(shape))
        total += prod(shape) - outside  # an entry cut along two axes counts once
    return total


def _count(indices: list[Index]) -> int:
    """How many different positions the indices name."""
    if len(indices) == 1 and isinstance(indices[0], range):
        return len(indices[0])
    return len(set(torch.cat([as_tensor(i) for i in indices]).tolist())) if indices else 0


def plan_table(plan: Plan) -> str:
    """The plan as text: a row for every group, then the totals and everything that a reader should know."""
    costs = CostModel(plan).dense
    table = Table(box=_RULED, pad_edge=False, show_edge=False)
    for title, width in (("group", None), ("kind", None), ("units", None), ("constraint", 24), ("tensors", None),
                         ("params", None), ("share", None), ("locked", 60)):  # fmt: skip
        right = title in {"units", "params", "share"}
        table.add_column(title, justify="right" if right else "left", no_wrap=width is None, max_width=width,
                         overflow="fold")  # fmt: skip
    for group in plan.groups:
        stake = parameters_at_stake(plan, group)
        table.add_row(*map(Text, (
            group.name, group.kind, str(group.n_units), group.constraint, _tensors(plan, group),
            si(stake), percent(stake, costs.params), group.locked or "",
        )))  # fmt: skip
    return "\n".join([*_lines(table), "", *_footer(plan, costs)])


def _tensors(plan: Plan, group: Group) -> str:
    """How many tensors a group cuts, and the first names: parameters before buffers, two if they are short."""
    own = set(plan.parameters)
    names = sorted(dict.fromkeys(piece.tensor for piece in group.slices), key=lambda name: name not in own)
    shown = names[: 1 + (len(", ".join(names[:2])) <= _NAMES)]
    return f"{len(names)}: {', '.join(shown)}{', ...' if len(names) > len(shown) else ''}" if names else "0"


def _footer(plan: Plan, costs: Cost) -> list[str]:
    free = plan.prunable
    units = sum(group.n_units for group in free)
    lines = [
        f"{len(plan.groups)} groups ({len(free)} prunable, {len(plan.groups) - len(free)} locked), "
        f"{plan.n_units} units ({units} prunable); traced in {' and '.join(plan.modes)} mode on {plan.device}",
        f"MACs {si(costs.macs)} ({costs.macs:,}) for the example inputs, params {si(costs.params)} ({costs.params:,})",
    ]
    if not free:
        lines.append("Nothing can be pruned: the last column says why.")
    lines += _paragraph("not counted in the MACs: ", plan.uncounted, every=True)
    lines += _paragraph("parameters that no forward reached, left alone: ", plan.unreached, every=False)
    for note in plan.notes:
        lines += textwrap.wrap(f"note: {note}", WIDTH, subsequent_indent="  ", break_long_words=False)
    return lines


def _paragraph(title: str, names: Iterable[str], *, every: bool) -> list[str]:
    """A wrapped list of names under a title; nothing if there are none."""
    names = list(names)
    if not names:
        return []
    shown = names if every or len(names) <= _SHOWN else [*names[:_SHOWN], f"and {len(names) - _SHOWN} more"]
    return textwrap.wrap(
        title + ", ".join(shown), WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def cost_table(costs: Mapping[str, Cost]) -> str:
    """Costs side by side as text; speed-up and shares are relative to the first, the dense model."""
    table = Table(box=_RULED, pad_edge=False, show_edge=False)
    for title in ("model", "MACs", "share", "speed-up", "params", "share"):
        table.add_column(title, justify="left" if title == "model" else "right", no_wrap=True)
    dense = next(iter(costs.values()))
    for name, one in costs.items():
        speed_up = f"{dense.macs / one.macs:.2f}x" if one.macs else "-"
        table.add_row(*map(Text, (
            name, si(one.macs), percent(one.macs, dense.macs), speed_up,
            si(one.params), percent(one.params, dense.params),
        )))  # fmt: skip
    uncounted = dict.fromkeys(name for one in costs.values() for name in one.uncounted)
    return "\n".join([*_lines(table), *_paragraph("not counted in the MACs: ", uncounted, every=True)])


def _lines(table: Table) -> list[str]:
    """The table at its natural width, whatever the terminal, without colours or trailing spaces."""
    stream = StringIO()
    console = Console(
        file=stream, width=10_000, color_system=None, force_terminal=False, legacy_windows=False, emoji=False
    )
    console.print(table)
    return [line.rstrip() for line in stream.getvalue().splitlines()]
