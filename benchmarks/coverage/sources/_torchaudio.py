"""Models of torchaudio, where it is installed."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ._common import first_that_runs

PACKAGE = "torchaudio"


def names() -> list[str]:
    """Return its models for spectra and waves."""
    return ["wav2letter", "deepspeech", "conformer", "conv_tasnet"] if find_spec("torchaudio") is not None else []


def family(name: str) -> str:
    """Return the family of the page."""
    return "torchaudio"


def build(name: str) -> tuple[nn.Module, Any]:
    """Return a small version of the model."""
    models = import_module("torchaudio.models")

    makers = {
        "wav2letter": (lambda: models.Wav2Letter(num_classes=9, num_features=20), torch.randn(1, 20, 60)),
        "deepspeech": (lambda: models.DeepSpeech(20, n_hidden=48, n_class=9), torch.randn(1, 1, 30, 20)),
        "conformer": (lambda: models.Conformer(48, 4, 80, 2, 7), (torch.randn(1, 30, 48), torch.tensor([30]))),
        "conv_tasnet": (
            lambda: models.ConvTasNet(
                enc_num_feats=48,
                msk_num_feats=24,
                msk_num_hidden_feats=40,
                msk_num_layers=2,
                msk_num_stacks=2,
            ),
            torch.randn(1, 1, 600),
        ),
    }
    make, inputs = makers[name]
    return first_that_runs([make], lambda model: [inputs])
