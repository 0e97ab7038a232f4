"""The page ``docs/latency.md``, from the measurements of :mod:`benchmarks.latency`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

Found = dict[str, Any]
DIVERGES = 0.25

_HEAD = """# Latency

Made by `python -m benchmarks.latency --threads {threads}`; the numbers are in `benchmarks/results/latency-cpu.json`.

All figures come from one run on one machine ({cpu}, {cores} cores; torch {torch}), each model in a process of its own.
Times are medians of {repetitions} forwards of a batch of one, in which the dense model and its pruned forms take turns.
Weights are random and units are chosen by their norms: this is about time, not about accuracy. Ratios mean something
on a similar machine; milliseconds do not.

- *MACs*: multiply-adds of the dense model over those of the pruned one.
- *Realised*: median time of the dense model over that of the pruned one.
- *Verdict*: whether the two differ by more than 25 %.

"""

_SMALL = "**Small inputs, which only try the command: these figures say nothing.**\n\n"

_BUDGETS = """
## Budgets in time

Half of the dense model's median time was asked for. *Predicted* is what the tables of layer times said before the
pruned model ran, *measured* what it then took, within the search; *again* is the same model in the run of the table
above.

"""


def _pieces(key: str) -> tuple[str, str]:
    model, _, threads = key.rpartition("/")
    return model, threads


def _rows(found: Found) -> Iterator[str]:
    for key, one in found.items():
        model, threads = _pieces(key)
        if "verdict" in one:
            yield f"| {model} | {threads} | {one['verdict'][:100]} | | | | |"
            continue
        dense = one["dense"]["p50_ms"]
        for row in one["rows"]:
            realised = dense / row["p50_ms"]
            apart = abs(realised / row["macs"] - 1) > DIVERGES
            yield (
                f"| {model} | {threads} | `{row['budget']}` | {row['p50_ms']:.2f} of {dense:.2f} ms | "
                f"{row['macs']:.2f}x | {realised:.2f}x | {'**diverges**' if apart else 'agrees'} |"
            )


def table(found: Found) -> str:
    """Speed-ups in MACs and on the clock as a Markdown table."""
    head = ["| model | threads | budget | p50 | MACs | realised | verdict |", "|---|---:|---|---:|---:|---:|---|"]
    return "\n".join([*head, *_rows(found)])


def budgets(found: Found) -> str:
    """What was asked for in time, predicted and measured, as a Markdown table."""
    lines = [
        "| model | threads | asked | predicted | measured | again | models measured | multiple |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key, one in found.items():
        for row in one.get("rows", ()):
            if (fit := row["fit"]) is not None:
                model, threads = _pieces(key)
                shares = [fit[name] / fit["dense_ms"] for name in ("target_ms", "predicted_ms", "measured_ms")]
                again = row["p50_ms"] / one["dense"]["p50_ms"]
                cells = " | ".join(f"{share:.0%}" for share in (*shares, again))
                lines.append(f"| {model} | {threads} | {cells} | {fit['iterations']} | {fit['round_to']} |")
    return "\n".join(lines)


def write_page(body: Found, path: Path) -> None:
    """Write the page."""
    found = body["measurements"]
    threads = " ".join(sorted({_pieces(key)[1] for key in found}, key=int))
    head = _HEAD.format(threads=threads, repetitions=body["repetitions"], **body["conditions"])
    head += _SMALL if body["small"] else ""
    said = [f"- {_pieces(key)[0]}: {text}" for key, one in found.items() for text in one.get("warnings", ())]
    warned = "\n\nWarnings of the search:\n\n" + "\n".join(said) if said else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + table(found) + "\n" + _BUDGETS + budgets(found) + warned + "\n")
