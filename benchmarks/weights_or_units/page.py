"""Write the page of :mod:`benchmarks.weights_or_units.run` from its lines alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from benchmarks.common.contestant_names import SMALL
from benchmarks.common.markdown import as_row
from benchmarks.common.records import Record
from benchmarks.common.statistics import Difference, Spread, paired
from benchmarks.tasks.base import concerns

SPARSE, UNITS, CONTROL = "large-sparse", "large-pruned-by-units", "dense"
ORDER = (CONTROL, SPARSE, UNITS, SMALL)
COLUMNS = ("zeros", "contestant", "test", "validation", "nonzero parameters", "of dense", "p50 latency", "seeds")

_HEAD = """# Single weights or whole units

This record compares three ways to a network with few nonzero parameters: masks on single weights, removal of whole
units, and a narrow network from the beginning. It repeats the comparison of Zhu & Gupta 2017 (*To prune, or not to
prune*) and adds the units. The network: {title}.

- Measure: `{command}`.
- Results: `benchmarks/results/runs/gradual.jsonl`.
- Write the page again without measuring: the same command. It repeats no run that has a line.

## Findings

{seen}

## Limits

{limits}

## Figures

Test and validation: {metric} ({better}), mean ± standard deviation over the seeds. *Of dense*: share of the dense
network's parameters. *P50 latency*: time of the dense network divided by that of this one, median over the seeds and
range.

{table}

## Contestants

- *{SPARSE}*: `torch.nn.utils.prune` masks the smallest weights of every matrix, including the embedding and the
  decoder, along a cubic schedule. Biases stay. The zeros are written into the weights in the end.
- *{UNITS}*: `etp.prune_` removes the units with the smallest weights, the same share of every group, at the
  same steps, down to the same number of parameters (`Budget(params=...)`).
- *{SMALL}*: narrow from the beginning, with fresh weights.
- *{CONTROL}*: the checkpoint with the same extra training, unpruned.

## How it was run

{conditions}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """All runs of one contestant at one sparsity."""

    method: str
    sparsity: float
    records: tuple[Record, ...]

    def metric(self, part: str) -> Spread | None:
        """The metric of the finished networks on a part."""
        return Spread.of([record[part]["final"] for record in self.records])

    def by_seed(self) -> dict[int, float]:
        """The metric on the test part."""
        return {record["config"]["seed"]: record["test"]["final"] for record in self.records}

    @property
    def mean(self) -> float:
        """Of the metric on the test part."""
        return fmean(self.by_seed().values())

    @property
    def nonzero(self) -> float:
        """Nonzero parameters, the mean over the seeds."""
        return fmean(record["nonzero"][1] for record in self.records)

    @property
    def faster(self) -> float:
        """The dense network's time over this one's, the median over the seeds: other work slows single runs."""
        return median(self.ratios)

    @property
    def ratios(self) -> list[float]:
        """The dense network's time over this one's, of each run."""
        return [dense / own for dense, own in (record["latency"] for record in self.records)]


def entries(records: Iterable[Record]) -> list[Entry]:
    """The finished runs by sparsity and contestant."""
    grouped: dict[tuple[float, str], list[Record]] = {}
    for record in records:
        if record["status"] == "ok":
            config = record["config"]
            grouped.setdefault((config["sparsity"], config["method"]), []).append(record)
    ordered = sorted(grouped.items(), key=lambda item: (item[0][0], ORDER.index(item[0][1])))
    return [Entry(method=method, sparsity=sparsity, records=tuple(own)) for (sparsity, method), own in ordered]


def page(records: Sequence[Record]) -> str:
    """The page, a pure function of the records (of one scale)."""
    found, first = entries(records), records[0]
    metric = first["metric"]
    return _HEAD.format(
        title=first["title"], SPARSE=SPARSE, UNITS=UNITS, SMALL=SMALL, CONTROL=CONTROL, command=_command(records),
        metric=metric["name"], better="more is better" if metric["higher"] else "less is better",
        seen="\n".join(_seen(found, metric)), limits="\n".join(_limits(found)), table="\n".join(_table(found)),
        conditions="\n".join(_conditions(records)),
    )  # fmt: skip


