"""Plans and costs as plain text; ``print(plan)`` shows it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from math import prod
from typing import Protocol

import torch
from rich.table import Table
from rich.text import Text

from etp_graph._text import RULED, WIDTH, paragraph, percent, si, wrapped_rows

from ._cost import Cost
from ._groups import Group, Index, as_tensor

_NAMES = 50


class Described(Protocol):
    """The facts of a plan that its table shows; :class:`etp_graph.Plan` has them."""

    @property
    def groups(self) -> tuple[Group, ...]: ...
    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def parameters(self) -> tuple[str, ...]: ...
    @property
    def uncounted(self) -> tuple[str, ...]: ...
    @property
    def modes(self) -> tuple[str, ...]: ...
    @property
    def unreached(self) -> tuple[str, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def device(self) -> str: ...
    @property
    def n_units(self) -> int: ...
    @property
    def prunable(self) -> tuple[Group, ...]: ...
    @property
    def dense(self) -> Cost: ...


def parameters_at_stake(plan: Described, group: Group) -> int:
    """Return the number of parameter elements that belong to units of this group."""
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
    """Return the number of different positions in the indices."""
    if len(indices) == 1 and isinstance(indices[0], range):
        return len(indices[0])
    return len(set(torch.cat([as_tensor(i) for i in indices]).tolist())) if indices else 0


def plan_table(plan: Described) -> str:
    """Return the plan as text: a row for every group, then totals, and lists and notes that a user should read."""
    costs = plan.dense
    table = Table(box=RULED, pad_edge=False, show_edge=False)
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
    return "\n".join([*wrapped_rows(table), "", *_footer(plan, costs)])


def _tensors(plan: Described, group: Group) -> str:
    """Return the number of tensors that a group cuts, and the first name, or two if short; parameters come first."""
    own = set(plan.parameters)
    names = sorted(dict.fromkeys(piece.tensor for piece in group.slices), key=lambda name: name not in own)
    shown = names[: 1 + (len(", ".join(names[:2])) <= _NAMES)]
    return f"{len(names)}: {', '.join(shown)}{', ...' if len(names) > len(shown) else ''}" if names else "0"


def _footer(plan: Described, costs: Cost) -> list[str]:
    free = plan.prunable
    units = sum(group.n_units for group in free)
    lines = [
        f"{len(plan.groups)} groups ({len(free)} prunable, {len(plan.groups) - len(free)} locked), "
        f"{plan.n_units} units ({units} prunable); traced in {' and '.join(plan.modes)} mode on {plan.device}",
        f"MACs {si(costs.macs)} ({costs.macs:,}) for the example inputs, params {si(costs.params)} ({costs.params:,})",
    ]
    if not free:
        lines.append("Nothing can be pruned: the last column says why.")
    lines += paragraph("not counted in the MACs: ", plan.uncounted, every=True)
    lines += paragraph("parameters that no forward reached, left alone: ", plan.unreached, every=False)
    for note in plan.notes:
        lines += textwrap.wrap(f"note: {note}", WIDTH, subsequent_indent="  ", break_long_words=False)
    return lines


def cost_table(costs: Mapping[str, Cost]) -> str:
    """Return costs side by side as text. Speed-up (in MACs) and shares are relative to the first, the dense model."""
    table = Table(box=RULED, pad_edge=False, show_edge=False)
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
    return "\n".join([*wrapped_rows(table), *paragraph("not counted in the MACs: ", uncounted, every=True)])
