"""Runs of units that one number counts (the layers and directions of a recurrent module): one group, equal blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._labels import EqualRuns, Locks, connected_components


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedRuns:
    """Units that form one group: ``units`` [blocks, units of a block], in that order, and how many are kept."""

    units: Tensor
    min_units: int


def resolve_ties(ties: Iterable[EqualRuns], root: Tensor, locks: Locks) -> list[ResolvedRuns]:
    """The groups that ties demand, after all labels are united; units that cannot keep the promise are locked.

    Ties that have a run in common (the states of an encoder start a decoder) make one group. Runs that were united
    as a whole are one block of it. What locks one unit of a group locks it all.

    Args:
        ties: the ties of a trace.
        root: the representative of every label.
        locks: the locked units; extended here.
    """
    tied: list[ResolvedRuns] = []
    if not (known := list(ties)):
        return tied
    for members in _connected_sets([set(root[tie.units].flatten().tolist()) for tie in known], len(root)):
        mine = [known[m] for m in members]
        rows = [row for tie in mine for row in root[tie.units]]
        units = torch.unique(torch.cat(rows))
        blocks = _distinct_runs(rows)
        reason = locks.first(units)
        where = mine[0].where
        if blocks is None:
            locks.add(units, f"the layers of {where} share units in a way that leaves them unequal")
            continue
        floor = max(-(-tie.floor * blocks.shape[1] // tie.units.shape[1]) for tie in mine)
        if len(blocks) == 1 and floor == 1:
            continue  # nothing beyond what any other units promise
        if floor >= blocks.shape[1]:
            reason = reason or f"the hidden size of {where} stays above the size of its projections"
        if reason is not None:
            locks.replace(units, reason)
        tied.append(ResolvedRuns(blocks, len(blocks) * floor))
    return tied


def _connected_sets(sets: Sequence[set[int]], n_labels: int) -> list[list[int]]:
    """Indices of the sets, those together that are linked by common members."""
    pairs = [(n_labels + i, member) for i, members in enumerate(sets) for member in members]
    a, b = torch.tensor(pairs, dtype=torch.int64, device="cpu").view(-1, 2).unbind(1)
    found = connected_components(n_labels + len(sets), a, b)
    together: dict[int, list[int]] = {}
    for i in range(len(sets)):
        together.setdefault(int(found[n_labels + i]), []).append(i)
    return list(together.values())


def _distinct_runs(rows: Sequence[Tensor]) -> Tensor | None:
    """The different runs, [runs, units], each unit once; ``None`` if no equal counts of units mean equal widths."""
    found: dict[tuple[int, ...], Tensor] = {}
    for row in rows:
        units, counts = torch.unique(row, return_counts=True)
        if bool((counts != counts[0]).any()):
            return None
        first = torch.stack([(row == unit).nonzero()[0, 0] for unit in units]).argsort()
        found.setdefault(tuple(units.tolist()), units[first])
    runs = list(found.values())
    together = torch.cat(runs)
    if len({len(run) for run in runs}) > 1 or len(together.unique()) < len(together):
        return None
    return torch.stack(runs)
