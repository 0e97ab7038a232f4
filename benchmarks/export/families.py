"""Which families of transformers load what was exported: neurons, heads, stream and depth, by the stock class.

``python -m benchmarks families`` builds each class with a small configuration, removes half of the units of a kind
where the class can say so, or the last layer that can go, exports, loads with ``from_pretrained``, and compares all
outputs. Every class is a few seconds; the page is written at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import nn

import etp_graph as etp
from benchmarks.common.machine import machine_conditions
from benchmarks.common.markdown import as_row
from benchmarks.common.records import PAGES
from benchmarks.models import huggingface as registry
from etp_graph.model import run_model
from etp_graph.plan import Group

RESULTS = Path("benchmarks/results/families.json")

KINDS = ("neurons", "heads", "stream", "depth")

EQUAL = "equal"

DIFFERS = "differs by"
"""Begins the outcome that must not be: the class loads the folder and computes something else."""

TOLERANCE = 1e-5
"""Of the largest difference of an output over the largest value of it."""

_CAUSAL = registry.DECODERS["llama_gqa"][1]
_MORE: dict[str, registry.Row] = {
    "olmo2_wide": ("Olmo2ForCausalLM", {**_CAUSAL, "num_key_value_heads": 4}, registry.DECODERS["llama"][2]),
    "granite": ("GraniteForCausalLM", {**_CAUSAL, "embedding_multiplier": 3.0}, registry.DECODERS["llama"][2]),
    "smollm3": ("SmolLM3ForCausalLM", {**_CAUSAL, "no_rope_layers": [1, 0]}, registry.DECODERS["llama"][2]),
}

ROWS: Mapping[str, registry.Row] = {
    **registry.ENCODERS, **registry.DECODERS, **registry.SEQUENCES, **registry.IMAGES, **_MORE
}  # fmt: skip

FAMILIES: Mapping[str, Mapping[str, str]] = {
    "Decoders": {
        "llama_gqa": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "gemma": "Gemma",
        "gemma2": "Gemma 2", "gemma3": "Gemma 3", "phi": "Phi", "phi3": "Phi-3", "gpt2": "GPT-2",
        "gpt_neox": "GPT-NeoX", "gptj": "GPT-J", "opt": "OPT", "olmo2_wide": "OLMo 2", "granite": "Granite",
        "smollm3": "SmolLM3", "mixtral": "Mixtral", "qwen3_moe": "Qwen3-MoE", "stablelm": "StableLM",
        "starcoder2": "StarCoder2", "glm": "GLM", "bloom": "BLOOM", "falcon_grouped": "Falcon",
    },
    "Encoders and decoders": {
        "t5": "T5", "t5_gated": "T5, gated, untied", "bart": "BART", "marian": "Marian", "pegasus": "Pegasus",
        "whisper": "Whisper",
    },
    "Encoders": {
        "bert": "BERT", "roberta": "RoBERTa", "distilbert": "DistilBERT", "modernbert": "ModernBERT",
        "electra": "ELECTRA", "vit": "ViT", "dinov2": "DINOv2", "clip": "CLIP", "siglip": "SigLIP",
    },
}  # fmt: skip
"""Names of rows and what a reader calls them."""


def build(name: str) -> tuple[nn.Module, Any]:
    """A model of a row with random weights, in eval mode, and example inputs."""
    cls, config, inputs = ROWS[name]
    torch.manual_seed(0)
    return registry.from_config(cls, config)().eval(), inputs()


def halve(group: Group) -> torch.Tensor:
    """At most half of the units stay, drawn at random, equally many in each block."""
    width, step = group.n_units // group.blocks, math.lcm(group.multiple, group.blocks)
    kept = max(group.n_units // 2 // step * step, step) // group.blocks
    generator = torch.Generator().manual_seed(group.n_units)
    rows = torch.stack([torch.randperm(width, generator=generator) < kept for _ in range(group.blocks)])
    return rows.flatten()


def outcome(name: str, kind: str, folder: Path) -> str:
    """Prune half of the units of a kind where the class can say so; ``equal``, or the reason why it cannot be.

    Args:
        name: of a row.
        kind: one of ``KINDS``.
        folder: a folder that does not exist.
    """
    model, inputs = build(name)
    if kind == "depth":
        refused = shorten(model, inputs)
        return refused or exported(name, model, inputs, folder)
    try:
        plan = etp.trace(model, inputs, prune=[kind])
    except etp.PlanError as error:
        return str(error)
    free = etp.export.restrict_plan(model, plan)
    if not free.prunable:
        return "; ".join(sorted({group.locked or "" for group in free.groups if group.kind == kind}))
    etp.prune_(model, free, etp.Selection({group.name: halve(group) for group in free.prunable}))
    return exported(name, model, inputs, folder)


def shorten(model: nn.Module, inputs: Any) -> str:
    """Remove the last block of each container that can go; the reason if none can."""
    last = {block.container: block for block in etp.depth.find_blocks(model, inputs)}
    if not last:
        return "no residual blocks were found"
    try:
        etp.depth.remove_blocks_(model, last.values(), inputs)
    except etp.EtpError as error:
        return str(error)
    return ""


def exported(name: str, model: nn.Module, inputs: Any, folder: Path) -> str:
    """Export a pruned model and load it with its class; ``equal``, how it differs, or the reason of a refusal."""
    try:
        etp.export.huggingface(model, folder)
    except etp.ExportError as error:
        return str(error)
    again = getattr(transformers, ROWS[name][0]).from_pretrained(folder).eval()
    if again.num_parameters() >= build(name)[0].num_parameters():
        return f"{DIFFERS} nothing: nothing was removed"
    with torch.no_grad():
        ours, stock = _tensors(run_model(model, inputs)), _tensors(run_model(again, inputs))
    if [one.shape for one in ours] != [one.shape for one in stock]:
        return f"{DIFFERS} shapes"
    error = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in zip(stock, ours, strict=True))
    return EQUAL if error <= TOLERANCE else f"{DIFFERS} {error:.1e}"


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [value.float() for value in outputs.to_tuple() if isinstance(value, torch.Tensor)]


_HEAD = """# Families that load what was exported

