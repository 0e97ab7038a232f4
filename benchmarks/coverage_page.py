"""The page ``docs/coverage.md`` from the measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_HEAD = """# Coverage

Made by `python -m benchmarks.coverage`; the numbers are in `benchmarks/results/coverage.json`.
(`regnet_y_128gf` needs 20 GB and is left out unless named: `--models regnet_y_128gf --jobs 1 --resume`.)

Every model is traced without hints, its weights, biases, norms and running statistics are replaced by random values,
on average 30 % of the units of every group are removed at random (each group has its own share), and the outputs of the
pruned model are compared with those of the masked model, in which the same units are zero (`etp_graph.verify`, float64,
one image of the size in the table).
*Gradients* are those of all parameters, compared in the same way; where two sizes are given, on images of the second.
An error is the largest difference over the largest value; up to 1e-6 passes. Locked groups feed the model's output.

*Torch-Pruning* is the same test of `torch_pruning.DependencyGraph` alone, in the same run: no hints except that the
output layers stay whole, its own groups, 30 % of the channels of every group removed by its own surgery, at most
{limit:.0f} s. Its error is that of the outputs in eval mode. The seconds are those of `trace`, and those of
Torch-Pruning's build, groups and surgery (of the whole process, where it raised); {jobs} measurements ran at a time.

"""
_COLUMNS = (
    "model", "pixels", "groups", "units", "locked", "parameters", "after", "trace, s", "error", "gradients",
    "Torch-Pruning", "error", "s",
)  # fmt: skip


def write_page(body: dict[str, Any], path: Path) -> None:
    """Write the page: what was measured and how, the table, the sums."""
    found: dict[str, Any] = body["measurements"]
    names = list(dict.fromkeys(key.partition("/")[0] for key in sorted(found)))
    rows = [_row(name, found.get(f"{name}/ours", {}), found.get(f"{name}/torch_pruning", {})) for name in names]
    table = [_line(_COLUMNS), _line(["---"] + ["---:"] * 9 + ["---", "---:", "---:"]), *map(_line, rows)]
    ours = sum(found.get(f"{name}/ours", {}).get("error", 1.0) <= 1e-6 for name in names)
    theirs = sum(found.get(f"{name}/torch_pruning", {}).get("verdict") == "OK" for name in names)
    sums = f"\nOf {len(names)} models {ours} pass here and {theirs} with plain Torch-Pruning.\n"
    made = ", ".join(f"{key} {value}" for key, value in body["conditions"].items())
    path.parent.mkdir(parents=True, exist_ok=True)
    head = _HEAD.format(limit=body["limit_seconds"], jobs=body["jobs"])
    end = f"\nThe run took {body['seconds'] / 60:.0f} minutes: {made}.\n"
    path.write_text(head + "\n".join(table) + "\n" + sums + end)


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def _row(name: str, ours: dict[str, Any], peer: dict[str, Any]) -> list[str]:
    left = [name, *["-"] * 9]
    if "units" in ours:
        size, small = ours["size"], ours["small"]
        left = [
            name, f"{size}" if size == small else f"{size}, {small}", str(ours["groups"]), f"{ours['units']:,}",
            str(ours["locked"]), f"{ours['params']:,}", f"{ours['params_after']:,}", f"{ours['trace_seconds']:.1f}",
            f"{ours['error']:.0e}", f"{ours['gradient_error']:.0e}",
        ]  # fmt: skip
    elif ours:
        left = [name, *["-"] * 7, ours["verdict"][:60], "-"]
    error = f"{peer['error']:.0e}" if "error" in peer else "-"
    return [*left, peer.get("verdict", "-")[:60], error, f"{peer['seconds']:.1f}" if "seconds" in peer else "-"]
