"""Train a pruned SmolLM2-135M-Instruct for a few hundred steps, in several ways, on equal terms.

``python -m benchmarks llm-recovery`` prunes by methods of ``python -m benchmarks llm``, and trains on windows of the
training text of the Penn Treebank, one a step. The rate of each way is chosen on the validation text. The dense model
is trained, too: it shows what the text alone brings. Each run is one JSON line; a run that has a line is not repeated.
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

from benchmarks.common.precision import precision_here
from benchmarks.common.records import PAGES, Record, append_record, read_records
from benchmarks.llm.methods import METHODS
from benchmarks.llm.recovery_page import DENSE, page
from benchmarks.llm.run import experiment_of, measured, units_target
from benchmarks.llm.texts import drawn_windows, first_windows, perplexity
from benchmarks.llm.training import RECOVERIES, pruned_sparsely, recovered
from benchmarks.models.smollm2 import load_smollm2

RESULTS = Path("benchmarks/results/llm-recovery.jsonl")

TUNED_ON = "fisher+weights"
"""The method whose models choose the rate of each way."""

TUNING_STEPS = 40

VALIDATION = 4
"""Windows."""

RUNS = (
    (DENSE, "full"), (TUNED_ON, "full"), (TUNED_ON, "lora"), (TUNED_ON, "distilled"), ("flap", "full"),
    (DENSE, "etp-global"), ("wanda-sp", "full"),
)  # fmt: skip
"""What is trained, and how."""


def configs(share: float, steps: Sequence[int], seed: int) -> Iterator[dict[str, Any]]:
    """The runs that the table needs, those of few steps first."""
    for number in sorted(steps):
        for method, how in RUNS:
            yield {"method": method, "share": share, "how": how, "steps": number, "seed": seed}


class Session:
    """The dense model and what is computed once for all runs of a seed."""

    def __init__(self, results: Path, share: float, seed: int, console: Console) -> None:
        self.results, self.share, self.seed, self.console = results, share, seed, console
        self.dense, self.tokenizer = load_smollm2()
        self.experiment = experiment_of(self.dense, self.tokenizer, seed)  # which only changes copies
        self.target = units_target(self.dense, share)
        half = precision_here("bf16", "cpu") == "bf16"
        self.teacher = copy.deepcopy(self.dense).to(torch.bfloat16 if half else torch.float32)
        self._pruned: dict[str, Any] = {}

    def run(self, config: dict[str, Any]) -> Record:
        """Train by the best rate and return the record."""
        rate = self._rate(config["how"])
        begin = perf_counter()
        start, model = self._trained(config["method"], config["how"], config["steps"], rate)
        return {
            "config": config, "rate": rate, "precision": precision_here("bf16", "cpu"),
            "params": model.num_parameters(), "before": start,
            "perplexity": measured(model, self.tokenizer), "seconds": round(perf_counter() - begin, 1),
        }  # fmt: skip

    def _trained(self, method: str, how: str, steps: int, rate: float) -> tuple[dict[str, float] | None, Any]:
        """What the start had before training, and the trained model."""
        windows = drawn_windows(self.tokenizer, steps, self.seed + 1)
        recovery = RECOVERIES[how]
        if recovery.sparse:
            batches = self.experiment.batches
            return None, pruned_sparsely(self.dense, batches, windows, self.target, rate)
        model = copy.deepcopy(self._start(method))
        before = measured(model, self.tokenizer)
        return before, recovered(model, self.teacher, windows, recovery, rate)

    def _start(self, method: str) -> Any:
        if method == DENSE:
            return self.dense
        if method not in self._pruned:
            self._pruned[method], _ = self.experiment.prune(METHODS[method], self.target)
        return self._pruned[method]

    def _rate(self, how: str) -> float:
        """The rate with the least perplexity on the validation text; measured once, by lines of their own."""
        windows, found = first_windows(self.tokenizer, "valid", VALIDATION), {}
        for rate in RECOVERIES[how].rates:
            config = {"tuned": how, "rate": rate, "share": self.share, "steps": TUNING_STEPS, "seed": self.seed}
            done = next((one for one in read_records(self.results) if one["config"] == config), None)
            if done is None:
                _, model = self._trained(TUNED_ON, how, TUNING_STEPS, rate)
                done = {"config": config, "valid": perplexity(model, windows)}
                append_record(self.results, done)
                self.console.print(f"{how}, rate {rate:g}: {done['valid']:.1f} on valid", highlight=False)
            found[rate] = done["valid"]
        return min(found, key=found.__getitem__)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    what = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks llm-recovery", description=what)
    parser.add_argument("--share", type=float, default=0.8, metavar="X", help="of the parameters; default 0.8")
    parser.add_argument("--steps", nargs="+", type=int, default=[200, 1000], metavar="N", help="default 200 1000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON lines")
    parser.add_argument("--out", type=Path, default=PAGES / "llm-recovery.md", help="the page")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; default 1")
    options: Any = parser.parse_args(arguments)
    if not 0 < options.share < 1:
        parser.error(f"--share {options.share}: it lies between 0 and 1")
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    there = [one["config"] for one in read_records(options.results)]
    missing = [one for one in configs(options.share, options.steps, options.seed) if one not in there]
    if missing:
        session = Session(options.results, options.share, options.seed, console)
        for config in missing:
            record = session.run(config)
            append_record(options.results, record)
            console.print(f"{config}: {record['perplexity']}, {record['seconds']:.0f} s", highlight=False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(read_records(options.results)), encoding="utf8")
    console.print(f"{len(missing)} runs; wrote {options.out}", highlight=False)


if __name__ == "__main__":
    main()
