"""The page on training a pruned language model for a few hundred steps."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.records import Record
from benchmarks.llm.training import RANK, RECOVERIES

DENSE = "dense"

HEAD = """# A pruned language model trained for a few minutes

SmolLM2-135M-Instruct is pruned as on [this page](llm.md), and then trained on the training text of the Penn Treebank,
one window of 256 tokens a step.

- Measure: `python -m benchmarks llm-recovery` (one thread; a run that has a line is not repeated).
- Results: `benchmarks/results/llm-recovery.jsonl`.

"""

EDGE = "; the best one is at the edge of those tried"

TERMS = """## Terms

- The text of the Penn Treebank is in lower case, with `<unk>` and `N`. So training lowers the perplexity of the dense
  model, too: compare with the row `dense` of the same steps. SST-2 is the text that nobody trained on.
- *Before*: without training.
- The learning rate of each way is the one of those below with the least perplexity on the validation text after 40
  steps. The test texts were read at the end of each run.
- AdamW without weight decay, warm-up of a tenth of the steps, then a cosine to zero; gradients clipped to norm 1.
- *Precision*: `bf16` is autocast. A processor that would only emulate it trains in `fp32`. Minutes of rows of different
  precision cannot be compared.

"""


def page(records: Sequence[Record]) -> str:
    """The page, from all lines."""
    rows = [one for one in records if "how" in one["config"]]
    if not rows:
        return HEAD + "No runs yet.\n"
    text = HEAD
    for share in sorted({one["config"]["share"] for one in rows}, reverse=True):
        some = [one for one in rows if one["config"]["share"] == share]
        text += f"## {share:.0%} of the parameters\n\n{_findings(some)}\n{_table(some)}\n"
    return text + TERMS + _ways(records)


def _findings(rows: Sequence[Record]) -> str:
    lines = []
    for steps in sorted({one["config"]["steps"] for one in rows}):
        some = [one for one in rows if one["config"]["steps"] == steps]
        control = next((one for one in some if _is_control(one)), None)
        what = "divided by that of the dense model trained alike" if control is not None else "in perplexity"
        shown = {text: _best_first(some, control, text) for text in ("ptb", "sst2")}
        lines.append(f"- After {steps} steps on the Penn Treebank, {what}, best first: {shown['ptb']}.")
        lines.append(f"- The same on SST-2, which nobody trained on: {shown['sst2']}.")
    return "\n".join(lines) + "\n"


def _best_first(rows: Sequence[Record], control: Record | None, text: str) -> str:
    pruned = sorted((one for one in rows if not _is_control(one)), key=lambda one: one["perplexity"][text])
    return ", ".join(f"`{_name(one)}` {_against(one, control, text)}" for one in pruned)


def _is_control(row: Record) -> bool:
    return bool(row["config"]["method"] == DENSE and not RECOVERIES[row["config"]["how"]].sparse)


def _name(row: Record) -> str:
    method, how = row["config"]["method"], row["config"]["how"]
    return how if RECOVERIES[how].sparse else f"{method}, {how}"


def _against(row: Record, control: Record | None, text: str) -> str:
    value = row["perplexity"][text]
    return f"{value:.1f}" if control is None else f"{value / control['perplexity'][text]:.2f}"


def _table(rows: Sequence[Record]) -> str:
    head = (
        "| model and training | steps | rate | Penn Treebank, before | after | SST-2, before | after | precision "
        "| minutes |\n"
        "|---|---:|---:|---:|---:|---:|---:|---|---:|\n"
    )
    for one in rows:
        before, after = one["before"] or {}, one["perplexity"]
        cells = [f"{found[text]:.1f}" if text in found else "" for text in ("ptb", "sst2") for found in (before, after)]
        head += (
            f"| `{_name(one)}` | {one['config']['steps']} | {one['rate']:g} | {' | '.join(cells)} | "
            f"{one.get('precision', 'bf16')} | "
            f"{one['seconds'] / 60:.0f} |\n"
        )
    return head


def _ways(records: Sequence[Record]) -> str:
    text = "| training | what | rates and their perplexity on the validation text |\n|---|---|---|\n"
    for name, recovery in RECOVERIES.items():
        tuned = [one for one in records if one["config"].get("tuned") == name]
        if tuned:
            found = ", ".join(f"{one['config']['rate']:g}: {one['valid']:.1f}" for one in tuned)
            best = min(tuned, key=lambda one: one["valid"])["config"]["rate"]
            at_edge = best in (min(recovery.rates), max(recovery.rates))
            text += f"| `{name}` | {recovery.source} | {found}{EDGE if at_edge else ''} |\n"
    return text + f"\nAdapters of LoRA have rank {RANK}, at all linear layers of the blocks.\n"
