"""Stand-ins for attention modules whose own code cannot run with fewer heads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._registry import register_standin
from ._source import rewrite
from ._source import value_before_surgery as kept


@register_standin(nn.MultiheadAttention)
class MultiheadAttention(nn.MultiheadAttention):
    """Attention of PyTorch for any number of heads, with the results of the original.

    The original computes the size of a head as ``embed_dim // num_heads``; this class uses the attribute ``head_dim``.
    Surgery does not change the scale of the scores, nor the weight of each head in the averaged attention weights.
    """

    etp_keeps: ClassVar = {"scaled_dim": "head_dim", "averaged_heads": "num_heads"}

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Return False, so that PyTorch's encoder layers do not use their fused operator.

        That operator supports square projections only.
        """
        return False

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what :meth:`torch.nn.MultiheadAttention.forward` computes, for any number of heads."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in self._project(query, key, value)
        )
        mask = _joined(attn_mask, key_padding_mask, q, k)
        out, weights = self._attend(q, k, v, mask, need_weights)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = self._average(weights, mask)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return queries, keys and values, [batch, positions, heads * dimensions] each."""
        bias = self.in_proj_bias
        biases = (None, None, None) if bias is None else bias.chunk(3)
        if self.in_proj_weight is not None:
            weights: Any = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        found = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        for i, extra in ((1, self.bias_k), (2, self.bias_v)):
            if extra is not None:
                found[i] = torch.cat([found[i], extra.expand(found[i].shape[0], 1, extra.shape[-1])], 1)
            if self.add_zero_attn:
                found[i] = F.pad(found[i], (0, 0, 0, 1))
        return found

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the context [batch, heads, positions, dimensions] and, if needed, the attention weights."""
        dropout = self.dropout if self.training else 0.0
        scale = kept(self, "scaled_dim", self.head_dim) ** -0.5
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale), None
        scores = q @ k.transpose(-2, -1) * scale
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout, self.training)
        return weights @ v, weights

    def _average(self, weights: Tensor, mask: Tensor | None) -> Tensor:
        """Return the mean [batch, positions, keys] of the attention weights over the heads before surgery.

        The scores of a removed head are zero, so that it attends to all keys alike that its mask lets through.
        """
        total = kept(self, "averaged_heads", self.num_heads)
        gone, found = total - int(self.num_heads), weights.sum(1)
        if gone:
            scores = weights.new_zeros(len(weights), 1, *weights.shape[2:]) if mask is None else mask
            found = found + gone * scores.softmax(-1).mean(1)
        averaged: Tensor = found / total
        return averaged


def _joined(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Join both masks to one that is added to the scores, [batch or 1, heads or 1, positions, keys]."""
    batch, n_keys = q.shape[0], k.shape[2]
    parts = []
    if attn_mask is not None:
        mask = _additive(attn_mask, q)
        parts.append(mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, -1)))
    if key_padding_mask is not None:
        parts.append(_additive(key_padding_mask, q)[:, None, None])
    if not parts:
        return None
    parts = [F.pad(part, (0, n_keys - part.shape[-1])) for part in parts]  # entries that bias_k and add_zero_attn add
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(mask, float("-inf"))


for _name in ("ShiftedWindowAttention", "ShiftedWindowAttentionV2"):
    rewrite(
        f"torchvision.models.swin_transformer.{_name}",
        ("num_heads, C // num_heads)", "num_heads, -1)"),
        ("(C // num_heads) ** -0.5", "q.shape[-1] ** -0.5"),
        ("reshape(x.size(0), x.size(1), C)", "reshape(x.size(0), x.size(1), -1)"),
        ("qkv_bias = qkv_bias.clone()", "q_bias, k_bias, v_bias = qkv_bias.chunk(3)"),
        ("length = qkv_bias.numel() // 3", "qkv_bias = torch.cat([q_bias, torch.zeros_like(k_bias), v_bias])"),
        ("qkv_bias[length : 2 * length].zero_()", "pass"),
        functions=("shifted_window_attention",),
    )
