"""Nodes of graphs: tolokers, Cora, and PPI where it is at hand, with the three-layer network of the GAT paper."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.graphs import PPIGAT
from benchmarks.tasks.base import Metric, Part, Recipe, Scale, Task, require
from etp_graph.demo.zoo.data import data_root

_COMMON: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 5e-4, "batch_size": 1}
_SMOKE = Recipe(
    dense_steps=2, sparse_steps=2, finetune_steps=2, scratch_steps=2, dense_rate=5e-3, sparse_rate=5e-3,
    finetune_rate=5e-3, tune_share=0.5, pushes=(1.0,), **_COMMON,
)  # fmt: skip
_CPU = Recipe(
    dense_steps=200, sparse_steps=120, finetune_steps=120, scratch_steps=440, dense_rate=1e-2, sparse_rate=5e-3,
    finetune_rate=5e-3, tune_share=0.3, **_COMMON,
)  # fmt: skip
_FULL = Recipe(
    dense_steps=400, sparse_steps=200, finetune_steps=400, scratch_steps=1_000, dense_rate=5e-3, sparse_rate=5e-3,
    finetune_rate=5e-3, tune_share=1.0, pushes=(0.2, 0.6, 2.0, 6.0), extensions=2, **_COMMON,
)  # fmt: skip
_PAPER = Recipe(
    dense_steps=1_000, sparse_steps=1_000, finetune_steps=1_000, scratch_steps=3_000, dense_rate=5e-3,
    sparse_rate=5e-3, finetune_rate=5e-3, tune_share=0.3, pushes=(0.2, 0.6, 2.0, 6.0, 20.0), **_COMMON,
)  # fmt: skip


class GraphTask(Task):
    """One graph, all of it in every step."""

    prune = ("heads", "head_dims", "neurons")
    x: Tensor
    edges: Tensor
    y: Tensor
    masks: dict[str, Tensor]

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        require(find_spec("torch_geometric") is not None, "torch-geometric is missing: pip install torch-geometric")
        recipe = {"smoke": _SMOKE, "cpu": _CPU, "full": _FULL, "paper": _PAPER}[scale]
        # Chosen by the unpruned network alone, `python -m benchmarks weight-decay cora tolokers`: 5e-4, which AdamW
        # multiplies by the learning rate, is next to none.
        self.recipe = replace(recipe, weight_decay=3.0)

    @property
    def n_train(self) -> int:
        return 1

    def example(self) -> tuple[Tensor, Tensor]:
        return self.x, self.edges

    def inputs(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        return self.x, self.edges


def _file(name: str) -> Path:
    path = data_root() / "graphs" / f"{name}.npz"
    require(path.is_file(), f"{path} is missing")
    return path


class Tolokers(GraphTask):
    """Which crowd workers were banned (Platonov et al. 2023), the first of the ten splits; ROC AUC.

    On a CPU only every tenth edge of a fixed random order is kept: 104,000 of 1,038,000 directed ones.
    """

    name = "tolokers"
    own_checkpoints = True  # every step sees the whole graph, and there is no dropout
    checkpoint_note = "trained by this benchmark with the seed of the run and cached"
    metric = Metric(name="ROC AUC", percent=True)
    classes = False  # one logit
    speed_ups = (3.0, 9.0)

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        share = {"smoke": 0.01, "cpu": 0.1, "full": 1.0, "paper": 1.0}[scale]
        self.width = {"smoke": 4, "cpu": 16, "full": 16, "paper": 256}[scale]
        self.title = f"GAT (4 heads of {self.width}) on tolokers" + (f", {share:.0%} of the edges" if share < 1 else "")
        with np.load(_file("tolokers"), allow_pickle=False) as z:
            x, edges = torch.from_numpy(z["node_features"]), torch.from_numpy(z["edges"].astype(np.int64))
            self.y = torch.from_numpy(z["node_labels"]).float()
            self.masks = {part: torch.from_numpy(z[f"{part}_masks"][0]) for part in ("train", "val", "test")}
        train = x[self.masks["train"]]
        self.x = (x - train.mean(0)) / train.std(0).clamp(min=1e-6)
        order = torch.randperm(len(edges), generator=torch.Generator().manual_seed(0))
        kept = edges[order[: round(share * len(edges))]]
        self.edges = torch.cat([kept, kept.flip(1)]).T.contiguous()

    def build(self) -> nn.Module:
        return PPIGAT(features=self.x.shape[1], classes=1, width=self.width, heads=(4, 6))

    def loss(self, model: nn.Module, chosen: Tensor, generator: torch.Generator) -> Tensor:
        mask = self.masks["train"]
        return F.binary_cross_entropy_with_logits(model(self.x, self.edges)[mask, 0], self.y[mask])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: Part) -> float:
        mask = self.masks[part]
        return roc_auc(model.eval()(self.x, self.edges)[mask, 0], self.y[mask])


class Cora(GraphTask):
    """Topics of papers (Sen et al. 2008): 140 labels for training, at full size all that are not held out; accuracy."""

    name = "cora"
    # At 9x one head of seven features is left of the first layer: which one is good enough differs by points between
    # checkpoints, and seeds that shared one said nothing about that.
    own_checkpoints = True
    checkpoint_note = "trained by this benchmark with the seed of the run and cached"
    metric = Metric(name="accuracy", percent=True)
    speed_ups = (3.0, 9.0)

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        self.width = {"smoke": 4, "cpu": 16, "full": 64, "paper": 256}[scale]
        self.title = f"GAT (4 heads of {self.width}) on Cora"
        with np.load(_file("cora"), allow_pickle=False) as z:
            x = np.zeros(z["x_shape"], np.float32)
            x[np.repeat(np.arange(len(x)), np.diff(z["x_indptr"])), z["x_indices"]] = 1
            edges = np.concatenate([z["edges"], z["edges"][:, ::-1]]).T.astype(np.int64)
            self.y = torch.from_numpy(z["y"].astype(np.int64))
            self.masks = {part: torch.from_numpy(z[part].astype(np.int64)) for part in ("train", "val", "test")}
        if scale == "full":
            # All labels at hand, the split of Chen et al. 2018 (FastGCN). With the 140 of the public split the dense
            # network lost 1.6 to 3.8 points of validation accuracy in training on, at four rates after 400 steps and at
            # two after 1,000 (`python -m benchmarks contest recipe cora` at commits b20d9e1 and 8a7a2b1). Methods would
            # have been compared on a network that is broken.
            others = ~torch.isin(torch.arange(len(x)), torch.cat([self.masks["val"], self.masks["test"]]))
            self.masks["train"] = others.nonzero().flatten()
            self.title, self.data = f"{self.title} with all labels", "all labels"
        rows = torch.from_numpy(x)
        self.x = rows / rows.sum(1, keepdim=True).clamp(min=1)
        self.edges = torch.from_numpy(np.ascontiguousarray(edges))

    def build(self) -> nn.Module:
        return PPIGAT(features=self.x.shape[1], classes=7, width=self.width, heads=(4, 6))

    def loss(self, model: nn.Module, chosen: Tensor, generator: torch.Generator) -> Tensor:
        nodes = self.masks["train"]
        dropped = (
            self.x * (torch.rand(self.x.shape, generator=generator) < 0.5).to(self.x.device) * 2
        )  # 140 labels overfit at once
        return F.cross_entropy(model(dropped, self.edges)[nodes], self.y[nodes])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: Part) -> float:
        nodes = self.masks[part]
        right = model.eval()(self.x, self.edges)[nodes].argmax(1) == self.y[nodes]
        return float(right.float().mean())


class PPI(Task):
    """Protein interactions (Hamilton et al. 2017): 20, 2 and 2 graphs, 121 labels for each node; micro-averaged F1."""

    name = "ppi"
    title = "GAT (4 heads of 256) on PPI"
    metric = Metric(name="micro F1")
    classes = False  # a logit for each of 121 labels
    speed_ups = (9.0, 12.0)
    prune = ("heads", "head_dims", "neurons")

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        require(find_spec("torch_geometric") is not None, "torch-geometric is missing: pip install torch-geometric")
        folder = data_root() / "ppi"
        require(
            (folder / "raw").is_dir() or (folder / "processed").is_dir(),
            f"no PPI in {folder}: torch_geometric.datasets.PPI({str(folder)!r}) downloads it",
        )
        from torch_geometric.datasets import PPI as Graphs

        self.graphs = {part: list(Graphs(str(folder), split=part)) for part in ("train", "val", "test")}
        self.width = {"smoke": 4, "cpu": 32, "full": 256, "paper": 256}[scale]
        self.recipe = {"smoke": _SMOKE, "cpu": _CPU, "full": _FULL, "paper": _PAPER}[scale]

    @property
    def n_train(self) -> int:
        return len(self.graphs["train"])

    def build(self) -> nn.Module:
        return PPIGAT(width=self.width)

    def example(self) -> tuple[Tensor, Tensor]:
        return self.inputs(torch.tensor([0]))

    def inputs(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        graph = self.graphs["train"][int(chosen[0])]
        return graph.x, graph.edge_index

    def loss(self, model: nn.Module, chosen: Tensor, generator: torch.Generator) -> Tensor:
        graphs = [self.graphs["train"][i] for i in chosen.tolist()]
        losses = [F.binary_cross_entropy_with_logits(model(g.x, g.edge_index), g.y) for g in graphs]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: Part) -> float:
        model.eval()
        found = torch.cat([(model(g.x, g.edge_index) > 0).flatten() for g in self.graphs[part]])
        truth = torch.cat([g.y.flatten() > 0 for g in self.graphs[part]])
        return float(2 * (found & truth).sum() / (found.sum() + truth.sum()).clamp(min=1))


def roc_auc(score: Tensor, label: Tensor) -> float:
    """Area under the ROC curve: the share of pairs in the right order; a tie is half a pair (Mann & Whitney 1947)."""
    values, place = score.double().unique(return_inverse=True)
    positive = torch.bincount(place, weights=label.double(), minlength=len(values))
    negative = torch.bincount(place, minlength=len(values)).double() - positive
    below = negative.cumsum(0) - negative
    return float((positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum()))
