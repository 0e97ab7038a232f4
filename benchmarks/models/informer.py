"""Informer (Zhou et al. 2021, arXiv 2012.07436): forecasts a long window of a series in one pass.

An encoder with ProbSparse self-attention and distilling convolutions, a generative decoder, and embeddings of value,
position and calendar. Layer names and layouts follow the paper; what eval mode computes is deterministic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class InformerConfig:
    """Sizes of an Informer; the defaults are the paper's for ETTh1 with a horizon of 24.

    Attributes:
        enc_in: variables of the encoder's series.
        dec_in: variables of the decoder's series.
        c_out: variables that are forecast.
        seq_len: steps that the encoder sees.
        label_len: known steps with which the decoder starts.
        pred_len: steps to forecast.
        d_model: width of the residual stream.
        n_heads: attention heads.
        e_layers: encoder layers.
        d_layers: decoder layers.
        d_ff: neurons of the feed-forward layers.
        factor: c of ProbSparse attention: c ln(L) keys are sampled, c ln(L) queries attend.
        distil: convolve and halve the series between encoder layers.
        d_time: calendar features of a step; 4: hour, day of the week, of the month, of the year.
    """

    enc_in: int = 7
    dec_in: int = 7
    c_out: int = 7
    seq_len: int = 48
    label_len: int = 48
    pred_len: int = 24
    d_model: int = 512
    n_heads: int = 8
    e_layers: int = 2
    d_layers: int = 1
    d_ff: int = 2048
    factor: int = 5
    distil: bool = True
    d_time: int = 4
    dropout: float = 0.05


def sampled_keys(queries: int, keys: int, count: int, *, random: bool, device: torch.device) -> Tensor:
    """Which keys each query looks at to measure its sparsity, [queries, count].

    Drawn anew while training, as in the paper; evenly spaced otherwise, from another start for every query, so that a
    trained network gives one answer.
    """
    if random:
        return torch.randint(keys, (queries, count), device=device)
    start = torch.arange(queries, device=device).unsqueeze(1)
    return (start + torch.arange(count, device=device) * keys // count) % keys


def prob_sparse(q: Tensor, k: Tensor, v: Tensor, *, scale: float, factor: int, causal: bool, random: bool) -> Tensor:
    """ProbSparse attention (section 3.1) of queries [batch, heads, L, d] to keys and values of the same shape.

    The u = c ln(L) queries whose scores on sampled keys differ most from uniform ones (M of eq. 4) attend to all keys;
    every other query gets the mean of the values, or their running sum if ``causal``.
    """
    length, steps = q.shape[-2], k.shape[-2]
    count = min(factor * math.ceil(math.log(steps + 1)), steps)
    active = min(factor * math.ceil(math.log(length + 1)), length)
    index = sampled_keys(length, steps, count, random=random, device=q.device)
    sampled = (q.unsqueeze(-2) * k[:, :, index]).sum(-1)
    sparsity = sampled.amax(-1) - sampled.sum(-1) / steps
    top = sparsity.topk(active, dim=-1, sorted=False).indices
    rows = top.unsqueeze(-1).expand(-1, -1, -1, q.shape[-1])
    scores = q.gather(2, rows) @ k.transpose(-2, -1) * scale
    if causal:
        later = torch.arange(steps, device=q.device) > top.unsqueeze(-1)
        scores = scores.masked_fill(later, -math.inf)
    lazy = v.cumsum(dim=-2) if causal else v.mean(dim=-2, keepdim=True).expand(-1, -1, length, -1)
    return lazy.scatter(2, rows, scores.softmax(dim=-1) @ v)


class Attention(nn.Module):
    """Multi-head attention: ProbSparse to the sequence itself, full to another one.

    ``num_heads`` and ``head_dim`` are attributes that the forward reads, so that both may become smaller; ``scale``
    stays what it was in training.
    """

    def __init__(self, config: InformerConfig, *, sparse: bool, causal: bool = False) -> None:
        super().__init__()
        self.num_heads = config.n_heads
        self.head_dim = config.d_model // config.n_heads
        inner = self.num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.factor, self.sparse, self.causal = config.factor, sparse, causal
        self.q_proj = nn.Linear(config.d_model, inner)
        self.k_proj = nn.Linear(config.d_model, inner)
        self.v_proj = nn.Linear(config.d_model, inner)
        self.out_proj = nn.Linear(inner, config.d_model)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Attention of ``x`` [batch, L, d_model] to ``memory`` [batch, S, d_model]."""
        q, k, v = self._split(self.q_proj(x)), self._split(self.k_proj(memory)), self._split(self.v_proj(memory))
        if self.sparse:
            out = prob_sparse(q, k, v, scale=self.scale, factor=self.factor, causal=self.causal, random=self.training)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale)
        joined = out.transpose(1, 2).reshape(*x.shape[:2], self.num_heads * self.head_dim)
        projected: Tensor = self.out_proj(joined)
        return projected

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: InformerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.d_ff)
        self.fc2 = nn.Linear(config.d_ff, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.dropout(F.gelu(self.fc1(x))))
        return out


