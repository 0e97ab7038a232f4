"""Recover accuracy after surgery without training: compensation in closed form, batch norms measured anew."""

from __future__ import annotations

from ._batch_norms import prepare_batch_norms, reestimate_batch_norms_
from ._compensate import Compensation, InputMoments, LayerFit, compensate_, input_moments, prepare_compensation

__all__ = [
    "Compensation",
    "InputMoments",
    "LayerFit",
    "compensate_",
    "input_moments",
    "prepare_batch_norms",
    "prepare_compensation",
    "reestimate_batch_norms_",
]
