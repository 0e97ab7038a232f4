"""Build groups from ties: runs of consecutive units that share one size attribute, as the layers of an LSTM do.

Each run becomes one block of the group, and all blocks keep the same number of units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from etp_graph.plan import add_line

from ._labels import EqualRuns, Locks, connected_components


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedRuns:
    """Ordered units of one group, ``units`` [blocks, units of a block], and the minimum number that the group keeps."""

    units: Tensor
    min_units: int


def resolve_ties(ties: Iterable[EqualRuns], root: Tensor, locks: Locks) -> list[ResolvedRuns]:
    """Return the groups that the ties require, after all labels are united.

    Ties with a common run form one group (the states of an encoder start a decoder). Runs that were united with each
    other are one block of it. If one unit is locked, the whole group is locked. If the blocks cannot keep equal numbers
    of units, all units of these ties are locked, and there is no group for them.

    Args:
        ties: the ties of a trace.
        root: the representative of every label.
        locks: the locked units; this function adds to them.
    """
    tied: list[ResolvedRuns] = []
    if not (known := list(ties)):
        return tied
    for members in connected_sets([set(root[tie.units].flatten().tolist()) for tie in known], len(root)):
        mine = [known[m] for m in members]
        rows = [row for tie in mine for row in root[tie.units]]
        units = torch.unique(torch.cat(rows))
        blocks = _distinct_runs(rows)
        reason = locks.first(units)
        where, line = mine[0].where, mine[0].line
        if blocks is None:
            unequal = f"the layers of {where} share units in a way that leaves them unequal"
            locks.add(units, add_line(unequal, line))
            continue
        floor = max(-(-tie.floor * blocks.shape[1] // tie.units.shape[1]) for tie in mine)
        if len(blocks) == 1 and floor == 1:
            continue  # the same constraints as for units without a tie
        if floor >= blocks.shape[1]:
            reason = reason or add_line(f"the hidden size of {where} stays above the size of its projections", line)
        if reason is not None:
            locks.replace(units, reason)
        tied.append(ResolvedRuns(blocks, len(blocks) * floor))
    return tied


def connected_sets(sets: Sequence[set[int]], n_labels: int) -> list[list[int]]:
    """Group the sets that are linked by common members, and return the indices of the sets in each group."""
    pairs = [(n_labels + i, member) for i, members in enumerate(sets) for member in members]
    a, b = torch.tensor(pairs, dtype=torch.int64, device="cpu").view(-1, 2).unbind(1)
    found = connected_components(n_labels + len(sets), a, b)
    together: dict[int, list[int]] = {}
    for i in range(len(sets)):
        together.setdefault(int(found[n_labels + i]), []).append(i)
    return list(together.values())


def _distinct_runs(rows: Sequence[Tensor]) -> Tensor | None:
    """Return the distinct runs, [runs, units], with each unit once.

    Return ``None`` if equal numbers of kept units would not give runs of equal width. This is so if the units of a run
    occur unequally often, if the runs have different numbers of units, or if two runs share only some of their units.
    """
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
