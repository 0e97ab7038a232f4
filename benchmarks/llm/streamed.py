"""Prune a language model of a billion parameters in a folder, in less memory than it has on disk.

``python -m benchmarks llm-streamed`` writes a Llama with random bfloat16 weights as a folder, and prunes it with
``etp.oneshot`` in a process of its own, whose peak of memory it measures. Each run is one JSON line; a run that has a
line is not repeated.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

import etp_graph as etp
from benchmarks.common.machine import commit, machine_conditions
from benchmarks.common.processes import run_apart
from benchmarks.common.records import PAGES, append_record, read_records
from benchmarks.llm.streamed_page import page
from benchmarks.models.smollm2 import cache_folder

RESULTS = Path("benchmarks/results/llm-streamed.jsonl")

SIZES: dict[str, dict[str, int]] = {
    "1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64,
    },
}  # fmt: skip
"""Shapes: ``1b`` has those of TinyLlama-1.1B."""

LENGTH = 256
"""Tokens of a window."""

LIMIT = 4 * 3600.0


def make_folder(folder: Path, size: str) -> None:
    """Write a Llama with random weights, one file for each layer, unless it is there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shape: dict[str, Any] = {**SIZES[size]}
    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator, files = torch.Generator().manual_seed(0), dict[str, dict[str, torch.Size]]()
    for name, parameter in model.named_parameters():
        file = name.split(".")[2] if ".layers." in name else name
        files.setdefault(f"model-{file}.safetensors", {})[name] = parameter.shape
    for file, shapes in files.items():
        values = {name: _values(shape, generator) for name, shape in shapes.items()}
        save_file(values, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, shapes in files.items() for name in shapes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf8")
    config.save_pretrained(folder)


def _values(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    wide = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
    return wide.to(torch.bfloat16)


def peak_gib() -> float:
    """The largest memory that this process had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The record of one run, in this process."""
    imported, size = peak_gib(), SIZES[config["size"]]
    out = folder.with_name(f"{folder.name}-pruned")
    shutil.rmtree(out, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(size["vocab_size"], (config["windows"], LENGTH), generator=generator)
    begin = perf_counter()
    result = etp.oneshot(
        folder, list(tokens.split(1)), budget=config["share"], out=out, criterion=config["criterion"], progress=False
    )
    seconds = perf_counter() - begin
    peak = peak_gib()
    phases: dict[str, float] = {}
    for step, spent in result.seconds.items():
        phases[step.partition("-")[0]] = phases.get(step.partition("-")[0], 0.0) + spent
    (pruned,) = result.sizes
    n_bytes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (folder, pruned.folder)]
    shutil.rmtree(out)
    return {
        "config": config, "params": [result.dense.params, pruned.cost.params], "bytes": n_bytes, "shape": size,
        "tokens": tokens.numel(), "peak_gib": round(peak, 3), "imported_gib": round(imported, 3),
        "seconds": round(seconds, 1), "phases": {name: round(spent, 1) for name, spent in phases.items()},
        "conditions": machine_conditions(), "commit": commit(),
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks llm-streamed", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--size", choices=SIZES, default="1b", help="default 1b")
    parser.add_argument("--criteria", nargs="+", default=["fisher"], metavar="NAME", help="default fisher")
    parser.add_argument("--share", type=float, default=0.7, help="of the parameters that stay; default 0.7")
    parser.add_argument("--windows", type=int, default=4, help=f"of {LENGTH} tokens; default 4")
    parser.add_argument("--folder", type=Path, default=None, help="of the dense model; default: in the cache")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON lines")
    parser.add_argument("--out", type=Path, default=PAGES / "llm-streamed.md", help="the page")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; default 1")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


def run_one(words: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own does: write the dense model, or measure."""
    folder = Path(words["folder"])
    if "make" in words:
        make_folder(folder, words["make"])
        return {}
    return measure(words["config"], folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options: Any = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.one is not None:
        print(json.dumps(run_one(json.loads(options.one))))  # read by the process that started this one
        return
    console, have = Console(stderr=True), [record["config"] for record in read_records(options.results)]
    folder = str(options.folder or cache_folder().with_name(f"llama-{options.size}"))
    for criterion in options.criteria:
        config = {"size": options.size, "criterion": criterion, "share": options.share, "windows": options.windows}
        if config in have:
            continue
        for words in ({"folder": folder, "make": options.size}, {"folder": folder, "config": config}):
            found = run_apart("llm-streamed", words, limit=LIMIT, threads=options.threads)
            if "verdict" in found:
                raise SystemExit(f"{words}: {found['verdict']}")
        append_record(options.results, found)
        console.print(f"{config}: {found['seconds']:.0f} s, {found['peak_gib']:.2f} GiB", highlight=False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(read_records(options.results)), encoding="utf8")
    console.print(f"wrote {options.out}", highlight=False)


if __name__ == "__main__":
    main()
