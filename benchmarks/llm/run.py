"""Prune SmolLM2-135M-Instruct without training, by this and other methods, on equal terms.

``python -m benchmarks llm`` calibrates on windows of the training text of the Penn Treebank. Each method removes heads
and neurons until a share of the parameters stays, embeddings not counted. The perplexity is measured on the test text
and on a text of another domain. Each run is one JSON line; a run that has a line is not repeated.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

import etp_graph as etp
from benchmarks.common.records import PAGES, Record, append_record, read_records
from benchmarks.llm.methods import METHODS, Experiment
from benchmarks.llm.page import DENSE, SHARES, page
from benchmarks.llm.texts import drawn_windows, first_windows, perplexity
from benchmarks.models.smollm2 import load_smollm2

RESULTS = Path("benchmarks/results/llm.jsonl")

CALIBRATION, TEST, OTHER = 16, 8, 4
"""Number of windows."""


def configs(methods: Sequence[str], shares: Sequence[float], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The runs, seed after seed; within a seed share after share."""
    for seed in seeds:
        for share in shares:
            for method in methods:
                yield {"method": method, "share": share, "seed": seed}


def experiment_of(model: Any, tokenizer: Any, seed: int) -> Experiment:
    """The plan and the calibration batches of a seed."""
    batches = [{"input_ids": some, "use_cache": False} for some in drawn_windows(tokenizer, CALIBRATION, seed).split(2)]
    plan = etp.trace(model, batches[0], check=False)
    return Experiment(model=model, plan=plan, batches=batches, seed=seed)


def measured(model: Any, tokenizer: Any) -> dict[str, float]:
    """The perplexity on both texts."""
    return {
        "ptb": perplexity(model, first_windows(tokenizer, "test", TEST)),
        "sst2": perplexity(model, first_windows(tokenizer, "sst2", OTHER)),
    }


def units_target(model: Any, share: float) -> int:
    """The number of parameters at a share, embeddings not counted."""
    embedding = int(model.get_input_embeddings().weight.numel())
    return embedding + int(share * (model.num_parameters() - embedding))


def run_one(experiment: Experiment, config: dict[str, Any], tokenizer: Any) -> Record:
    """The record of one run."""
    embedding = experiment.model.get_input_embeddings().weight.numel()
    dense = experiment.model.num_parameters()
    begin = perf_counter()
    model, selection = experiment.prune(METHODS[config["method"]], units_target(experiment.model, config["share"]))
    seconds = perf_counter() - begin
    kept = {} if selection is None else {name: int(keep.sum()) for name, keep in selection.keep.items()}
    return {
        "config": config, "params": [dense, model.num_parameters()], "embedding": embedding, "kept": kept,
        "layers": model.config.num_hidden_layers,
        "perplexity": measured(model, tokenizer), "seconds": round(seconds, 1),
        "tokens": {"calibration": CALIBRATION * 256, "ptb": TEST * 256, "sst2": OTHER * 256},
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks llm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help="all")
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES), metavar="X")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default 0")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON lines")
    parser.add_argument("--out", type=Path, default=PAGES / "llm.md", help="the page")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; default 1")
    return parser


def run_missing(todo: Sequence[dict[str, Any]], results: Path, console: Console) -> int:
    """Run what has no line yet and write its line; the number of runs."""
    have = [record["config"] for record in read_records(results)]
    missing = [config for config in todo if config not in have]
    if not missing:
        return 0
    model, tokenizer = load_smollm2()
    if not any(config["method"] == DENSE for config in have):
        config = {"method": DENSE, "share": 1.0, "seed": 0}
        append_record(results, {"config": config, "perplexity": measured(model, tokenizer)})
    experiment = None
    for config in missing:
        if experiment is None or experiment.seed != config["seed"]:
            experiment = experiment_of(copy.deepcopy(model), tokenizer, config["seed"])
        record = run_one(experiment, config, tokenizer)
        append_record(results, record)
        console.print(
            f"{config}: {record['seconds']:.0f} s, {record['perplexity']['sst2']:.1f} on sst2", highlight=False
        )
    return len(missing)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    options: Any = parser.parse_args(arguments)
    if not all(0 < share < 1 for share in options.shares):
        parser.error(f"--shares {options.shares}: shares lie between 0 and 1")
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    todo = list(configs(options.methods, options.shares, options.seeds))
    done = run_missing(todo, options.results, console)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(read_records(options.results)), encoding="utf8")
    console.print(f"{done} runs, {len(todo) - done} were there; wrote {options.out}", highlight=False)


if __name__ == "__main__":
    main()
