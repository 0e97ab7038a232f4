"""The page on pruning without training for networks other than language models."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from benchmarks.common.records import Record
from benchmarks.oneshot.methods import MADE_GOOD, METHODS
from benchmarks.tasks.base import CALIBRATED_AT_ONCE, CALIBRATION

DENSE = "dense"

TITLES = {"nothing": "nothing", "norms": "batch norms anew", "weights": "new weights", "blend": "best blend"}

DEFAULT = ("fisher", "blend")

HEAD = """# Vision, language and graphs without training

A ResNet-56, a BERT and a GAT are pruned in one call, and not trained. [Another page](llm.md) has a generating language
model.

- Measure: `python -m benchmarks oneshot` (one thread; a run that has a line is not repeated).
- Results: `benchmarks/results/oneshot.jsonl`.

"""


def page(records: Sequence[Record]) -> str:
    """The page, from all lines."""
    tasks = list(dict.fromkeys(one["config"]["task"] for one in records))
    if not any(one["config"]["method"] != DENSE for one in records):
        return HEAD + "No runs yet.\n"
    sections = [_task([one for one in records if one["config"]["task"] == name]) for name in tasks]
    return HEAD + "\n".join(sections) + "\n" + _terms()


def _task(records: Sequence[Record]) -> str:
    dense = [one for one in records if one["config"]["method"] == DENSE]
    rows = [one for one in records if one["config"]["method"] != DENSE]
    text = f"## {dense[0]['title']}\n\n"
    text += f"- The dense network has {_shown([one['value'] for one in dense])} {dense[0]['metric']}, in percent.\n"
    speed_ups = sorted({one["config"]["speed_up"] for one in rows})
    for speed_up in speed_ups:
        text += _finding(rows, speed_up)
    goods = [good for good in MADE_GOOD if any(one["config"]["made_good"] == good for one in rows)]
    columns = [(speed_up, good) for speed_up in speed_ups for good in goods]
    text += "\n| method | " + " | ".join(f"{speed_up:g}x, {TITLES[good]}" for speed_up, good in columns) + " |\n"
    text += "|---|" + "---:|" * len(columns) + "\n"
    for name in METHODS:
        cells = [_shown(_values(rows, name, speed_up, good)) for speed_up, good in columns]
        if any(cells):
            text += f"| `{name}` | " + " | ".join(cells) + " |\n"
    seeds = sorted({one["config"]["seed"] for one in rows})
    text += f"\nSeeds: {', '.join(map(str, seeds))}. With several, the mean, and the range in parentheses."
    whole = len(columns)
    missing = [
        f"`{name}`" for name in METHODS
        if sum(bool(_values(rows, name, speed_up, good)) for speed_up, good in columns) < whole
    ]  # fmt: skip
    return text + (f" Not run, or not at every speed-up: {', '.join(missing)}.\n" if missing else "\n")


def _values(rows: Sequence[Record], name: str, speed_up: float, good: str) -> list[float]:
    wanted = {"method": name, "speed_up": speed_up, "made_good": good}
    return [one["value"] for one in rows if all(one["config"][key] == value for key, value in wanted.items())]


def _finding(rows: Sequence[Record], speed_up: float) -> str:
    """The best method with and without making good, by the mean."""
    found: dict[tuple[str, str], float] = {}
    for name in METHODS:
        for good in MADE_GOOD:
            if values := _values(rows, name, speed_up, good):
                found[name, good] = mean(values)
    without: Any = [key for key in found if key[1] == "nothing"]
    order = sorted(found, key=found.__getitem__, reverse=True)[:3]
    best = ", ".join(f"`{name}` with {TITLES[good]} {100 * found[name, good]:.1f}" for name, good in order)
    text = f"- At {speed_up:g}x, best first: {best}"
    if without:
        plain = max(without, key=found.__getitem__)
        text += f". Without making good: `{plain[0]}` {100 * found[plain]:.1f}"
    if DEFAULT in found:
        text += f". The default of `oneshot_`, `{DEFAULT[0]}` with {TITLES[DEFAULT[1]]}: {100 * found[DEFAULT]:.1f}"
    return text + ".\n"


def _shown(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ({100 * min(values):.1f} to {100 * max(values):.1f})" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def _terms() -> str:
    total, at_once = CALIBRATION, CALIBRATED_AT_ONCE
    text = f"""## Terms

- *Calibration*: {total} training examples in batches of {at_once}; of a graph, all of it. Criteria that read gradients
  draw labels from the predictions of the network, but `taylor` takes those of the data.
- *Batch norms anew*: their statistics are measured on the calibration examples after surgery.
- *New weights*: the layers that read removed units are fitted by least squares, with the default ridge of `oneshot_`.
- *Best blend*: the weights are `old + blend * (new - old)`. Of 1, 0.75, 0.5, 0.25 and 0 the blend is taken whose
  outputs on the calibration examples are closest to those of the dense network. This is the default of `oneshot_`.
- Nothing was chosen by these figures: every setting is a default, or that of the source. Each run reads the test part
  once.

| method | criterion | units are compared | source |
|---|---|---|---|
"""
    for name, method in METHODS.items():
        scope = "within their group" if method.scope == "local" else "across groups"
        text += f"| `{name}` | `{method.criterion}` | {scope} | {method.source} |\n"
    return text
