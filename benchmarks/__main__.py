"""Run a benchmark by its name: ``python -m benchmarks COMMAND``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "contest": ("contest.command", "Compare methods on a task, each on the same terms."),
    "report": ("report.run", "Write the records of measurements from committed results, without measuring."),
    "reproduce": ("papers.reproduce", "Write the papers' tables and figures, row by row."),
    "paper-figures": ("papers.filters", "Train a VGG-19 under the forces of the papers, and draw their figures."),
    "study": ("study.run", "Compare `etp` with variants of it, on validation parts alone."),
    "weight-decay": ("recipes.weight_decay", "Show how the weight decay of a task's recipe was chosen."),
    "gpu": (
        "gpu.run",
        "Run the queue on a GPU for some minutes, several runs at once, and pack what is needed to go on.",
    ),
    "gpu-step": ("gpu.step", "Measure the cost of the force on a training step, and whether it waits for the GPU."),
    "torch-pruning-check": (
        "contest.torch_pruning_check",
        "Check whether Torch-Pruning's pruned network is right.",
    ),
    "coverage": ("coverage.run", "Check the plan of each model of the registry, beside plain Torch-Pruning."),
    "graph-sources": ("graph_sources.run", "Compare the plans of both sources: labels, and Torch-Pruning's graph."),
    "export": ("export.run", "Export pruned models with torch.export, torch.compile and ONNX."),
    "families": (
        "export.families",
        "Export pruned models of families of transformers, and load them by their own class.",
    ),
    "serving": ("serving.run", "Prune a real language model, export it, and run it in engines without this library."),
    "encoder": ("serving.encoder", "Prune a sentence encoder, and run it in engines without this library."),
    "oneshot": (
        "oneshot.run",
        "Prune networks for vision, language and graphs without training, by this and other methods.",
    ),
    "llm": ("llm.run", "Prune a real language model without training, by this and other methods."),
    "llm-recovery": ("llm.recovery", "Train a pruned language model for a few hundred steps, in several ways."),
    "llm-streamed": ("llm.streamed", "Prune a language model in a folder without loading it, and measure its memory."),
    "latency": ("latency.run", "Compare the speed-up in multiply-adds with that in time, and check budgets in time."),
    "speed": ("speed.run", "Measure the cost of the force, of plans, of budgets and of surgery."),
    "scale": ("scale.run", "Measure the cost of the force on several ranks, and model it for more."),
    "weights-or-units": ("weights_or_units.run", "Compare masks on weights, removed units and a narrow network."),
}
"""Command -> module of this package with its ``main``, and one sentence."""


def describe_commands() -> str:
    """Return the help text: every command with its sentence."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {sentence}" for name, (_, sentence) in COMMANDS.items()]
    usage = "usage: python -m benchmarks COMMAND ..."
    return "\n".join([usage, "", *lines, "", "python -m benchmarks COMMAND --help lists the options of a command.", ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names with the other arguments; without one list the commands."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(describe_commands())
    elif words[0] in COMMANDS:
        import_module(f"benchmarks.{COMMANDS[words[0]][0]}").main(words[1:])
    else:
        sys.stderr.write(f"python -m benchmarks: no command {words[0]!r}; choose from {', '.join(COMMANDS)}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
