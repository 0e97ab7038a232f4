"""Write ``docs/results/coverage.md`` and ``coverage-models.md`` from what :mod:`benchmarks.coverage.run` found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import registry

Found = dict[str, Any]

_HEAD = """# Coverage

This record checks the plan of {listed} models: whether the pruned model computes the same as the masked model, in which
the same units are zero. A wrong plan can change the outputs of a network without an error message.
[The second page](coverage-models.md) has one row for each model.

- Measure: `python -m benchmarks coverage`. `--families` and `--models` choose models; `--resume` adds to the results.
  The whole registry takes hours on two cores.
- Results: `benchmarks/results/coverage.json`, {minutes:.0f} minutes with {jobs} measurements at a time.
- Write the pages again without measuring: `python -m benchmarks report`.
- Machine and versions: {made}.

## Findings

{findings}

## Limits

{limits}

## Families

{families}

## Method

Every model is the real class of its library with random weights. It is traced without hints, for all kinds of units
(`prune="all"`). Weights, biases, norms and running statistics are replaced by random values. On average 30 % and then
70 % of the units of every prunable group are removed at random; each group has its own share. The outputs of the pruned
model are compared with those of the masked model (`etp_graph.verify`, float64; float32 where an operator does not
support float64). Gradients of all parameters are compared in the same way, on smaller inputs where images are large. An
error is the largest difference divided by the largest value. Errors up to 1e-6 pass (1e-4 in float32).

*Torch-Pruning* is the same test of `torch_pruning.DependencyGraph` alone, in the same run. It gets no hints, except
that the output layers stay whole. It finds its own groups, and its own surgery removes 30 % of the channels of every
group, in at most {limit:.0f} s. Its error is that of the outputs in eval mode.
"""

_MODELS = """# Coverage, model by model

This page lists every model of [the record on coverage](coverage.md), which says how the figures were measured.

- *Units*: number of prunable groups of each kind.
- *Locked*: number of groups that cannot lose units, those that feed the output included.
- *Parameters* and *after*: of the model, and of the model without 30 % of the units of the kinds that are pruned by
  default.
- *OK*: the plan was right as traced. *OK, n refuted*: `trace` was wrong about n groups, and its check (on by default)
  locks them; the rest of the plan passes.
- Seconds: those of `trace`, and those of Torch-Pruning's build, groups and surgery (of the whole process, where it
  raised).

"""
_COLUMNS = ("model", "input", "units", "locked", "parameters", "after", "verdict", "error", "gradients", "trace, s",
            "Torch-Pruning", "error", "s")  # fmt: skip


def write_page(body: Found, path: Path) -> None:
    """Write the summary to ``path``, and the tables of all models to ``NAME-models.md`` beside it."""
    found: Found = body["measurements"]
    families: dict[str, list[str]] = {}
    for name, entry in registry().items():
        if f"{name}/ours" in found or f"{name}/torch_pruning" in found:
            families.setdefault(entry.family, []).append(name)
    names = [name for own in families.values() for name in own]
    text = _HEAD.format(
        listed=len(names), minutes=body["seconds"] / 60, jobs=body["jobs"], limit=body["limit_seconds"],
        made=", ".join(f"{key} {value}" for key, value in body["conditions"].items()),
        findings="\n".join(_findings(found, names)), limits="\n".join(_limits(found, names)),
        families="\n".join(_sums(found, families)),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf8")
    parts = [f"## {family}\n\n" + "\n".join(_table(found, own)) + "\n" for family, own in families.items()]
    path.with_name(f"{path.stem}-models.md").write_text(_MODELS + "\n".join(parts), encoding="utf8")


def _findings(found: Found, names: Sequence[str]) -> list[str]:
    """Sentences that follow from the figures alone."""
    own = [found[f"{name}/ours"] for name in names if f"{name}/ours" in found]
    done = [one for one in own if passed(one)]
    refuted = [one for one in done if one["refuted"]]
    lines = [f"- {len(done)} of {len(own)} models pass."]
    if done:
        worst = max(one["error"] for one in done if one["dtype"] == "float64")
        lines += [
            f"- {len(done) - len(refuted)} of them pass with the plan as traced. {len(refuted)} pass after the check "
            f"of `trace` locked {sum(len(one['refuted']) for one in refuted)} groups.",
            f"- The largest error of outputs in float64 is {worst:.0e} among the models that pass.",
            f"- `trace` without its check took at most {max(one['trace_seconds'] for one in done):.1f} s.",
        ]
    peers = [found[f"{name}/torch_pruning"] for name in names if f"{name}/torch_pruning" in found]
    if peers:
        said = Counter(_sort(peer) for peer in peers)
        rest = ", ".join(f"{sort} on {n}" for sort, n in said.most_common() if sort != "OK")
        lines.append(f"- Plain Torch-Pruning passes on {said['OK']} of {len(peers)} models; {rest or 'none fails'}.")
    return lines


def _sort(peer: Mapping[str, Any]) -> str:
    """The verdict on Torch-Pruning without what the exception says."""
    verdict = str(peer["verdict"])
    return "an exception" if verdict.startswith("exception") else verdict


def _limits(found: Found, names: Sequence[str]) -> list[str]:
    failed = [name for name in names if f"{name}/ours" in found and not passed(found[f"{name}/ours"])]
    lines = [f"- {len(names)} of the registry's {len(registry())} models were measured. The others were not checked."]
    if failed:
        lines.append(f"- These models do not pass: {', '.join(f'`{name}`' for name in failed)}.")
    return [
        *lines,
        "- Weights are random. The record is about plans and surgery, not about accuracy.",
        "- Torch-Pruning got no hints for single models. The record says nothing about Torch-Pruning with hints.",
    ]


def _sums(found: Found, families: Mapping[str, Sequence[str]]) -> list[str]:
    lines = ["| family | models | pass here | pass with plain Torch-Pruning |", "| --- | ---: | ---: | ---: |"]
    for family, names in families.items():
        ours = sum(passed(found.get(f"{name}/ours", {})) for name in names)
        theirs = sum(found.get(f"{name}/torch_pruning", {}).get("verdict") == "OK" for name in names)
        lines.append(f"| [{family}](coverage-models.md#{family}) | {len(names)} | {ours} | {theirs} |")
    return lines


def _table(found: Found, names: Sequence[str]) -> list[str]:
    rows = [_row(name, found.get(f"{name}/ours", {}), found.get(f"{name}/torch_pruning", {})) for name in names]
    marks = ["---"] * 3 + ["---:"] * 3 + ["---"] + ["---:"] * 3 + ["---", "---:", "---:"]
    return [_line(_COLUMNS), _line(marks), *map(_line, rows)]


def passed(ours: Mapping[str, Any]) -> bool:
    """Whether every group that the plan would prune is proven."""
    limit = 1e-6 if ours.get("dtype") == "float64" else 1e-4
    return bool(max(ours.get("error", 1.0), ours.get("gradient_error") or 0.0) <= limit)


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def _row(name: str, ours: Found, peer: Found) -> list[str]:
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
