"""Warn about attention modules whose heads cannot be pruned."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn

from etp_graph.plan import Group, Plan
from etp_graph.standins import HEADS


class UnprunableAttention(UserWarning):
    """Warning that a module has heads, none of which can be removed."""


def warn_about_attention(model: nn.Module, plan: Plan) -> None:
    """Warn once for each class of module that has heads but can lose none, with the reason and the remedy."""
    seen: dict[str, tuple[str, str]] = {}
    for name, module, reason in _locked_attention(model, plan):
        seen.setdefault(type(module).__qualname__, (name, reason))
    for cls, (name, reason) in seen.items():
        warnings.warn(
            f"{cls} ({name!r}) counts heads, and none can be removed: {reason}. To prune them, write a forward whose "
            f"sizes are attributes of the module (or -1) and declare it in about ten lines: "
            f"@etp_graph.register_standin({cls}); docs/architectures.md shows how.",
            UnprunableAttention,
            stacklevel=3,
        )


def _locked_attention(model: nn.Module, plan: Plan) -> Iterator[tuple[str, nn.Module, str]]:
    for name, module in model.named_modules():
        own = {t.partition(".")[0] for t, _ in module.named_parameters()}
        if not own or not any(type(getattr(module, h, None)) is int and getattr(module, h) > 1 for h in HEADS):
            continue
        inside = [group for group in plan.groups if _is_made_by(group, name)]
        if not inside or any(group.kind == "heads" and group.locked is None for group in inside):
            continue
        # Groups that are locked for these reasons need no warning.
        reasons = [group.locked for group in inside if group.locked and not group.locked.startswith(_KNOWN)]
        if reasons:
            yield name, module, reasons[0]


_KNOWN = ("kind ", "ignored", "feeds the model's output")


def _is_made_by(group: Group, module: str) -> bool:
    """Return True if a module or one of its submodules produces the units of a group."""
    return group.name == module or group.name.startswith(f"{module}.")