def _table(found: Sequence[Entry]) -> list[str]:
    lines = [as_row(COLUMNS), "| ---: | --- |" + " ---: |" * (len(COLUMNS) - 2)]
    first = next((record for entry in found for record in entry.records if entry.method != SMALL), None)
    if first is not None:
        start = [f"{first[part]['checkpoint']:.2f}" for part in ("test", "val")]
        lines.append(as_row(("-", "checkpoint", *start, f"{first['nonzero'][0]:,}", "100.0 %", "1.00x", "-")))
    for entry in found:
        zeros = "-" if entry.method == CONTROL else f"{entry.sparsity:.0%}".replace("%", " %")
        share = 100 * entry.nonzero / entry.records[0]["nonzero"][0]
        values = [spread.text() for part in ("test", "val") if (spread := entry.metric(part)) is not None]
        lines.append(as_row((
            zeros, entry.method, *values, f"{entry.nonzero:,.0f}", f"{share:.1f} %",
            f"{entry.faster:.2f}x ({min(entry.ratios):.2f} to {max(entry.ratios):.2f})",
            str(len(entry.records)),
        )))  # fmt: skip
    return lines


def _seen(found: Sequence[Entry], metric: Mapping[str, Any]) -> list[str]:
    """Sentences that follow from the figures alone."""
    lines = []
    for sparsity in sorted({entry.sparsity for entry in found if entry.method != CONTROL}):
        own = [entry for entry in found if entry.sparsity == sparsity]
        ranked = sorted(own, key=lambda entry: entry.mean, reverse=metric["higher"])
        best, rest = ranked[0], ranked[1:]
        against = "; ".join(f"{other.method} {_against(other, best, metric)}" for other in rest)
        lines.append(
            f"- At {100 * sparsity:g} % zeros **{best.method}** has the best mean"
            + (f". Against it: {against}." if rest else ", alone.")
        )
    return [*lines, *_pair(found, metric), *_latency(found)]


def _limits(found: Sequence[Entry]) -> list[str]:
    lines = [
        "- Only nonzero numbers are counted. A file of a sparse network also has to store their positions.",
        f"- The zeros of {SPARSE} are ordinary numbers in a forward, so they save no time.",
    ]
    ratios = [ratio for entry in found if entry.method == CONTROL for ratio in entry.ratios]
    if ratios:
        lines.append(
            f"- Other work on the machine disturbed the times. {CONTROL} is as large as the checkpoint and should have "
            f"1.00x; single runs have {min(ratios):.2f}x to {max(ratios):.2f}x."
        )
    return lines


def _pair(found: Sequence[Entry], metric: Mapping[str, Any]) -> list[str]:
    """What the paper found, large-sparse better than small-dense, and the same question for units."""
    lines = []
    for large, about in ((SPARSE, "The paper's finding"), (UNITS, "The same question for units")):
        verdicts = []
        for sparsity in sorted({entry.sparsity for entry in found if entry.method != CONTROL}):
            own = {entry.method: entry for entry in found if entry.sparsity == sparsity}
            if large in own and SMALL in own:
                verdicts.append(f"{_against(own[large], own[SMALL], metric)} at {100 * sparsity:g} %")
        if verdicts:
            lines.append(f"- {about}, {large} against {SMALL}: {'; '.join(verdicts)}.")
    return lines


def _latency(found: Sequence[Entry]) -> list[str]:
    said = []
    for method in (SPARSE, UNITS, SMALL):
        faster = [f"{entry.faster:.2f}x" for entry in found if entry.method == method]
        if faster:
            said.append(f"{method} {', '.join(faster)}")
    return [f"- Speed of a forward, dense over pruned, by rising sparsity: {'; '.join(said)}."] if said else []


def _against(own: Entry, other: Entry, metric: Mapping[str, Any]) -> str:
    """The paired difference on the test part and its verdict."""
    found: Difference | None = paired(own.by_seed(), other.by_seed(), higher=metric["higher"])
    if found is None:
        return f"{own.mean - other.mean:+.2f} (too few common seeds for a verdict)"
    return f"{found.text()} ({found.mark})"


