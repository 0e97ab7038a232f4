"""Write ``docs/results/coverage-sweep.md`` from the lines of :mod:`benchmarks.coverage.sweep`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.markdown import as_row
from benchmarks.coverage.sources import cases, missing_packages
from etp_graph.plan import without_line

Line = Mapping[str, Any]

_HALF = 0.5
"""Share of the parameters that a model counts as open from."""

_LEAST = 0.005
"""Share of the parameters in no group that is named."""

_NOT_RUN = "in modules that these inputs do not run"
_NO_GROUP = "in no group"

_HEAD = """# Coverage of models that nobody chose

This record checks the plan of the default call, `trace(model, inputs)`, on models that the libraries list themselves.
Nobody chose them, and no hint is given. [The record on coverage](coverage.md) checks chosen models more deeply.

- Measure: `python -m benchmarks coverage --sweep`. It goes on where it stopped. `--models SOURCE:NAME` measures a model
  again, and `--again exception` all with this outcome.
- Results: `benchmarks/results/coverage-sweep.jsonl`, one line for each model, as it came.

## Findings

{findings}

## Limits

{limits}

## Families

*Exact*: the pruned model computes what the masked model computes, with half of the units removed. *Half open*: at least
half of the parameters are held by units that may be removed by default. *Prunable* and *seconds* are medians; seconds
are those of `trace`, on a machine that other work shared.

{families}

## Reasons

What keeps parameters closed: the share is the mean over all traced models. A parameter counts for every reason that
locks it. [What is locked, and how to open it](../locked.md) explains each reason.

Parameters *in modules that these inputs do not run* have no units, because no call shows what depends on them. Such are
the stages of an encoder behind the one whose output the decoder takes (PSPNet leaves out the last two of a ResNet), the
half of a model that only generation or training calls, and towers of models for which no inputs were found. Lines from
before this share was measured count it as *in no group*.

{reasons}

## Models that are not exact

{failures}

## Models of which less than half is open

{closed}

## Models that were not built

These models are not counted above: no small version of them could be built, or none of the inputs that were tried runs.

{missing}

## Method

