"""Stand-ins for the convolutions of PyTorch Geometric.

Their code reads the sizes from the attributes ``heads`` and ``out_channels``, which surgery lowers. Two numbers must
not change: the divisor of the mean over heads, and the scale of dot-product attention. A head that is zero adds
nothing to the mean, so removing it changes nothing if the divisor stays.
"""

from __future__ import annotations

from ._source import rewrite

_CONV = "torch_geometric.nn.conv"

_KEEP = {"averaged_heads": "heads"}

_MEAN = ("out.mean(dim=1)", 'out.sum(dim=1) / kept(self, "averaged_heads", self.heads)')


for _name in ("gat_conv.GATConv", "gatv2_conv.GATv2Conv"):
    rewrite(f"{_CONV}.{_name}", _MEAN, keep=_KEEP)


rewrite(
    f"{_CONV}.transformer_conv.TransformerConv",
    _MEAN,
    ("math.sqrt(self.out_channels)", 'math.sqrt(kept(self, "scaled_channels", self.out_channels))'),
    methods=("forward", "message"),
    keep={**_KEEP, "scaled_channels": "out_channels"},
)
