"""The page ``docs/coverage.md`` from the measurements: a table for each family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .models import registry

_HEAD = """# Coverage

Made by `python -m benchmarks.coverage`; the numbers are in `benchmarks/results/coverage.json`.
It lists {listed} of the registry's {known} models: those of the run. `--families` and `--models` choose, `--resume`
adds to what is there, and without them everything is measured (hours on two cores).

Every model is the real class of its library with random weights, traced without hints for all kinds of units
(`prune="all"`). Weights, biases, norms and running statistics are replaced by random values, on average 30 % and then
70 % of the units of every prunable group are removed at random (each group has its own share), and the outputs of the
pruned model are compared with those of the masked model, in which the same units are zero (`etp_graph.verify`, float64;
float32 where an operator knows no float64). Gradients of all parameters are compared in the same way, on smaller inputs
where images are large. An error is the largest difference over the largest value; up to 1e-6 passes (1e-4 in float32).

*OK* means that the plan was right as traced. *OK, n refuted* means that `trace` would have been wrong about n groups
and that its check (on by default) locks them; the rest of the plan passes. *Units* names the kinds of the prunable
groups with their number; *locked* counts groups that cannot lose units, those that feed the output among them.
*Parameters* are those of the model and of the model with 30 % of the units of the kinds that are pruned by default
removed.

*Torch-Pruning* is the same test of `torch_pruning.DependencyGraph` alone, in the same run: no hints except that the
output layers stay whole, its own groups, 30 % of the channels of every group removed by its own surgery, at most
{limit:.0f} s. Its error is that of the outputs in eval mode. The seconds are those of `trace`, and those of
Torch-Pruning's build, groups and surgery (of the whole process, where it raised); {jobs} measurements ran at a time.

"""
_COLUMNS = ("model", "input", "units", "locked", "parameters", "after", "verdict", "error", "gradients", "trace, s",
            "Torch-Pruning", "error", "s")  # fmt: skip


def write_page(body: dict[str, Any], path: Path) -> None:
    """Write the page: what was measured and how, the tables, the sums."""
    found: dict[str, Any] = body["measurements"]
    families: dict[str, list[str]] = {}
    for name, entry in registry().items():
        if f"{name}/ours" in found or f"{name}/torch_pruning" in found:
            families.setdefault(entry.family, []).append(name)
    parts = []
    for family, names in families.items():
        rows = [_row(name, found.get(f"{name}/ours", {}), found.get(f"{name}/torch_pruning", {})) for name in names]
        table = [_line(_COLUMNS), _line(["---"] * 3 + ["---:"] * 3 + ["---"] + ["---:"] * 3 + ["---", "---:", "---:"])]
        ours = sum(passed(found.get(f"{name}/ours", {})) for name in names)
        theirs = sum(found.get(f"{name}/torch_pruning", {}).get("verdict") == "OK" for name in names)
        sums = f"Of {len(names)} models {ours} pass here and {theirs} with plain Torch-Pruning."
        parts.append(f"## {family}\n\n{sums}\n\n" + "\n".join([*table, *map(_line, rows)]) + "\n")
    made = ", ".join(f"{key} {value}" for key, value in body["conditions"].items())
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = sum(map(len, families.values()))
    head = _HEAD.format(limit=body["limit_seconds"], jobs=body["jobs"], listed=listed, known=len(registry()))
    path.write_text(head + "\n".join(parts) + f"\nThe run took {body['seconds'] / 60:.0f} minutes: {made}.\n")


def passed(ours: dict[str, Any]) -> bool:
    """Whether every group that the plan would prune is proven."""
    limit = 1e-6 if ours.get("dtype") == "float64" else 1e-4
    return max(ours.get("error", 1.0), ours.get("gradient_error") or 0.0) <= limit


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def _row(name: str, ours: dict[str, Any], peer: dict[str, Any]) -> list[str]:
    left = [name, *["-"] * 9]
    if "units" in ours:
        kinds = ", ".join(f"{n} {kind}" for kind, (n, _) in ours["kinds"].items() if n)
        refuted = f"OK, {len(ours['refuted'])} refuted" if ours["refuted"] else "OK"
        left = [
            name, ours["input"], kinds, str(sum(n for _, n in ours["kinds"].values())), f"{ours['params']:,}",
            f"{ours['params_after']:,}", refuted if passed(ours) else "wrong", f"{ours['error']:.0e}",
            f"{ours['gradient_error']:.0e}", f"{ours['trace_seconds']:.1f}",
        ]  # fmt: skip
    elif ours:
        left = [name, *["-"] * 5, ours["verdict"][:80], *["-"] * 3]
    error = f"{peer['error']:.0e}" if "error" in peer else "-"
    return [*left, peer.get("verdict", "-")[:60], error, f"{peer['seconds']:.1f}" if "seconds" in peer else "-"]