Models of transformers are built from the default configuration with short, narrow layers, small patches and short
tables of positions, so that each part has about its share of the full model, or as much smaller as the class allows.
Their inputs follow from the arguments of the forward, with places for the features of images and sounds where the model
says how many. Of the inputs that run, those that run most of the parts are taken. Models of the other libraries are the
smallest of their family. Models of more than 120 million parameters are left out. Each model runs in a process of its
own, with a limit of time and memory. `verify` randomises the weights, removes half of the units of every prunable group
and compares outputs and gradients in float64.
"""


def write_sweep_page(lines: Iterable[Line], path: Path) -> None:
    """Write the page of the last line of each model."""
    latest = {line["key"]: line for line in lines}
    built = [line for line in latest.values() if line["outcome"] != "not built"]
    rest = [line for line in latest.values() if line["outcome"] == "not built"]
    text = _HEAD.format(
        findings="\n".join(_findings(built)), limits="\n".join(_limits(built, rest)),
        families="\n".join(_families(built)), reasons="\n".join(_reasons(built)),
        failures=_listed([line for line in built if line["outcome"] != "exact"]),
        closed=_shares([line for line in built if line["outcome"] == "exact" and line["prunable"] < _HALF]),
        missing=_listed(rest),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf8")


def _findings(built: Sequence[Line]) -> list[str]:
    if not built:
        return ["- No model was measured."]
    outcomes = Counter(line["outcome"] for line in built)
    half = sum(line.get("prunable", 0.0) >= _HALF for line in built)
    refuted = sum(bool(line.get("refuted")) for line in built)
    other = ", ".join(f"{name} {count}" for name, count in outcomes.most_common() if name != "exact")
    return [
        f"- {outcomes['exact']} of {len(built)} models are exact. The others: {other or 'none'}.",
        f"- {half} of {len(built)} models ({half / len(built):.0%}) have at least half of their parameters prunable by "
        "default.",
        f"- Models on which the check of `trace` locked groups that the tracer alone would have got wrong: {refuted}.",
    ]


def _limits(built: Sequence[Line], rest: Sequence[Line]) -> list[str]:
    found = [
        f"- {len(built) + len(rest)} of the {sum(1 for _ in cases())} models that are listed were tried. {len(rest)} "
        "of these could not be built and run. The others were not checked.",
        "- The sweep takes the quick families first, so that slow ones (detectors, video) have few models.",
        "- The lines come from several states of the code. Models that a change repaired were measured again. "
        f"{sum(line.get('dtype') == 'float32' for line in built)} models were judged in float32, most of them before "
        "grouped products of experts ran in float64.",
        "- Weights are random, and most models are small versions. The record says nothing about accuracy.",
    ]
    if absent := missing_packages():
        found.append(f"- These packages were not installed, so their models are missing: {', '.join(absent.values())}.")
    return found


def _families(built: Sequence[Line]) -> list[str]:
    by_family: dict[str, list[Line]] = defaultdict(list)
    for line in built:
        by_family[line["family"]].append(line)
    rows = [as_row(("family", "models", "exact", "half open", "prunable", "wrong", "exceptions", "seconds"))]
    rows.append(as_row(["---", *["---:"] * 7]))
    for family, own in sorted(by_family.items()):
        outcomes = Counter(line["outcome"] for line in own)
        shares = [line["prunable"] for line in own if "prunable" in line]
        seconds = [line["trace_seconds"] for line in own if "trace_seconds" in line]
        rows.append(as_row((
            family, len(own), outcomes["exact"], sum(share >= _HALF for share in shares),
            f"{median(shares):.0%}" if shares else "-", outcomes["wrong"], outcomes["exception"],
            f"{median(seconds):.1f}" if seconds else "-",
        )))  # fmt: skip
    return rows


def _reasons(built: Sequence[Line]) -> list[str]:
    traced = [line for line in built if "locked" in line]
    shares: Counter[str] = Counter()
    models: dict[str, set[str]] = defaultdict(set)
    for line in traced:
        for reason, share in [*line["locked"].items(), *_outside_groups(line)]:
            shares[_kind_of(reason)] += share
            models[_kind_of(reason)].add(line["key"])
    rows = [as_row(("reason", "models", "share of parameters")), as_row(["---", "---:", "---:"])]
    return rows + [
        as_row((reason, len(models[reason]), f"{share / len(traced):.1%}")) for reason, share in shares.most_common(20)
    ]


def _outside_groups(line: Line) -> list[tuple[str, float]]:
    """Return why parameters are in no group, with their share."""
    not_run = min(line.get("not_run", 0.0), line["in_no_group"])
    found = [(_NOT_RUN, not_run), (_NO_GROUP, line["in_no_group"] - not_run)]
    return [(reason, share) for reason, share in found if share >= _LEAST]


def _kind_of(reason: str) -> str:
    """Return a reason without names of modules, lines of code and numbers."""
    reason = without_line(reason)
    return re.sub(r"\([^()]*Error[^()]*\).*", "(error)", re.sub(r"'[a-z_.]*[.\d][^']*'|'[a-z_]*\d*'$", "...", reason))[
        :110
    ]


def _shares(lines: Sequence[Line]) -> str:
    rows = [as_row(("model", "prunable", "in no group", "main reasons")), as_row(["---", "---:", "---:", "---"])]
    for line in sorted(lines, key=lambda line: float(line["prunable"])):
        reasons = [*_outside_groups(line)[:1], *list(line["locked"].items())[:2]]
        main = "; ".join(f"{share:.0%} {reason[:120]}" for reason, share in reasons)
        rows.append(as_row((line["key"], f"{line['prunable']:.0%}", f"{line['in_no_group']:.0%}", main)))
    return "\n".join(rows) if lines else "None."


def _listed(lines: Sequence[Line]) -> str:
    rows = [as_row(("model", "outcome", "message")), as_row(["---", "---", "---"])]
    for line in sorted(lines, key=lambda line: (line["outcome"], line["key"])):
        message = re.sub(r"[<>`\n]", " ", str(line.get("message", "")))[:200]
        rows.append(as_row((line["key"], line["outcome"], message)))
    return "\n".join(rows) if lines else "None."
