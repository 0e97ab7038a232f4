"""Stand-ins for modules of transformers that cannot be traced, or that cannot run with fewer units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etp_graph.model import unit_mean

from ._source import overrides, rewrite

_MODELS = "transformers.models"


def _beit_bias(module: Any, window_size: Any, *_: Any, **__: Any) -> Tensor:
    """Return BEiT's position biases without interpolation, which has no effect at the image size of training."""
    index = module.generate_relative_position_index(window_size)
    n = window_size[0] * window_size[1] + 1
    bias: Tensor = module.relative_position_bias_table[index.view(-1)].view(n, n, -1)
    return bias.permute(2, 0, 1).contiguous().unsqueeze(0)


for _family, _name in (("beit", "Beit"), ("data2vec", "Data2VecVision")):
    overrides(
        f"{_MODELS}.{_family}.modeling_{'data2vec_vision' if _family == 'data2vec' else _family}"
        f".{_name}RelativePositionBias",
        view=True,
        forward=_beit_bias,
    )


rewrite(
    f"{_MODELS}.blip.modeling_blip.BlipAttention",
    ("embed_dim // self.num_heads", "self.head_dim"),
    ("context_layer.size()[:-2] + (self.embed_dim,)", "context_layer.size()[:-2] + (-1,)"),
)


rewrite(
    f"{_MODELS}.phi3.modeling_phi3.Phi3Attention",
    ("self.config.num_attention_heads * self.head_dim", "self.o_proj.in_features"),
    ("self.num_key_value_heads * self.head_dim", "(qkv.shape[-1] - query_pos) // 2"),
)


for _model, _class in (
    ("mpnet.modeling_mpnet", "MPNetSelfAttention"),
    ("blip.modeling_blip_text", "BlipTextSelfAttention"),
):
    rewrite(
        f"{_MODELS}.{_model}.{_class}",
        ("math.sqrt(self.attention_head_size)", 'math.sqrt(kept(self, "scaled_size", self.attention_head_size))'),
        keep={"scaled_size": "attention_head_size"},
    )


rewrite(
    f"{_MODELS}.deberta_v2.modeling_deberta_v2.DisentangledSelfAttention",
    *((f"scaled_size_sqrt({_layer}, scale_factor)",
       'torch.sqrt(torch.tensor(kept(self, "scaled_size", self.attention_head_size) * scale_factor))')
      for _layer in ("query_layer", "pos_key_layer", "pos_query_layer")),
    methods=("forward", "disentangled_attention_bias"),
    keep={"scaled_size": "attention_head_size"},
)  # fmt: skip


rewrite(
    f"{_MODELS}.deberta.modeling_deberta.DisentangledSelfAttention",
    *((f"scaled_size_sqrt({_layer}, scale_factor)",
       'torch.sqrt(torch.tensor(kept(self, "scaled_size", self.attention_head_size) * scale_factor))')
      for _layer in ("query_layer", "pos_query_layer")),
    methods=("forward", "disentangled_att_bias"),
    keep={"scaled_size": "attention_head_size"},
)  # fmt: skip


rewrite(
    f"{_MODELS}.segformer.modeling_segformer.SegformerSequenceReduction",
    ("hidden_states.reshape(batch_size, num_channels, -1)", "hidden_states.flatten(2)"),
)


def _response_norm(module: Any, x: Tensor) -> Tensor:
    """Apply the global response normalisation of ConvNeXt-V2 to x [batch, height, width, channels]."""
    size = torch.linalg.vector_norm(x, ord=2, dim=(1, 2), keepdim=True)
    relative = size / (unit_mean(size, -1, module.weight) + 1e-6)
    found: Tensor = module.weight * (x * relative) + module.bias + x
    return found


overrides(f"{_MODELS}.convnextv2.modeling_convnextv2.ConvNextV2GRN", view=True, forward=_response_norm)
