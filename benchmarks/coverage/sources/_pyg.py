"""Every convolution of torch-geometric, between a linear layer and a linear head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.entry import noise
from benchmarks.models.graphs import CLASSES, EDGES, FEATURES, NODES, graph

from ._common import NotBuilt, arguments_of, first_that_runs

PACKAGE = "torch-geometric"
_WIDTH, _OUT, _EDGE = 16, 24, 5
"""Channels before and after a convolution, and numbers of an edge."""

_ABSTRACT = ("MessagePassing", "FusedGATConv", "CuGraphGATConv", "CuGraphRGCNConv", "CuGraphSAGEConv", "HeteroConv",
             "WLConv")  # fmt: skip
"""Bases, containers, layers of kernels for GPUs, and a hash of labels: nothing that a network trains."""


def _mlp(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Linear(before, 20), nn.ReLU(), nn.Linear(20, after))


_VALUES: Mapping[str, Any] = {
    "in_channels": _WIDTH, "channels": _WIDTH, "out_channels": _OUT, "heads": 4, "K": 2, "alpha": 0.1, "dim": 2,
    "kernel_size": 3, "num_relations": 3, "edge_dim": _EDGE, "hidden_channels": 12, "filter_size": 2, "num_layers": 2,
    "space_dimensions": 3, "propagate_dimensions": 6, "k": 3, "num_node_types": 2, "num_edge_types": 3,
    "edge_type_emb_dim": 4, "edge_attr_emb_dim": 4, "first_aggr": True, "requires_grad": True,
    "metadata": (["a"], [("a", "to", "a")]), "aggregators": ["mean", "max"], "scalers": ["identity", "amplification"],
}  # fmt: skip
"""What the constructors get, by the name of the argument."""

_OWN: Mapping[str, Mapping[str, Any]] = {
    "CGConv": {"dim": _EDGE}, "EGConv": {"num_heads": 4}, "PNAConv": {"aggregators": ["mean", "max"], "towers": 4},
    "GatedGraphConv": {"out_channels": _OUT}, "XConv": {"dim": 3}, "DNAConv": {"heads": 4, "groups": 2},
    "GCN2Conv": {"theta": 0.5, "layer": 1}, "GMMConv": {"dim": _EDGE}, "HypergraphConv": {"heads": 1},
    "GeneralConv": {"in_edge_channels": _EDGE},
}  # fmt: skip
"""What single constructors get besides."""


@cache
def names() -> list[str]:
    """Return the names of the classes."""
    if find_spec("torch_geometric") is None:
        return []
    from torch_geometric.nn import conv

    return sorted(set(conv.__all__) - set(_ABSTRACT))


def family(name: str) -> str:
    """Return the family of the page."""
    return "torch-geometric"


class ConvNet(nn.Module):
    """A linear layer, a convolution, and a linear head."""

    def __init__(self, conv: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.conv, self.head = nn.Linear(FEATURES, _WIDTH), conv, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, **others: Any) -> Tensor:
        h = self.first(x).relu()
        wanted = arguments_of(self.conv.forward)
        if "x_dict" in wanted:
            out = self.conv({"a": h}, {("a", "to", "a"): others["edge_index"]})["a"]
        elif "x_0" in wanted:
            out = self.conv(h, self.first(x), others["edge_index"])
        elif type(self.conv).__name__ == "DNAConv":
            out = self.conv(torch.stack([h, h.relu()], 1), others["edge_index"])
        else:
            out = self.conv(h, **{name: value for name, value in others.items() if name in wanted})
        head: Tensor = self.head(F.elu(out[0] if isinstance(out, tuple) else out))
        return head


def build(name: str) -> tuple[nn.Module, Any]:
    """Return the network of a convolution, and a small graph with all that any convolution asks for."""
    from torch_geometric import nn as pyg

    cls = getattr(pyg, name)
    x, edges = graph()
    inputs = _inputs(x, edges)

    def make(width: int) -> nn.Module:
        torch.manual_seed(0)
        return ConvNet(cls(**_arguments(name, cls)), width)

    widths: tuple[int, ...] = (_OUT, _WIDTH, 4 * _OUT, 2 * _OUT, 3 * _OUT, 3 * _WIDTH, 2 * _WIDTH)
    if name in ("WLConvContinuous", "SimpleConv", "LGConv", "APPNP"):
        widths = (_WIDTH,)
    for width in widths:
        try:
            return first_that_runs([lambda width=width: make(width)], lambda model: [{"x": x, **inputs}])  # type: ignore[misc]
        except NotBuilt as error:
            last = error
    raise last


def _inputs(x: Tensor, edges: Tensor) -> dict[str, Tensor]:
    """Return the arguments of all convolutions by name. Weights of edges are positive."""
    types = torch.arange(EDGES) % 3
    return {
        "edge_index": edges, "hyperedge_index": edges, "pos_edge_index": edges[:, :20], "neg_edge_index": edges[:, 20:],
        "edge_type": types, "node_type": torch.arange(NODES) % 2, "edge_attr": noise(EDGES, _EDGE),
        "pos": noise(NODES, 3), "normal": F.normalize(noise(NODES, 3, seed=1), dim=1),
        "batch": torch.zeros(NODES, dtype=torch.int64),
    }  # fmt: skip


def _arguments(name: str, cls: type[nn.Module]) -> dict[str, Any]:
    """Return the arguments of a constructor: those that it requires, and heads."""
    from torch_geometric import nn as pyg

    special: dict[str, dict[str, Any]] = {
        "DirGNNConv": {"conv": pyg.GCNConv(_WIDTH, _OUT)}, "GPSConv": {"conv": pyg.GCNConv(_WIDTH, _WIDTH)},
        "EdgeConv": {"nn": _mlp(2 * _WIDTH, _OUT)}, "DynamicEdgeConv": {"nn": _mlp(2 * _WIDTH, _OUT), "k": 3},
        "GINConv": {"nn": _mlp(_WIDTH, _OUT)}, "GINEConv": {"nn": _mlp(_WIDTH, _OUT), "edge_dim": _EDGE},
        "NNConv": {"nn": _mlp(_EDGE, _WIDTH * _OUT)}, "PNAConv": {"deg": torch.tensor([0, 3, 4, 5, 1])},
        "PPFConv": {"local_nn": _mlp(_WIDTH + 4, 18), "global_nn": _mlp(18, _OUT)},
        "PointNetConv": {"local_nn": _mlp(_WIDTH + 3, 18), "global_nn": _mlp(18, _OUT)},
        "PointGNNConv": {"mlp_h": _mlp(_WIDTH, 3), "mlp_f": _mlp(_WIDTH + 3, 18), "mlp_g": _mlp(18, _WIDTH)},
    }  # fmt: skip
    found = dict(special.get(name, {}))
    for key, parameter in arguments_of(cls).items():
        wanted = parameter.default is parameter.empty or key in ("heads", "edge_dim")
        if wanted and key in _VALUES and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            found.setdefault(key, _VALUES[key])
    return {**found, **_OWN.get(name, {})}
