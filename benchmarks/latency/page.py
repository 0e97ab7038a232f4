"""Write the page ``docs/results/latency.md``, from the measurements of :mod:`benchmarks.latency.run`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.records import with_new_names

Found = dict[str, Any]
DIVERGES = 0.25

_HEAD = """# Latency

This record compares the speed-up in multiply-adds with the speed-up in measured time, because the two can differ. It
also checks budgets in time: what was asked for, predicted and measured.

- Measure: `python -m benchmarks latency --threads {threads}`.
- Results: `benchmarks/results/latency-cpu.json`.
- Write the page again without measuring: `python -m benchmarks report`.
- Machine and versions: {device}, {cpus} cores; torch {torch}.

{small}## Findings

{findings}

## Limits

- Weights are random and units are chosen by their norms. The record is about time, not about accuracy.
- All figures come from one run on one machine. Ratios are meaningful on a similar machine, milliseconds are not.
{limits}
## Speed-up in multiply-adds and in time

Each model runs in a process of its own. Times are medians of {repetitions} forwards of a batch of one, in which the
dense model and its pruned forms take turns.

- *MACs*: multiply-adds of the dense model divided by those of the pruned one.
- *Realised*: median time of the dense model divided by that of the pruned one.
- *Verdict*: whether the two differ by more than 25 %.

{table}

## Budgets in time

Half of the dense model's median time was asked for.

- *Predicted*: the time according to the tables of layer times, before the pruned model ran.
- *Measured*: the time of the pruned model within the search.
- *Again*: the time of the same model in the run of the table above.

{budgets}
"""

_SMALL = "**Small inputs, which only try the command: these figures say nothing.**\n\n"


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
            apart = _apart(row["macs"], realised)
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


def _findings(found: Found) -> list[str]:
    """Sentences that follow from the figures alone."""
    lines = []
    shares: list[float] = []
    for threads in _threads(found):
        rows = [(_pieces(key)[0], *each) for key, one in found.items() if _pieces(key)[1] == threads
                for each in _ratios(one)]  # fmt: skip
        apart = [(model, macs, realised) for model, macs, realised in rows if _apart(macs, realised)]
        if rows:
            names = ", ".join(dict.fromkeys(model for model, _, _ in apart))
            which = f" They belong to {names}." if apart else ""
            of = "1 thread" if threads == "1" else f"{threads} threads"
            lines.append(f"- With {of} the two speed-ups differ by more than 25 % in {len(apart)} of {len(rows)} rows."
                         + which)  # fmt: skip
        if apart:
            model, macs, realised = min(apart, key=lambda row: row[2] / row[1])
            lines.append(f"- The largest difference there is that of {model}: {macs:.2f}x in multiply-adds, "
                         f"{realised:.2f}x in time.")  # fmt: skip
    for one in found.values():
        shares += [row["fit"]["measured_ms"] / row["fit"]["dense_ms"] for row in one.get("rows", ()) if row["fit"]]
    if shares:
        lines.append(f"- Half of the dense time was asked for. The pruned models took {min(shares):.0%} to "
                     f"{max(shares):.0%} of it.")  # fmt: skip
    return lines or ["- Nothing was measured."]


def _ratios(one: Found) -> Iterator[tuple[float, float]]:
    """Speed-up in multiply-adds and in time of each pruned form of a model."""
    for row in one.get("rows", ()):
        yield row["macs"], one["dense"]["p50_ms"] / row["p50_ms"]


def _apart(macs: float, realised: float) -> bool:
    return abs(realised / macs - 1) > DIVERGES


def _threads(found: Found) -> Sequence[str]:
    return sorted({_pieces(key)[1] for key in found}, key=int)


def _limits(found: Found) -> str:
    """Models without an answer, and the warnings of the search."""
    lines = [f"- Without a result: {_pieces(key)[0]} with {_pieces(key)[1]} threads ({one['verdict'][:100]})."
             for key, one in found.items() if "verdict" in one]  # fmt: skip
    said = [f"- {_pieces(key)[0]}: {text}" for key, one in found.items() for text in one.get("warnings", ())]
    warned = ["", "Warnings of the search:", "", *said] if said else []
    return "".join(f"{line}\n" for line in [*lines, *warned])


def write_page(body: Found, path: Path) -> None:
    """Write the page."""
    found = body["measurements"]
    text = _HEAD.format(
        threads=" ".join(_threads(found)), repetitions=body["repetitions"], small=_SMALL if body["small"] else "",
        findings="\n".join(_findings(found)), limits=_limits(found), table=table(found), budgets=budgets(found),
        **with_new_names(body["conditions"]),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf8")