This record asks, for each class of transformers, whether its own `from_pretrained` loads a pruned model, without this
library. Each class has a small configuration and random weights. For *neurons*, *heads* and *stream* (the hidden size)
half of the units go, for *depth* the last layer of each list of layers. [The
guide](../export.md#what-each-class-can-say) has the code.

- Measure: `python -m benchmarks families` (some minutes).
- Results: `benchmarks/results/families.json`.
- Write the page again without measuring: `python -m benchmarks families --page`.
- Machine and versions: {made}.

## Findings

{findings}

## Families

*Equal*: the folder loads, and all outputs are those of the pruned model in this process, to {tolerance:.0e}. A number
is a reason below, which the library gives before anything is written.

"""


def page(body: Mapping[str, Any]) -> str:
    """The page, a pure function of the results."""
    found: Mapping[str, Mapping[str, str]] = body["families"]
    numbers: dict[str, int] = {}

    def cell(outcome: str) -> str:
        if outcome == EQUAL or outcome.startswith(DIFFERS):
            return outcome
        return str(numbers.setdefault(_short(outcome), len(numbers) + 1))

    lines: list[str] = []
    for title, names in FAMILIES.items():
        shown = {name: called for name, called in names.items() if name in found}
        if shown:
            lines += [f"### {title}", "", as_row(("family", "class", *KINDS)), "|---|---|" + "---|" * len(KINDS)]
            lines += [
                as_row((called, f"`{ROWS[name][0]}`", *(cell(found[name][kind]) for kind in KINDS)))
                for name, called in shown.items()
            ]
            lines.append("")
    lines += ["## Reasons", "", *(f"{number}. {reason}" for reason, number in numbers.items())]
    made = ", ".join(f"{key} {value}" for key, value in body["conditions"].items())
    head = _HEAD.format(made=made, findings="\n".join(_findings(found)), tolerance=TOLERANCE)
    return head + "\n".join(lines) + "\n"


def _findings(found: Mapping[str, Mapping[str, str]]) -> list[str]:
    outcomes = [(name, kind, text) for name, kinds in found.items() for kind, text in kinds.items()]
    equal = sum(text == EQUAL for *_, text in outcomes)
    wrong = [f"{name} ({kind})" for name, kind, text in outcomes if text.startswith(DIFFERS)]
    refused = len(outcomes) - equal - len(wrong)
    return [
        f"- {len(found)} families: of {len(outcomes)} cases {equal} load with equal outputs and {refused} are refused "
        "with a reason.",
        f"- Loads and differs: {', '.join(wrong) or 'none'}.",
    ]


def _short(reason: str) -> str:
    """The first sentences of a reason on one line, without what Markdown would read."""
    text = re.sub(r"\s+", " ", reason).strip()
    text = text.replace("<", "&lt;").replace("|", "/").replace("*", r"\*").replace("_", r"\_")
    return text if len(text) <= 300 else text[:297].rsplit(" ", 1)[0] + " ..."


def measure(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """The outcome of each kind for each row."""
    found: dict[str, dict[str, str]] = {}
    with TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()
        for name in names:
            found[name] = {kind: outcome(name, kind, Path(place) / f"{name}-{kind}") for kind in KINDS}
            sys.stderr.write(f"{name}: {', '.join(text[:40] for text in found[name].values())}\n")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    names = [name for group in FAMILIES.values() for name in group]
    parser = argparse.ArgumentParser(prog="python -m benchmarks families", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="*", default=names, choices=names, metavar="NAME", help="default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--out", type=Path, default=PAGES / "families.md", help="the page")
    parser.add_argument("--page", action="store_true", help="write the page from the results, without measuring")
    options = parser.parse_args(arguments)
    if not options.page:
        torch.set_num_threads(1)
        body = {"families": measure(options.families), "conditions": machine_conditions()}
        options.results.write_text(json.dumps(body, indent=1) + "\n", encoding="utf8")
    text = page(json.loads(options.results.read_text(encoding="utf8")))
    options.out.write_text(text, encoding="utf8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
