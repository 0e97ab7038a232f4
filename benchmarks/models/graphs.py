"""Graph networks of torch-geometric's layers, and the attention network of Veličković et al. (2018) for PPI."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.entry import Entry, entry, noise

NODES, EDGES = 13, 40
FEATURES, CLASSES = 11, 7
"""Of the small example graph."""


class GraphNet(nn.Module):
    """Graph convolutions with an ELU between them."""

    def __init__(self, convs: Sequence[nn.Module]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for conv in self.convs[:-1]:
            x = F.elu(conv(x, edge_index))
        out: Tensor = self.convs[-1](x, edge_index)
        return out


class PPIGAT(nn.Module):
    """The inductive network of the GAT paper (section 3.3): three layers of attention, each beside a linear skip.

    Two layers of four concatenated heads of ``width`` features, then six heads of ``classes`` features, averaged.

    Args:
        features: input features of a node; 50 in PPI.
        classes: labels of a node; 121 in PPI.
        width: features of a hidden head; 256 in the paper.
    """

    def __init__(self, *, features: int = 50, classes: int = 121, width: int = 256, heads: tuple[int, int] = (4, 6)):
        super().__init__()
        from torch_geometric.nn import GATConv

        hidden = heads[0] * width
        self.conv1 = GATConv(features, width, heads=heads[0])
        self.lin1 = nn.Linear(features, hidden)
        self.conv2 = GATConv(hidden, width, heads=heads[0])
        self.lin2 = nn.Linear(hidden, hidden)
        self.conv3 = GATConv(hidden, classes, heads=heads[1], concat=False)
        self.lin3 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = F.elu(self.conv1(x, edge_index) + self.lin1(x))
        x = F.elu(self.conv2(x, edge_index) + self.lin2(x))
        out: Tensor = self.conv3(x, edge_index) + self.lin3(x)
        return out


def graph(features: int = FEATURES, *, nodes: int = NODES, edges: int = EDGES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Node features [nodes, features] and edges [2, edges]: all different, none from a node to itself."""
    pairs = [(a, b) for a in range(nodes) for b in range(nodes) if a != b]
    chosen = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:edges]
    return noise(nodes, features, seed=seed), torch.tensor([pairs[i] for i in chosen]).T.contiguous()


def _heads(layer: str, widths: Sequence[int], heads: Sequence[int], **options: Any) -> Callable[[], nn.Module]:
    """Layers of attention whose heads are concatenated, and averaged in the last."""

    def build() -> nn.Module:
        import torch_geometric.nn as pyg

        convs, width, last = [], FEATURES, len(widths) - 1
        for i, (out, count) in enumerate(zip(widths, heads)):
            convs.append(getattr(pyg, layer)(width, out, heads=count, concat=i < last, **options))
            width = out * count
        return GraphNet(convs)

    return build


def _plain(layer: str, *widths: int, **options: Any) -> Callable[[], nn.Module]:
    """Layers of one width each."""

    def build() -> nn.Module:
        import torch_geometric.nn as pyg

        pairs = zip((FEATURES, *widths), widths)
        return GraphNet([getattr(pyg, layer)(before, after, **options) for before, after in pairs])

    return build


def _gin(*widths: tuple[int, int]) -> Callable[[], nn.Module]:
    """Graph isomorphism layers, each with a perceptron of (hidden, output) widths and batch norm."""

    def build() -> nn.Module:
        from torch_geometric.nn import GINConv

        convs, width = [], FEATURES
        for hidden, out in widths:
            norm = nn.BatchNorm1d(hidden)
            mlp = nn.Sequential(nn.Linear(width, hidden), norm, nn.ReLU(), nn.Linear(hidden, out))
            convs.append(GINConv(mlp, train_eps=True))
            width = out
        return GraphNet(convs)

    return build


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "gcn2": _plain("GCNConv", 24, CLASSES),
    "gcn3": _plain("GCNConv", 24, 18, CLASSES),
    "sage2": _plain("SAGEConv", 24, CLASSES),
    "sage3": _plain("SAGEConv", 24, 18, CLASSES),
    "sage3_max": _plain("SAGEConv", 24, 18, CLASSES, aggr="max"),
    "graphconv2": _plain("GraphConv", 24, CLASSES),
    "gin2": _gin((20, 24), (18, CLASSES)),
    "gin3": _gin((20, 24), (18, 22), (16, CLASSES)),
    "gat2": _heads("GATConv", (6, CLASSES), (4, 3)),
    "gat3": _heads("GATConv", (6, 5, CLASSES), (4, 2, 3)),
    "gat1_head": _heads("GATConv", (12, CLASSES), (1, 1)),
    "gatv2_2": _heads("GATv2Conv", (6, CLASSES), (4, 3)),
    "gatv2_3": _heads("GATv2Conv", (6, 5, CLASSES), (4, 2, 3)),
    "gatv2_shared": _heads("GATv2Conv", (6, CLASSES), (4, 3), share_weights=True),
    "transformerconv2": _heads("TransformerConv", (6, CLASSES), (4, 3)),
    "transformerconv3": _heads("TransformerConv", (6, 5, CLASSES), (4, 2, 3)),
    "transformerconv_beta": _heads("TransformerConv", (6, CLASSES), (4, 3), beta=True),
}


def entries() -> Iterator[Entry]:
    """The networks on a small random graph, and PPI's at two widths; none without torch-geometric."""
    if find_spec("torch_geometric") is None:
        return
    for name, build in NETWORKS.items():
        yield entry(f"pyg:{name}", "graphs", build, graph)
    small = {"features": 17, "classes": 10, "width": 12, "heads": (4, 3)}
    yield entry("pyg:gat_ppi_small", "graphs", lambda: PPIGAT(**small), lambda: graph(17))  # type: ignore[arg-type]
    yield entry("pyg:gat_ppi", "graphs", PPIGAT, lambda: graph(50))
