"""The page on pruning a language model without training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import mean

from benchmarks.common.records import Record
from benchmarks.llm.methods import METHODS

DENSE = "dense"

SHARES = (0.8, 0.9, 0.7, 0.5)
"""Shares of the parameters that stay, embeddings not counted; the one with published anchors first."""

HEAD = """# A language model pruned without training

SmolLM2-135M-Instruct (30 layers, weights of 4 bits read as float32) loses heads, neurons or whole layers until a share
of its parameters stays. Embeddings are not counted, and only `torch-pruning` prunes their width. No method trains.

- Measure: `python -m benchmarks llm` (one thread; a run that has a line is not repeated).
- Results: `benchmarks/results/llm.jsonl`.

"""

LIMITS = """## Limits

- A layer has three groups of heads, so it loses a third of them or none. Methods that take the same share of every
  group remove one group of each layer at 80 %. A large part of their loss may come from this. The rows *neurons*
  keep all heads.
- The command has not run everything that it would: {missing}.
- The texts are short, so that one run takes minutes on one core. Perplexities of other windows are not comparable.

"""

TERMS = """## Terms

- *Perplexity*: exp of the mean cross-entropy of a token given those before it in a window of 256 tokens, {ptb:,} tokens
  of the test text of the Penn Treebank, and {sst2:,} tokens of the sentences of SST-2's validation part. The Penn
  Treebank is read as it is, in lower case with `<unk>` and `N`, so that even the dense model has a high perplexity.
- *Calibration*: {calibration:,} tokens from random places of the training text of the Penn Treebank. Units are a group
  of three query heads with its key and value head, and a neuron.
- Choices (criterion, ridge) were made on the validation text of the Penn Treebank. The test text was read for this
  table.
- `+weights`: the layers that read removed units get new weights by least squares.
  `flap`: the mean of what is lost goes into new biases, as in the paper.
- [Memory](llm-streamed.md) and [tokens per second](serving.md) are on other pages.

| method | criterion | units are compared | source |
|---|---|---|---|
"""


_SCOPES = {"local": "within their group", "global": "across groups"}


def page(records: Sequence[Record]) -> str:
    """The page, from all lines."""
    dense = next((one for one in records if one["config"]["method"] == DENSE), None)
    rows = [one for one in records if one["config"]["method"] != DENSE]
    if dense is None or not rows:
        return HEAD + "No runs yet.\n"
    shares = sorted({one["config"]["share"] for one in rows}, reverse=True)
    body = HEAD + _summary(rows, dense, shares)
    for text, title in (("ptb", "Penn Treebank"), ("sst2", "SST-2")):
        body += f"## Perplexity on {title}, divided by that of the dense model\n\n{_table(rows, dense, shares, text)}\n"
    return body + LIMITS.format(missing=_missing(rows, shares)) + _terms(rows)


def _missing(rows: Sequence[Record], shares: Sequence[float]) -> str:
    """What the command would still run, so that nobody takes the table for the whole comparison."""
    there = {(one["config"]["method"], one["config"]["share"]) for one in rows}
    names = [f"`{name}`" for name in METHODS if any((name, share) not in there for share in shares)]
    others = [f"{share:.0%}" for share in SHARES if share not in shares]
    return f"methods {', '.join(names) or 'none'}; shares {', '.join(others) or 'none'}"


def _ratios(rows: Sequence[Record], dense: Record, method: str, share: float, text: str) -> list[float]:
    return [
        one["perplexity"][text] / dense["perplexity"][text]
        for one in rows
        if one["config"]["method"] == method and one["config"]["share"] == share
    ]


def _summary(rows: Sequence[Record], dense: Record, shares: Sequence[float]) -> str:
    seeds = sorted({one["config"]["seed"] for one in rows})
    lines = [f"- The dense model has {dense['perplexity']['ptb']:.1f} on the Penn Treebank and "
             f"{dense['perplexity']['sst2']:.1f} on SST-2."]  # fmt: skip
    for share in shares:
        found = {name: _ratios(rows, dense, name, share, "ptb") for name in METHODS}
        means = {name: mean(values) for name, values in found.items() if values}
        order = sorted(means, key=means.__getitem__)
        shown = ", ".join(f"`{name}` {means[name]:.2f}" for name in order)
        lines.append(f"- At {share:.0%} of the parameters, best first: {shown}.")
    lines.append(f"- Seeds of the calibration text: {', '.join(map(str, seeds))}; {_n_seeds(rows)}.")
    return "## Findings\n\n" + "\n".join(lines) + "\n\n"


def _n_seeds(rows: Sequence[Record]) -> str:
    """How many of the seeds a field has: a series that is under way has more of some methods than of others."""
    numbers = Counter((one["config"]["method"], one["config"]["share"]) for one in rows).values()
    least, most = min(numbers), max(numbers)
    return f"each field has {least}" if least == most else f"a field has {least} to {most} of them"


def _table(rows: Sequence[Record], dense: Record, shares: Sequence[float], text: str) -> str:
    head = "| method | " + " | ".join(f"{share:.0%}" for share in shares) + " |\n"
    head += "|---|" + "---:|" * len(shares) + "\n"
    for name in METHODS:
        cells = []
        for share in shares:
            found = _ratios(rows, dense, name, share, text)
            spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
            cells.append(f"{mean(found):.2f}{spread}" if found else "")
        if any(cells):
            head += f"| `{name}` | " + " | ".join(cells) + " |\n"
    return head


def _terms(rows: Sequence[Record]) -> str:
    text = TERMS.format(**rows[0]["tokens"])
    for name, method in METHODS.items():
        if any(one["config"]["method"] == name for one in rows):
            scope = "whole layers" if method.depth == "alone" else _SCOPES[method.scope]
            text += f"| `{name}` | `{method.criterion}` | {scope} | {method.source} |\n"
    return text
