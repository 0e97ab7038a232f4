"""Recover accuracy after surgery: compensation in closed form, batch norms measured anew, distillation in training."""

from __future__ import annotations

from ._batch_norms import prepare_batch_norms, reestimate_batch_norms_
from ._compensate import NewWeights, compensate_, input_moments, prepare_compensation
from ._distillation import Distillation
from ._fit import Compensation, LayerFit, fit_readers, lossy_axes
from ._record import InputMoments, record_inputs

__all__ = [
    "Compensation",
    "Distillation",
    "InputMoments",
    "LayerFit",
    "NewWeights",
    "compensate_",
    "fit_readers",
    "input_moments",
    "lossy_axes",
    "prepare_batch_norms",
    "prepare_compensation",
    "record_inputs",
    "reestimate_batch_norms_",
]
