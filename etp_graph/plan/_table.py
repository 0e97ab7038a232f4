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
from etp_graph.model import Outputs

from ._cost import Cost
from ._groups import Group, Index, as_tensor
from ._quantities import Quantity, described_quantity

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
    def outputs(self) -> Outputs: ...
    @property
    def left_out(self) -> tuple[str, ...]: ...
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
        _totals(costs),
    ]
    if not free:
        lines.append("Nothing can be pruned: the last column says why.")
    lines += paragraph("not counted in the MACs: ", plan.uncounted, every=True)
    lines += paragraph("parameters that no forward reached, left alone: ", plan.unreached, every=False)
    if callable(plan.outputs):
        lines.append(f"the outputs are what {getattr(plan.outputs, '__qualname__', plan.outputs)} returns")
    lines += paragraph("returned, but no outputs, so their widths may change: ", plan.left_out, every=True)
    for note in plan.notes:
        lines += textwrap.wrap(f"note: {note}", WIDTH, subsequent_indent="  ", break_long_words=False)
    return lines


def _totals(costs: Cost) -> str:
    """Return the amounts of all quantities as a line."""
    said = {name: _amount(described_quantity(name), amount) for name, amount in costs.amounts.items()}
    return f"{said.pop('macs')} for the example inputs, {', '.join(said.values())}"


def _amount(quantity: Quantity, amount: int) -> str:
    return f"{quantity.title} {quantity.write(amount)} ({amount:,})"


def cost_table(costs: Mapping[str, Cost]) -> str:
    """Return costs side by side as text. Ratios and shares are relative to the first, the dense model."""
    table = Table(box=RULED, pad_edge=False, show_edge=False)
    dense = next(iter(costs.values()))
    quantities = [described_quantity(name) for name in dense.amounts]
    for title in ("model", *(title for quantity in quantities for title in _titles(quantity))):
        table.add_column(title, justify="left" if title == "model" else "right", no_wrap=True)
    for name, one in costs.items():
        cells = (cell for quantity in quantities for cell in _amount_cells(quantity, dense, one))
        table.add_row(*map(Text, (name, *cells)))
    uncounted = dict.fromkeys(name for one in costs.values() for name in one.uncounted)
    return "\n".join([*wrapped_rows(table), *paragraph("not counted in the MACs: ", uncounted, every=True)])


def _titles(quantity: Quantity) -> list[str]:
    return [quantity.title, "share", *filter(None, [quantity.ratio_title])]


def _amount_cells(quantity: Quantity, dense: Cost, one: Cost) -> list[str]:
    """Return the amount, its share of the dense amount, and the ratio if the quantity has a title for it."""
    whole, amount = dense.amount(quantity.name), one.amount(quantity.name)
    ratio = f"{whole / amount:.2f}x" if amount else "-"
    return [quantity.write(amount), percent(amount, whole), *([ratio] if quantity.ratio_title else [])]
