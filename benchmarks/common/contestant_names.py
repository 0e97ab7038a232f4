"""Name the contestants that pages treat in a way of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

UNPRUNED = "dense"
"""The control that is never cut and takes as many steps."""

SMALL = "small-dense"
"""The control that begins narrow, with fresh weights."""

ONESHOT = "oneshot"
"""This library's call that needs no training, before all steps of fine-tuning."""

OURS, OURS_BEFORE = "etp", "etp-global"
"""The default of this library; and what it was when the short schedules were run: scores compared across groups."""

CONTROLS = (UNPRUNED, SMALL, "random", "l1-uniform")
"""The two above; random units; the L1 norm with the same share everywhere."""

DISTILLED = "+kd"
"""The suffix of a contestant that is fine-tuned by distillation."""

FRESH = "+fresh"
"""The suffix of a method of this library that begins with random weights, as Torque (r)."""


def bare_name(name: str) -> str:
    """Return the name of a contestant without its suffixes."""
    return name.removesuffix(DISTILLED).removesuffix(FRESH)


def ours(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the name of the method that a page compares with others: short schedules were run before the change."""
    configs = [record["config"] for record in records]
    before = any(config["scale"] == "cpu" and config["method"] == OURS_BEFORE for config in configs)
    return OURS_BEFORE if before else OURS


def stands_for(method: str, rival: str, own: str) -> bool:
    """Return True if a method is a variant of a rival. The rival without a force is the control of ``own``."""
    return method in RIVALS[rival] and (not method.endswith("-hard") or method == f"{own}-hard")


def begins_fresh(name: str) -> bool:
    """Return True if a contestant begins with random weights, and so trains for the steps of a small dense network."""
    return FRESH in name or bare_name(name) == SMALL


RIVALS = {
    "DepGraph": ("tp-groupnorm-local", "tp-groupnorm", "depgraph"), "Torque": ("torque-published", "torque"),
    "L1": ("l1-uniform", "l1-gradual"), "Taylor": ("taylor", "taylor-gradual"),
    "no force": ("etp-hard", "etp-global-hard"), "a narrow network": (SMALL,),
}  # fmt: skip
"""What `etp` is compared with. Of several variants of a rival the best on the validation part counts."""

STRONGEST = "the strongest"
"""The rival that has the best mean on the validation part, whichever it is."""
