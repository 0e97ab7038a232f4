"""Rows of the papers' tables, with the figures that are known for certain and their sources; everything else is open.

The tables are numbered by this list, not by the papers: the papers' own pages were not at hand when it was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEPGRAPH = "https://github.com/VainF/Torch-Pruning/blob/master/benchmarks"
REVIEWS = "public reviews of the ETP paper"
ETP = "README of the authors' ETP code (paper: arXiv 2506.22015)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a paper.

    Attributes:
        what: model, data and speed-up.
        task: the task of this benchmark; ``None``: there is none.
        speed_up: at which it is compared here.
        published: what the paper says of its own method there; ``None``: not known for certain.
        source: of that.
        recipe: how the full size is run, where it is not ``--scale paper`` of the task.
    """

    what: str
    task: str | None
    speed_up: float
    published: str | None = None
    source: str = ""
    recipe: str = ""


TABLES: Mapping[str, tuple[str, tuple[Row, ...]]] = {
    "table1": ("Images: ETP on CIFAR, with DepGraph's own figures beside it", (
        Row(what="ResNet-56, CIFAR-10, 2.5x", task="cifar10-resnet56", speed_up=2.5,
            published="DepGraph: 93.53 to 93.64 % at 2.57x", source=DEPGRAPH),
        Row(what="ResNet-56, CIFAR-10, 5x", task="cifar10-resnet56", speed_up=5.0),
        Row(what="VGG-19, CIFAR-100, 9x", task="cifar100", speed_up=9.0, published="ETP: -2.2 %", source=ETP),
        Row(what="VGG-19, CIFAR-100, 23x", task="cifar100", speed_up=23.0),
    )),
    "table2": ("Language: ETP on GLUE", (
        Row(what="BERT, SST-2, 8x", task="sst2", speed_up=8.0),
        Row(what="BERT, SST-2, 11x", task="sst2", speed_up=11.0, published="ETP: -1.4 %", source=ETP),
        Row(what="BERT, SST-2, 30x", task="sst2", speed_up=30.0),
        Row(what="BERT, SST-2, 42x", task="sst2", speed_up=42.0, published="ETP: -2.4 %", source=REVIEWS),
        Row(what="BERT, MRPC, 8x", task="mrpc", speed_up=8.0),
        Row(what="BERT, MRPC, 30x", task="mrpc", speed_up=30.0),
        Row(what="RoBERTa, SST-2 and MRPC, 8x to 30x", task=None, speed_up=8.0, recipe="no RoBERTa weights at hand"),
    )),
    "table3": ("Graphs: ETP on PPI", (
        Row(what="GAT, PPI, 9x", task="ppi", speed_up=9.0),
        Row(what="GAT, PPI, 12x", task="ppi", speed_up=12.0, published="ETP: -0.027 F1 at 12.16x", source=ETP),
        Row(what="the same network on tolokers, 9x (in place of PPI)", task="tolokers", speed_up=9.0),
        Row(what="the same network on Cora, 9x (in place of PPI)", task="cora", speed_up=9.0),
    )),
    "table4": ("Time series and captions: ETP on ETTh1 and Flickr8k", (
        Row(what="Informer, ETTh1, 96 to 48, 2.5x", task="ett", speed_up=2.5),
        Row(what="Informer, ETTh1, 96 to 48, 25x", task="ett", speed_up=25.0,
            published="ETP: +6.15 MAE (scale not stated)", source=ETP),
        Row(what="Informer, ETTh1, 96 to 48, 38x", task="ett", speed_up=38.0),
        Row(what="BLIP decoder, Flickr8k, 20 % of the parameters (1.25x MACs here)", task="flickr8k", speed_up=1.25,
            published="ETP: BLEU-4 -1.07", source=ETP),
    )),
    "table5": ("Torque, table 1", (
        Row(what="DenseNet-40, CIFAR-10", task="cifar10-densenet40", speed_up=2.0),
        Row(what="ResNet-164, CIFAR-10", task="cifar10-resnet164", speed_up=2.0),
        Row(what="ResNet-50, ImageNet", task=None, speed_up=2.0, recipe="ImageNet is not at hand"),
        Row(what="ViT-B/16, ImageNet (ETP)", task=None, speed_up=2.0, recipe="ImageNet is not at hand"),
    )),
}  # fmt: skip

ERRATA = (
    "ETP quotes GReg-2 on ResNet-50 at 1.49x; GReg-2's own table says 2.31x.",
    "Torque's difference of -6.12 for 73.03 to 63.91 is -9.12.",
    "DepGraph's page says +0.38 for ResNet-56 from 93.53 to 93.77 at 2.13x; that is +0.24.",
    "BLIP's base BLEU-3 is below its BLEU-4, which cumulative BLEU cannot be.",
)
"""Errors in the published figures that are not copied."""
