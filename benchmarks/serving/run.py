"""Prune SmolLM2-135M-Instruct, export it, and run it in engines without this library.

``python -m benchmarks serving`` scores units and layers on the validation text of the Penn Treebank. It prunes to
shares of the parameters: heads and neurons with equally wide layers, whole layers, or half of the saving each. It
exports plain folders, and runs each in processes that cannot import this library. The perplexity is that of the first
2,048 tokens of the test text. There is no fine-tuning.
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
from benchmarks.common.machine import machine_conditions
from benchmarks.common.records import append_record, read_records
from benchmarks.models.smollm2 import load_smollm2
from benchmarks.serving import worker
from benchmarks.serving.page import PAGE, RESULTS, page
from etp_graph.demo.zoo.data import data_root

LENGTH, WINDOWS = 256, 16
"""Length and number of the windows of tokens that score units."""

LAYER_WINDOWS = 4
"""Number of the windows that score layers, which are scored anew after each removal."""

WAYS = ("width", "depth", "both")


def windows_of(tokenizer: Any, text: str) -> list[torch.Tensor]:
    """Windows of the beginning of a text, each int64 [1, LENGTH]."""
    tokens = tokenizer(text[:60_000], return_tensors="pt", verbose=False)["input_ids"]
    return list(tokens.split(LENGTH, dim=1)[:WINDOWS])


def scores_of(model: Any, tokenizer: Any, text: str, plan: etp.Plan) -> torch.Tensor:
    """The change of the loss when a unit is removed, on the beginning of a text."""
    with etp.collect.gradients(model, plan) as record:
        for window in windows_of(tokenizer, text):
            model.zero_grad()
            model(input_ids=window, labels=window, use_cache=False).loss.backward()
    model.zero_grad()
    return etp.criteria.taylor(model, plan, record=record)


def narrow_(model: Any, tokenizer: Any, text: str, n_parameters: int, round_to: int) -> None:
    """Remove heads and neurons until so many parameters are left, with equally wide layers."""
    plan = etp.trace(model, etp.export.huggingface_inputs(model), check=False)
    scores = scores_of(model, tokenizer, text, plan)
    budget = etp.Budget(params=n_parameters, uniform=True, round_to={"neurons": round_to})
    etp.prune_(model, plan, etp.allocate(model, plan, scores, budget=budget))


def shorten_(model: Any, tokenizer: Any, text: str, saving: float) -> None:
    """Remove the layers with the least influence until so many parameters are saved."""
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    batches = [{"input_ids": one, "use_cache": False} for one in windows_of(tokenizer, text)[:LAYER_WINDOWS]]
    etp.depth.shorten_(model, batches, n_blocks=max(1, -int(-saving // layer)))


def pruned_copy(model: Any, tokenizer: Any, text: str, share: float, way: str, round_to: int) -> Any:
    """A copy with at most this share of the parameters."""
    again, n_parameters = copy.deepcopy(model), model.num_parameters()
    target = int(share * n_parameters)
    if way == "depth":
        shorten_(again, tokenizer, text, n_parameters - target)
    elif way == "both":
        layer = sum(p.numel() for p in model.model.layers[0].parameters())
        shorten_(again, tokenizer, text, ((n_parameters - target) // 2 // layer) * layer)
    if way != "depth":
        narrow_(again, tokenizer, text, target, round_to)
    return again


def run_engine(folder: Path, engine: str, text: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What an engine answers for a folder; ``error`` if it fails."""
    words = [sys.executable, "-I", worker.__file__, str(folder), engine, str(text)]
    sites = [str(Path(site).resolve()) for site in options.site]
    done = subprocess.run(  # noqa: S603  # our own script
        [*words, str(options.prompts), str(options.tokens), *sites], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(model: Any, tokenizer: Any, text: Path, options: argparse.Namespace, **setting: Any) -> None:
    """Export a model, run it in each engine, and append a record."""
    starts = worker.prompts_of(tokenizer, text.read_text(encoding="utf8")[:60_000], options.prompts)
    ours = worker.continue_greedily(model, starts, options.tokens)
    with TemporaryDirectory() as place:
        out = etp.export.huggingface(model, Path(place) / "model", tokenizer)
        config = json.loads((out / "config.json").read_text(encoding="utf8"))
        engines = {}
        for engine in options.engines:
            found = run_engine(out, engine, text, options)
            if "tokens" in found:
                found["equal_prompts"] = sum(a == b for a, b in zip(found.pop("tokens"), ours))
            engines[engine] = found
    sizes = {name: config[name] for name in ("num_hidden_layers", "intermediate_size", "num_attention_heads")}
    record = {"setting": setting, "parameters": model.num_parameters(), **sizes, "engines": engines,
              "prompts": options.prompts, "tokens": options.tokens, "conditions": machine_conditions()}  # fmt: skip
    append_record(options.results, record)
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks serving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shares", type=float, nargs="*", default=[1.0, 0.8, 0.6], help="of the parameters")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, help="what is removed")
    parser.add_argument("--engines", nargs="*", default=list(worker.ENGINES), choices=list(worker.ENGINES))
    parser.add_argument("--site", nargs="*", default=[], help="folders of pip install --target with engines")
    parser.add_argument("--round-to", type=int, default=32, help="neurons are a multiple of this")
    parser.add_argument("--prompts", type=int, default=20, help="number of prompts")
    parser.add_argument("--tokens", type=int, default=64, help="tokens after each prompt")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that the records are appended to")
    parser.add_argument("--page", action="store_true", help="write the page from the records, without measuring")
    options = parser.parse_args(arguments)
    if options.page:
        PAGE.write_text(page(read_records(options.results)), encoding="utf8")
        return
    torch.set_num_threads(1)
    folder = data_root() / "ptb"
    model, tokenizer = load_smollm2()
    valid = (folder / "ptb.valid.txt").read_text(encoding="utf8")
    for share in options.shares:
        for way in options.ways if share < 1 else ("dense",):
            pruned = pruned_copy(model, tokenizer, valid, share, way, options.round_to) if share < 1 else model
            measure(pruned, tokenizer, folder / "ptb.test.txt", options, share=share, way=way)


if __name__ == "__main__":
    main()
