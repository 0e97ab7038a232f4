"""Write ``docs/results/graph-sources.md`` from what :mod:`benchmarks.graph_sources.run` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SOURCES = ("labels", "torch-pruning")

INTRODUCTION = """# Two sources of plans

Compare the plans of `etp.trace(model, x)` with those of `etp.trace(model, x, graph="torch-pruning")`. The first lets
labels of the units travel through one forward. The second builds Torch-Pruning's `DependencyGraph` with this
library's stand-ins in place, and reads its edges. Both go through the same check, which locks the groups that it
refutes.

Made by `python -m benchmarks graph-sources`; the numbers are in `benchmarks/results/graph-sources.json`.

{findings}

How to read the table:

- *groups*: groups that can be pruned, of all groups.
- *removable*: share of the parameters that goes if every prunable group keeps its minimum of units.
- *refuted*: groups that the source found and the check locked.
- *seconds*: processor time of the trace without the check, on one thread.

Use `graph="labels"`, the default, unless you have a reason not to. Use `graph="torch-pruning"` to compare a method on
the groups of DepGraph (Fang et al. 2023), or where a forward cannot run under this library's tracer. To bring hints
and pruners of your own, build the graph yourself and call `etp_graph.integrations.torch_pruning.plan_from_depgraph`.
"""


def write_page(body: dict[str, Any], out: Path) -> None:
    """Write the page; a measurement that failed stands there with its verdict."""
    found = body["measurements"]
    names = list(dict.fromkeys(key.rpartition("/")[0] for key in found))
    head = "| model | " + " | ".join(f"{s}: groups | removable | refuted | seconds" for s in SOURCES) + " |"
    rows = [head, "|---|" + "---:|" * 4 * len(SOURCES)]
    rows += [
        f"| {name} | " + " | ".join(_cells(found.get(f"{name}/{s}", {})) for s in SOURCES) + " |" for name in names
    ]
    facts = ", ".join(f"{key} {value}" for key, value in body["conditions"].items() if value)
    text = INTRODUCTION.format(findings=_findings(found, names))
    out.write_text("\n".join([text, *rows, "", f"Conditions: {facts}.", ""]), encoding="utf8")


def _cells(row: dict[str, Any]) -> str:
    if "verdict" in row or not row:
        return f"{row.get('verdict', 'not measured')} | | | "
    return f"{row['prunable']} of {row['groups']} | {row['share']:.0%} | {row['refuted']} | {row['seconds']:.1f}"


def _findings(found: dict[str, Any], names: list[str]) -> str:
    """Return the comparison in sentences, from the measurements alone."""
    both = [(found[f"{n}/labels"], found[f"{n}/torch-pruning"]) for n in names if f"{n}/torch-pruning" in found]
    ours = [a for a, _ in both if "share" in a]
    equal = sum("share" in a and "share" in b and abs(a["share"] - b["share"]) < 0.005 for a, b in both)
    less = sum("share" in a and "share" in b and b["share"] < a["share"] - 0.005 for a, b in both)
    more = sum("share" in a and "share" in b and b["share"] > a["share"] + 0.005 for a, b in both)
    failed = sum("share" not in b for _, b in both)
    refuted = sum(b.get("refuted", 0) for _, b in both)
    return (
        f"Of {len(both)} models, labels open {len(ours)}. Torch-Pruning's graph opens as many parameters on {equal}, "
        f"fewer on {less}, more on {more}, no plan on {failed}. The check refutes {refuted} of its groups and "
        f"{sum(a.get('refuted', 0) for a, _ in both)} of those of labels."
    )
