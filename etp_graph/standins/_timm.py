"""Stand-ins for modules of timm with hand-written norms, fixed widths, or cached tensors of the size before surgery."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etp_graph.model import unit_mean

from ._source import overrides, rewrite


def _response_norm(module: Any, x: Tensor) -> Tensor:
    """Apply global response normalisation, with channels at ``module.channel_dim``."""
    size = x.norm(p=2, dim=module.spatial_dim, keepdim=True)
    relative = size / (unit_mean(size, module.channel_dim, module.weight) + module.eps)
    weight, bias = module.weight.view(module.wb_shape), module.bias.view(module.wb_shape)
    return x + torch.addcmul(bias, weight, x * relative)


overrides("timm.layers.grn.GlobalResponseNorm", view=True, forward=_response_norm)


def _biases(module: Any, *_: Any) -> Tensor:
    """Look up the position biases again, because a cached table has the number of heads before surgery."""
    found: Tensor = module.attention_biases[:, module.attention_bias_idxs]
    return found


for _name in (
    "levit.Attention", "levit.AttentionDownsample", "tiny_vit.Attention", "efficientformer.Attention",
    "efficientformer_v2.Attention2d", "efficientformer_v2.Attention2dDownsample",
    "efficientvit_msra.CascadedGroupAttention",
):  # fmt: skip
    overrides(f"timm.models.{_name}", get_attention_biases=_biases)


rewrite(
    "timm.models.twins.GlobalSubSampleAttn",
    ("reshape(B, N, self.num_heads, C // self.num_heads)", "reshape(B, N, self.num_heads, -1)"),
    ("2, self.num_heads, C // self.num_heads)", "2, self.num_heads, self.kv.out_features // 2 // self.num_heads)"),
    ("reshape(B, C, -1)", "flatten(2)"),
    ("reshape(B, N, C)", "reshape(B, N, -1)"),
)


rewrite(
    "timm.models.pvt_v2.Attention",
    ("reshape(B, C, -1)", "flatten(2)"),
    ("reshape(B, N, C)", "reshape(B, N, -1)"),
)