def _conditions(records: Sequence[Record]) -> list[str]:
    recipe = records[0]["recipe"]
    rising, after = recipe["sparse_steps"], recipe["finetune_steps"]
    lines = [
        f"- `{_command(records)}`, {sum(record['seconds'] for record in records) / 60:.0f} minutes in all by the "
        "clock.",
        f"- {SPARSE}, {UNITS} and {CONTROL}: from one checkpoint ({records[0]['checkpoint']}; {recipe['dense_steps']} "
        f"steps), {rising} steps while the schedule rises to the end and {after} after that, of {recipe['batch_size']} "
        f"examples in the same order, {recipe['optimizer']}. Weights are masked, or units removed, every "
        f"{records[0]['every']} steps.",
        f"- {SMALL}: {recipe['dense_steps'] + rising + after} steps, as many as the others with their checkpoint, in "
        "one phase. The width is the largest that has at most as many parameters.",
        *_rates(records),
        f"- Schedule: {_schedule(records[0]['schedule'])}. It is the share of the way to the sparsity.",
        "- Nothing else was chosen: the last step counts, and the test part is read once for each finished network. "
        "Seeds vary the order of the data, dropout and fresh weights, not the checkpoint.",
        "- *Better* and *worse*: the 95 % interval of the difference (in brackets), by Student's t over the common "
        "seeds, is on one side of zero.",
        "- Latency is the median over forwards of the dense network and the other one in turns.",
    ]  # fmt: skip
    lines += sorted({
        f"- {record['config']['method']} at {record['config']['sparsity']:g}: {record['status']}. {record['reason']}"
        for record in records if record["status"] != "ok"
    })  # fmt: skip
    same = concerns(recipe, CONTROL)  # no contestant takes the steps of the main comparison's narrow network
    if any(concerns(record["recipe"], CONTROL) != same for record in records):
        lines.append("- **The records come from more than one recipe**; the steps above are those of the first.")
    for name in records[0]["conditions"]:
        lines.append(f"- {name}: {', '.join(dict.fromkeys(record['conditions'].get(name, '-') for record in records))}")
    return [*lines, f"- commit: {', '.join(dict.fromkeys(record['commit'] for record in records))}"]


def _rates(records: Sequence[Record]) -> list[str]:
    """The learning rates that were tried, and which was best where."""
    metric, finished = records[0]["metric"], [record for record in records if record["status"] == "ok"]
    lines = [
        f"- Learning rates are chosen on the validation part ({metric['name']}). In bold the best; starred where it is "
        f"the first or last of those tried. {SMALL} is tried with half of its steps and a seed of its own."
    ]
    large = next((record for record in finished if record["config"]["method"] != SMALL), None)
    if large is not None:
        rates = " and ".join(f"{rate:g}" for rate in large["rates"][1:])
        lines.append(f"  - checkpoint: {_tried(large, metric)}. The two phases after it, in proportion: {rates}.")
    small = {r["config"]["sparsity"]: r for r in finished if r["config"]["method"] == SMALL}
    return [
        *lines,
        *(f"  - {SMALL}, {100 * at:g} %: {_tried(record, metric)}." for at, record in sorted(small.items())),
    ]


def _tried(record: Record, metric: Mapping[str, Any]) -> str:
    trials = record["trials"]
    done = [trial["val"] for trial in trials if trial["val"] is not None]
    best, said = (max if metric["higher"] else min)(done), []
    for trial in trials:
        text = f"{trial['rate']:g} ({'diverged' if trial['val'] is None else format(trial['val'], '.1f')})"
        edge = "\\*" if trial in (trials[0], trials[-1]) and len(trials) > 1 else ""
        said.append(f"**{text}**{edge}" if trial["val"] == best else text)
    return ", ".join(said)


def _command(records: Sequence[Record]) -> str:
    configs = [record["config"] for record in records]
    sparsities = sorted({c["sparsity"] for c in configs if c["method"] != CONTROL})
    seeds = sorted({c["seed"] for c in configs})
    return (
        f"python -m benchmarks weights-or-units --sparsities {' '.join(f'{s:g}' for s in sparsities)} "
        f"--seeds {' '.join(map(str, seeds))} --scale {configs[0]['scale']}"
    )


def _schedule(written: Mapping[str, Any]) -> str:
    """Name and fields, as the record has them."""
    return f"{written['name']}, " + ", ".join(f"{key} {value:g}" for key, value in written.items() if key != "name")
