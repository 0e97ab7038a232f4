"""Penn Treebank: a two-layer LSTM language model; perplexity."""

from __future__ import annotations

import gzip
import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.recurrent import LanguageModel
from benchmarks.tasks.base import Metric, Part, Recipe, Scale, Task, require
from etp_graph.demo.zoo.data import data_root

WINDOW = 32
"""Tokens of an example; the state begins at zero in each, in training and in evaluation."""
_RECIPES = {
    "smoke": Recipe(
        dense_steps=2, sparse_steps=2, finetune_steps=2, scratch_steps=2, dense_rate=3e-3, sparse_rate=1e-3,
        finetune_rate=1e-3, batch_size=4, optimizer="adamw", weight_decay=0.0, tune_share=0.5, pushes=(1.0,), clip=1.0,
    ),
    "cpu": Recipe(
        dense_steps=1_500, sparse_steps=250, finetune_steps=250, scratch_steps=2_000, dense_rate=1.6e-2,
        sparse_rate=4e-3, finetune_rate=4e-3, batch_size=24, optimizer="adamw", weight_decay=0.0, tune_share=0.25,
        clip=1.0,
    ),
    "full": Recipe(  # 453 steps a pass: 13 passes, as Zaremba et al. 2014 give their small network, then 1 and 2
        dense_steps=13 * 453, sparse_steps=453, finetune_steps=2 * 453, scratch_steps=16 * 453, dense_rate=4e-3,
        sparse_rate=5e-4, finetune_rate=5e-4, batch_size=64, optimizer="adamw", weight_decay=0.0, tune_share=1.0,
        pushes=(0.2, 0.6, 2.0, 6.0), extensions=2, clip=1.0,
    ),
    "paper": Recipe(
        dense_steps=30_000, sparse_steps=15_000, finetune_steps=15_000, scratch_steps=60_000, dense_rate=2e-3,
        sparse_rate=5e-4, finetune_rate=5e-4, batch_size=64, optimizer="adamw", weight_decay=0.0, tune_share=0.2,
        pushes=(0.2, 0.6, 2.0, 6.0, 20.0), clip=1.0,
    ),
}  # fmt: skip
_SIZES = {"smoke": (200, 12, 8), "cpu": (2_000, 128, 600), "full": (10_000, 200, None), "paper": (10_000, 650, None)}
"""Words of the vocabulary (rarer ones are unknown), width, windows of the validation and test parts."""


class Ptb(Task):
    """The states of both layers may shrink; words that are rarer than those kept are unknown."""

    name = "ptb"
    metric = Metric(name="perplexity", higher=False)
    speed_ups = (2.0, 5.0)

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        folder = data_root() / "ptb"
        require((folder / "ptb.train.txt.gz").is_file(), f"no Penn Treebank in {folder}")
        self.recipe = _RECIPES[scale]
        self.words, self.width, windows = _SIZES[scale]
        self.title = f"LSTM (2 layers of {self.width}) on Penn Treebank, {self.words:,} words"
        with gzip.open(folder / "ptb.train.txt.gz", "rt", encoding="utf8") as file:
            train = _words(file.read())
        common = [word for word, _ in Counter(train).most_common(self.words)]
        ids = {word: number for number, word in enumerate(common)}
        self.parts = {"train": _windows(train, ids)}
        for part, name in (("val", "valid"), ("test", "test")):
            self.parts[part] = _windows(_words((folder / f"ptb.{name}.txt").read_text(encoding="utf8")), ids)[:windows]

    @property
    def n_train(self) -> int:
        return len(self.parts["train"])

    def build(self) -> nn.Module:
        return LanguageModel(nn.LSTM, embedding=self.width, hidden=self.width, vocabulary=self.words)

    def example(self) -> Tensor:
        return self.parts["train"][:1, :-1]

    def latency_inputs(self) -> Tensor:
        return self.parts["train"][:8, :-1]

    def inputs(self, chosen: Tensor) -> Tensor:
        return self.parts["train"][chosen, :-1]

    def loss(self, model: nn.Module, chosen: Tensor, generator: torch.Generator) -> Tensor:
        return _loss(model, self.parts["train"][chosen])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: Part) -> float:
        model.eval()
        windows = self.parts[part]
        total = sum(float(_loss(model, some)) * len(some) for some in windows.split(50))
        return math.exp(min(total / len(windows), 20.0))


def _words(text: str) -> list[str]:
    return text.replace("\n", " <eos> ").split()


def _windows(words: list[str], ids: dict[str, int]) -> Tensor:
    """[n, WINDOW + 1]: each window begins with the last token of the one before."""
    unknown = ids["<unk>"]
    tokens = torch.tensor([ids.get(word, unknown) for word in words])
    return tokens.unfold(0, WINDOW + 1, WINDOW).contiguous()


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
