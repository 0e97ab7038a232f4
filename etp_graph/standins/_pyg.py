"""Stand-ins for the convolutions of PyTorch Geometric.

Their code follows the attributes ``heads`` and ``out_channels``. Two numbers must not follow them: heads that are
averaged contribute a share of the mean each, and the scale of dot-product attention belongs to the trained weights.
A head that is zero contributes nothing to the mean, so removing it changes nothing as long as the others keep theirs.
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
