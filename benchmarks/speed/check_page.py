"""Write ``docs/results/check-cost.md`` from the lines of :mod:`benchmarks.speed.check`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.markdown import as_row

Line = Mapping[str, Any]

TARGET = 8
"""Forwards of the dense model that a trace with its check may take, at the median."""

COLUMNS: dict[str, Callable[[Line], float]] = {
    "trace without check": lambda line: _forwards(line, "unchecked"),
    "its check": lambda line: _forwards(line, "trace") - _forwards(line, "unchecked"),
    "trace": lambda line: _forwards(line, "trace"),
    "verify": lambda line: _forwards(line, "verify"),
}
"""What is measured -> how many forwards it takes."""

SIZES: dict[str, Callable[[float], bool]] = {
    "forward above 100 ms": lambda seconds: seconds > 0.1,
    "forward of 10 to 100 ms": lambda seconds: 0.01 <= seconds <= 0.1,
    "forward below 10 ms": lambda seconds: seconds < 0.01,
}

_HEAD = """# Cost of the check

This record measures what the default call of `trace`, its check and `verify` cost, in forwards of the dense model.

- Measure: `python -m benchmarks speed --check`. It goes on where it stopped; `--models NAME` measures a model again.
- Results: `benchmarks/results/check-cost.jsonl`, one line for each model.
- Machine and versions: {conditions}.

## Findings

{findings}

## Limits

{limits}

## By size and family

Medians over models, in forwards of the dense model.

{groups}

## Method

The sample is every seventh model of the registry, measured in random order, with the inputs that it was designed for
(one image, two or three short texts). The dense forward, `trace(check=False)`, `trace` and `verify` with their defaults
take turns in one process with one thread, after one dense forward and one `trace`. Repetitions: {repetitions}, of
which medians are kept; `verify` runs once. Times are those of the processor, so that other work on the machine counts
as little as possible. Models of more than 1.5 GB are left out.

A forward in milliseconds leaves most of its time to Python. A trace looks at each operator and each module in Python,
so that it takes many forwards of such a model, and little time.

## Models

{models}
"""


def _forwards(line: Line, what: str) -> float:
    return float(line[what]["median"] / line["forward"]["median"])


def write_check_page(lines: Iterable[Line], path: Path, *, listed: Collection[str] = ()) -> None:
    """Write the page; the newest line of each model counts.

    Args:
        lines: the measurements.
        path: the page.
        listed: names of the sample, of which the page says how many were not measured.
    """
    newest = {line["model"]: line for line in lines}
    found = [line for line in newest.values() if "verdict" not in line]
    groups = {"all": found, **{name: [line for line in found if belongs(line["forward"]["median"])]
                               for name, belongs in SIZES.items()}}  # fmt: skip
    for line in found:
        groups.setdefault(f"family {line['family']}", []).append(line)
    text = _HEAD.format(
        conditions=_conditions(found), findings="\n".join(_findings(groups)), groups=_table(groups),
        limits="\n".join(_limits(groups, [line for line in newest.values() if "verdict" in line],
                                 sorted(set(listed) - newest.keys()))),
        repetitions=max((line["repetitions"] for line in found), default=0), models=_models(found),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf8")


def _conditions(found: Sequence[Line]) -> str:
    kinds = {tuple(sorted(line["conditions"].items())) for line in found}
    return "; or ".join(", ".join(f"{name} {value}" for name, value in kind) for kind in sorted(kinds))


def _median(lines: Sequence[Line], what: str) -> float:
    return median(COLUMNS[what](line) for line in lines)


def _findings(groups: Mapping[str, Sequence[Line]]) -> list[str]:
    if not groups["all"]:
        return ["- Nothing was measured."]
    texts = []
    for name in ("all", *SIZES):
        if lines := groups[name]:
            figures = ", ".join(f"{what} {_median(lines, what):.1f}" for what in COLUMNS)
            texts.append(f"- {len(lines)} models ({name}), forwards at the median: {figures}.")
    slowest = max(groups["all"], key=lambda line: line["trace"]["median"])
    texts.append(f"- The longest `trace` takes {slowest['trace']['median']:.1f} s (`{slowest['model']}`).")
    return texts


def _limits(groups: Mapping[str, Sequence[Line]], left_out: Sequence[Line], missing: Sequence[str]) -> list[str]:
    texts = [
        f"- Target missed, {name}: `trace` takes {measured:.1f} forwards (target ≤ {TARGET})."
        for name in ("all", *SIZES)
        if (lines := groups[name]) and (measured := _median(lines, "trace")) > TARGET
    ]
    texts += [f"- Not measured: `{line['model']}` ({line['verdict']})." for line in left_out]
    if missing:
        texts.append(
            f"- {len(missing)} models of the sample were not measured: {', '.join(f'`{n}`' for n in missing)}."
        )
    return [*texts, "- All figures come from one machine, which other work shared."]


def _table(groups: Mapping[str, Sequence[Line]]) -> str:
    rows = [
        as_row([name, len(lines), *(f"{_median(lines, what):.1f}" for what in COLUMNS)])
        for name, lines in groups.items() if lines
    ]  # fmt: skip
    return "\n".join([as_row(["models", "number", *COLUMNS]), "| --- |" + " ---: |" * (len(COLUMNS) + 1), *rows])


def _models(found: Sequence[Line]) -> str:
    rows = [
        as_row([f"`{line['model']}`", f"{line['forward']['median'] * 1e3:.1f}",
                *(f"{value(line):.1f}" for value in COLUMNS.values())])
        for line in sorted(found, key=COLUMNS["trace"])
    ]  # fmt: skip
    return "\n".join([as_row(["model", "forward, ms", *COLUMNS]), "| --- |" + " ---: |" * (len(COLUMNS) + 1), *rows])
