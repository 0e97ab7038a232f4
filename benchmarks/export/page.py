"""Write ``docs/results/export.md`` from the measurements; text above the mark is written by hand and stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import registry

Found = dict[str, Any]
TOLERANCE = 1e-5
"""Of the largest difference over the largest output of the eager model."""
MARK = "<!-- Everything below is made by python -m benchmarks export. -->\n"
TITLES = {"export": "`torch.export`", "compile": "`torch.compile`", "onnx": "ONNX", "inductor": "inductor"}
_TITLE = "# Export of pruned models"
_HEAD = """
This record exports pruned models with `torch.export`, `torch.compile` and ONNX, and compares the outputs with those of
the pruned model in eager mode. A pruned model should be exportable wherever the dense one is.
[The guide](../export.md) has the code.

- Measure: `python -m benchmarks export`.
- Results: `benchmarks/results/export.json`.
- Write the page again without measuring: `python -m benchmarks report`.
- Machine and versions: {made}.

## Findings

{findings}

## Limits

{limits}

## Models

Each model is the real class of its library with random weights, pruned by 40 % of its units on average, of all kinds.
A number is the largest difference of an output divided by the largest output; up to {tolerance:.0e} passes. *Dense
neither*: the model as its library made it cannot be exported; the text is the error for the pruned one. *Pruned only*:
only the pruned model fails, which would be an error of this library.

"""


def write_page(body: Found, path: Path) -> None:
    """Write all below the mark again; a page that does not exist gets a title above it."""
    before = path.read_text(encoding="utf8").partition(MARK)[0] if path.exists() else _TITLE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before.rstrip()}\n\n{MARK}{_text(body)}", encoding="utf8")


def _text(body: Found) -> str:
    found: Found = body["measurements"]
    ways = [way for way in TITLES if any(key.split("/")[-2] == way for key in found)]
    families: dict[str, list[str]] = {}
    for name, entry in registry().items():
        if any(f"{name}/{way}/pruned" in found for way in ways):
            families.setdefault(entry.family, []).append(name)
    names = [name for own in families.values() for name in own]
    text = _HEAD.format(
        tolerance=TOLERANCE, made=", ".join(f"{key} {value}" for key, value in body["conditions"].items()),
        findings="\n".join(_findings(found, names, ways)), limits="\n".join(_limits(found, names, ways)),
    )  # fmt: skip
    for family, own in families.items():
        rows = [[name, *(cell(found, name, way) for way in ways)] for name in own]
        lines = [["model", *(TITLES[way] for way in ways)], ["---"] * (1 + len(ways)), *rows]
        text += f"### {family}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
    return text.rstrip("\n") + "\n"


def _findings(found: Found, names: Sequence[str], ways: Sequence[str]) -> list[str]:
    """Sentences that follow from the figures alone."""
    lines = []
    for way in ways:
        own = [found[key] for name in names if (key := f"{name}/{way}/pruned") in found]
        errors = [one["error"] for one in own if passed(one)]
        largest = f", with a largest error of {max(errors):.0e}" if errors else ""
        lines.append(f"- {TITLES[way]}: {len(errors)} of {len(own)} pruned models pass{largest}.")
    alone = [f"`{name}` ({TITLES[way]})" for name, way in _failed(found, names, ways)
             if _dense_passes(found, name, way)]  # fmt: skip
    only = f"Only the pruned model fails: {', '.join(alone)}" if alone else "No model fails only when pruned"
    lines.append(f"- {only}.")
    return lines


def _limits(found: Found, names: Sequence[str], ways: Sequence[str]) -> list[str]:
    lines = [f"- {len(names)} of the registry's {len(registry())} models were measured."]
    both = [f"`{name}` ({TITLES[way]})" for name, way in _failed(found, names, ways)
            if not _dense_passes(found, name, way)]  # fmt: skip
    if both:
        lines.append(f"- Neither the dense nor the pruned model can be exported: {', '.join(both)}.")
    return lines


def _failed(found: Found, names: Sequence[str], ways: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [(name, way) for name in names for way in ways if f"{name}/{way}/pruned" in found]
    return [(name, way) for name, way in pairs if not passed(found[f"{name}/{way}/pruned"])]


def _dense_passes(found: Found, name: str, way: str) -> bool:
    dense = found.get(f"{name}/{way}/dense")
    return dense is not None and passed(dense)


def cell(found: Found, name: str, way: str) -> str:
    """What the table says of one model and where it goes."""
    pruned = found.get(f"{name}/{way}/pruned")
    if pruned is None:
        return "-"
    if passed(pruned):
        return f"{pruned['error']:.0e}"
    why = str(pruned.get("verdict", f"differs by {pruned.get('error', float('nan')):.0e}"))
    why = why.removeprefix("exception: ").replace("|", "/").replace("<", "&lt;")[:80]
    return f"pruned only: {why}" if _dense_passes(found, name, way) else f"dense neither: {why}"


def passed(answer: dict[str, Any]) -> bool:
    """Whether the model went there and computes the same."""
    return bool(answer.get("error", float("inf")) <= TOLERANCE)
