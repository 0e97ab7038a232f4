"""Compare methods on a task, choose a recipe, or work off the plan: the command ``python -m benchmarks contest``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

MODES = {
    "recipe": ("recipes.recipe", "choose the learning rate of a task's recipe by the dense control"),
    "queue": ("queue.queue", "take up what is missing of the planned runs"),
    "status": ("queue.status", "show what of the planned runs is done, and the hours left"),
}
"""First word of the command -> its module and its sentence. Every other first word is a task of the comparison."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the mode that the first argument names; without one compare methods on a task."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    module = MODES[words.pop(0)][0] if words and words[0] in MODES else "contest.run"
    import_module(f"benchmarks.{module}").main(words)
