"""Forecasters of time series: the Informer of the paper, and those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.entry import Entry, Inputs, entry, noise
from benchmarks.models.huggingface import Row, from_config
from benchmarks.models.informer import Informer, InformerConfig

SMALL = InformerConfig(
    enc_in=5, dec_in=6, c_out=3, seq_len=24, label_len=10, pred_len=8, d_model=48, n_heads=4, d_ff=80, factor=2
)
"""All widths differ, and fewer queries attend (2 ln 24) than there are."""

INFORMERS: dict[str, InformerConfig] = {
    "informer": SMALL,
    "informer_3_layers": InformerConfig(
        enc_in=5, dec_in=6, c_out=3, seq_len=24, label_len=10, pred_len=8, d_model=48, n_heads=6, d_ff=80, factor=2,
        e_layers=3, d_layers=2,
    ),
    "informer_no_distil": InformerConfig(
        enc_in=5, dec_in=6, c_out=3, seq_len=24, label_len=10, pred_len=8, d_model=48, n_heads=4, d_ff=80, factor=2,
        distil=False,
    ),
    "informer_etth1": InformerConfig(),
}  # fmt: skip


def informer_inputs(config: InformerConfig, *, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Past and calendar, then known steps followed by zeros and their calendar: what an Informer's forward takes."""
    steps = config.label_len + config.pred_len
    known = noise(batch, config.label_len, config.dec_in, seed=2)
    x_dec = torch.cat([known, torch.zeros(batch, config.pred_len, config.dec_in)], dim=1)
    past = noise(batch, config.seq_len, config.enc_in)
    return past, noise(batch, config.seq_len, config.d_time, seed=1), x_dec, noise(batch, steps, config.d_time, seed=3)


def _past() -> dict[str, Tensor]:
    return {"past_values": noise(2, 40, 5)}


def _past_and_future() -> dict[str, Any]:
    """Windows of 24 steps with lags of up to 7, and 8 steps to forecast."""
    return {
        "past_values": noise(2, 31, 5), "past_time_features": noise(2, 31, 3, seed=1),
        "past_observed_mask": torch.ones(2, 31, 5), "future_values": noise(2, 8, 5, seed=2),
        "future_time_features": noise(2, 8, 3, seed=3), "use_cache": False,
    }  # fmt: skip


_PATCHES = {
    "num_input_channels": 5, "context_length": 40, "patch_length": 8, "patch_stride": 4, "prediction_length": 6,
    "d_model": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 80,
}  # fmt: skip
_SERIES = {
    "input_size": 5, "context_length": 24, "prediction_length": 8, "lags_sequence": [1, 2, 7], "num_time_features": 3,
    "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 80, "decoder_ffn_dim": 92,
}  # fmt: skip

TRANSFORMERS: dict[str, Row] = {
    "patchtst": ("PatchTSTForPrediction", _PATCHES, _past),
    "patchtst_classifier": ("PatchTSTForClassification", {**_PATCHES, "num_targets": 3, "use_cls_token": True}, _past),
    "informer": ("InformerForPrediction", {**_SERIES, "sampling_factor": 2}, _past_and_future),
    "informer_full": ("InformerForPrediction", {**_SERIES, "attention_type": "full"}, _past_and_future),
    "time_series_transformer": ("TimeSeriesTransformerForPrediction", _SERIES, _past_and_future),
}  # fmt: skip


def entries() -> Iterator[Entry]:
    """Our Informers, then the models of transformers, if it is installed."""
    for name, config in INFORMERS.items():
        yield entry(name, "forecasting", _informer(config), _informer_inputs(config))
    if find_spec("transformers") is not None:
        for name, (cls, settings, inputs) in TRANSFORMERS.items():
            yield entry(f"hf:{name}", "forecasting", from_config(cls, settings), inputs)


def _informer(config: InformerConfig) -> Callable[[], nn.Module]:
    return lambda: Informer(config)


def _informer_inputs(config: InformerConfig) -> Inputs:
    return lambda: informer_inputs(config)