class Distil(nn.Module):
    """Halves a series: MaxPool(ELU(Conv1d(x))) along time (eq. 5), with batch norm as in the authors' code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm1d(width)
        self.pool = nn.MaxPool1d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, L, width] to [batch, (L + 1) // 2, width]."""
        out: Tensor = self.pool(F.elu(self.norm(self.conv(x.transpose(1, 2)))))
        return out.transpose(1, 2)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with a residual connection and a norm after it."""

    def __init__(self, config: InformerConfig) -> None:
        super().__init__()
        self.attention = Attention(config, sparse=True)
        self.feed_forward = FeedForward(config)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attention(x, x)))
        out: Tensor = self.norm2(x + self.dropout(self.feed_forward(x)))
        return out


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder, feed-forward."""

    def __init__(self, config: InformerConfig) -> None:
        super().__init__()
        self.attention = Attention(config, sparse=True, causal=True)
        self.cross_attention = Attention(config, sparse=False)
        self.feed_forward = FeedForward(config)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.norm3 = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attention(x, x)))
        x = self.norm2(x + self.dropout(self.cross_attention(x, memory)))
        out: Tensor = self.norm3(x + self.dropout(self.feed_forward(x)))
        return out


class Embedding(nn.Module):
    """Values by a circular convolution, calendar by a linear layer, positions by sines (appendix B)."""

    positions: Tensor

    def __init__(self, config: InformerConfig, variables: int, length: int) -> None:
        super().__init__()
        self.values = nn.Conv1d(variables, config.d_model, 3, padding=1, padding_mode="circular", bias=False)
        self.calendar = nn.Linear(config.d_time, config.d_model, bias=False)
        self.register_buffer("positions", _sines(length, config.d_model), persistent=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[batch, L, d_model] of values [batch, L, variables] and calendar features [batch, L, d_time]."""
        values = self.values(x.transpose(1, 2)).transpose(1, 2)
        out: Tensor = self.dropout(values + self.calendar(time) + self.positions[: x.shape[1]])
        return out


class Informer(nn.Module):
    """Encoder and decoder; the decoder starts with the last ``label_len`` known steps and zeros for the future."""

    def __init__(self, config: InformerConfig) -> None:
        super().__init__()
        self.config = config
        self.enc_embedding = Embedding(config, config.enc_in, config.seq_len)
        self.dec_embedding = Embedding(config, config.dec_in, config.label_len + config.pred_len)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.e_layers))
        halvings = config.e_layers - 1 if config.distil else 0
        self.distil = nn.ModuleList(Distil(config.d_model) for _ in range(halvings))
        self.encoder_norm = nn.LayerNorm(config.d_model)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.d_layers))
        self.decoder_norm = nn.LayerNorm(config.d_model)
        self.projection = nn.Linear(config.d_model, config.c_out)

    def forward(self, x_enc: Tensor, time_enc: Tensor, x_dec: Tensor, time_dec: Tensor) -> Tensor:
        """The forecast [batch, pred_len, c_out].

        Args:
            x_enc: the past, [batch, seq_len, enc_in].
            time_enc: its calendar features, [batch, seq_len, d_time].
            x_dec: the last known steps, then zeros, [batch, label_len + pred_len, dec_in].
            time_dec: their calendar features, [batch, label_len + pred_len, d_time].
        """
        memory = self.enc_embedding(x_enc, time_enc)
        for i, layer in enumerate(self.encoder):
            memory = layer(memory)
            if i < len(self.distil):
                memory = self.distil[i](memory)
        memory = self.encoder_norm(memory)
        x = self.dec_embedding(x_dec, time_dec)
        for layer in self.decoder:
            x = layer(x, memory)
        out: Tensor = self.projection(self.decoder_norm(x))
        return out[:, -self.config.pred_len :]


def _sines(length: int, width: int) -> Tensor:
    """Sines and cosines of geometrically spaced wavelengths, [length, width] (Vaswani et al. 2017)."""
    angle = torch.arange(length).unsqueeze(1) * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]
