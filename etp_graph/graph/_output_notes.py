"""Say which groups fewer outputs would open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from etp_graph.plan import Group

from ._labels import FEEDS_OUTPUT, Labels
from ._tracker import Tracker

SEVERAL = "the outputs are"
"""How such a note begins."""

_READING_OF_KIND = {"heads": 1, "query_heads": 2}
"""Number of the reading that groups of a kind come from, see :mod:`etp_graph.graph._readings`; 0 for others."""

_NAMED = 4
"""A note names at most this many groups or combinations of outputs."""


def notes_on_outputs(
    trackers: Sequence[Tracker], groups: Sequence[Group], kinds: frozenset[str], shown: Sequence[str]
) -> tuple[str, ...]:
    """Return a note that says which groups are locked only because of some of several outputs.

    Args:
        trackers: of the trace.
        groups: its groups.
        kinds: the kinds of units to prune.
        shown: the entries of what the model returned that count as outputs.
    """
    if len(shown) < 2:
        return ()
    opens: dict[tuple[str, ...], list[str]] = {}
    readings = [_Shown(tracker.labels) for tracker in trackers]
    for group in groups:
        if group.locked == FEEDS_OUTPUT and group.kind in kinds:
            entries = readings[min(_READING_OF_KIND.get(group.kind, 0), len(readings) - 1)].entries_that_lock(group)
            if entries and len(entries) < len(shown):
                opens.setdefault(tuple(name for name in shown if name in entries), []).append(group.name)
    if not opens:
        return ()
    best = sorted(opens.items(), key=lambda item: -len(item[1]))[:_NAMED]
    parts = [f"without {_listed(entries)} {_listed(names)}" for entries, names in best]
    return (
        f"{SEVERAL} {_listed(shown)}. If you use only some of them, trace(..., outputs=[...]) with these "
        f"opens groups: {'; '.join(parts)}",
    )


class _Shown:
    """The units that the entries of a model's output show.

    Args:
        labels: labels of one reading.
    """

    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        self._root = labels.roots()
        self._only = labels.locked_only_for(FEEDS_OUTPUT, self._root)
        by_entry: dict[str, list[Tensor]] = {}
        for entry, found in labels.shown:
            by_entry.setdefault(entry, []).append(found)
        self._units: Mapping[str, Tensor] = {
            entry: labels.mark_members(self._root, found) for entry, found in by_entry.items()
        }

    def entries_that_lock(self, group: Group) -> set[str]:
        """Return the entries that show units of a group.

        Nothing if the group is locked for another reason, too, or if no layer reads its units: a layer whose output
        nobody uses is no use to prune.
        """
        found: set[str] = set()
        if not any((piece.tensor, piece.axis) in self._labels.inputs for piece in group.slices):
            return found
        for piece in group.slices:
            ids = self._labels.axes.get((piece.tensor, piece.axis))
            if ids is None:
                continue
            units = self._root[ids[torch.as_tensor(list(piece.index))]]
            if not bool(self._only[units].all()):
                return set()
            found |= {entry for entry, shown in self._units.items() if bool(shown[units].any())}
        return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
