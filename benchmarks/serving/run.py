"""Prune SmolLM2-135M-Instruct, export it, and run it in engines without this library.

``python -m benchmarks serving`` scores units on the validation text of the Penn Treebank, prunes heads and neurons to
shares of the parameters with equally wide layers, exports plain folders, and runs each in processes that cannot import
this library. The perplexity is that of the first 2,048 tokens of the test text. There is no fine-tuning.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import etp_graph as etp
from benchmarks.models.smollm2 import load_smollm2
from benchmarks.serving import worker
from etp_graph.demo.zoo.data import data_root

LENGTH, WINDOWS = 256, 16
"""Length and number of the windows of tokens that score units."""

HEAD = """| parameters | width | engine | perplexity | tokens per second | greedy tokens equal to ours | logits off by |
|---:|---|---|---:|---:|---|---:|
"""


def scores_of(model: Any, tokenizer: Any, text: str, plan: etp.Plan) -> torch.Tensor:
    """The change of the loss when a unit is removed, on the beginning of a text."""
    tokens = tokenizer(text[:60_000], return_tensors="pt", verbose=False)["input_ids"]
    with etp.collect.gradients(model, plan) as record:
        for window in tokens.split(LENGTH, dim=1)[:WINDOWS]:
            model.zero_grad()
            model(input_ids=window, labels=window, use_cache=False).loss.backward()
    model.zero_grad()
    return etp.criteria.taylor(model, plan, record=record)


def pruned_copy(model: Any, plan: etp.Plan, scores: torch.Tensor, share: float, round_to: int) -> Any:
    """A copy with this share of the parameters and equally wide layers; the model itself for a share of 1."""
    again = copy.deepcopy(model)
    if share < 1:
        budget = etp.Budget(params=share, uniform=True, round_to={"neurons": round_to})
        etp.prune_(again, plan, etp.allocate(again, plan, scores, budget=budget))
    return again


def run_engine(folder: Path, engine: str, text: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What an engine answers for a folder; ``error`` if it fails."""
    words = [sys.executable, "-I", worker.__file__, str(folder), engine, str(text)]
    done = subprocess.run(  # noqa: S603  # our own script
        [*words, str(options.prompts), str(options.tokens)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def row(model: Any, folder: Path, engine: str, found: dict[str, Any], ours: list[list[int]]) -> str:
    """A row of the table."""
    if "error" in found:
        return f"| {model.num_parameters():,} | | {engine} | {found['error']} | | | |\n"
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    width = f"{config['intermediate_size']} neurons, {config['num_attention_heads']} heads"
    speed = f"{found['tokens_per_second']:.1f}" if "tokens_per_second" in found else ""
    quality = f"{found['perplexity']:.2f}" if "perplexity" in found else ""
    equal = "" if "tokens" not in found else "all" if found["tokens"] == ours else "not all"
    off = f"{found['logits_off_by']:.1e}" if "logits_off_by" in found else ""
    name = f"{engine} {found['version']}"
    return f"| {model.num_parameters():,} | {width} | {name} | {quality} | {speed} | {equal} | {off} |\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks serving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shares", type=float, nargs="*", default=[1.0, 0.8, 0.6], help="of the parameters")
    parser.add_argument("--engines", nargs="*", default=list(worker.ENGINES), choices=list(worker.ENGINES))
    parser.add_argument("--round-to", type=int, default=32, help="neurons are a multiple of this")
    parser.add_argument("--prompts", type=int, default=20, help="number of prompts")
    parser.add_argument("--tokens", type=int, default=64, help="tokens after each prompt")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch in this process")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    folder = data_root() / "ptb"
    model, tokenizer = load_smollm2()
    plan = etp.trace(model, etp.export.huggingface_inputs(model), check=False)
    scores = scores_of(model, tokenizer, (folder / "ptb.valid.txt").read_text(encoding="utf8"), plan)
    text = folder / "ptb.test.txt"
    starts = worker.prompts_of(tokenizer, text.read_text(encoding="utf8")[:60_000], options.prompts)
    sys.stdout.write(HEAD)
    for share in options.shares:
        pruned = pruned_copy(model, plan, scores, share, options.round_to)
        ours = [worker.continue_greedily(pruned, start, options.tokens) for start in starts]
        with TemporaryDirectory() as place:
            out = etp.export.huggingface(pruned, Path(place) / "model", tokenizer)
            for engine in options.engines:
                sys.stdout.write(row(pruned, out, engine, run_engine(out, engine, text, options), ours))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
