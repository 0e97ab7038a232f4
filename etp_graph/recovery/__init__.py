"""Recover accuracy after surgery without training: compensation in closed form, batch norms measured anew."""

from __future__ import annotations

from ._batch_norms import reestimate_batch_norms_
from ._compensate import Compensation, InputMoments, LayerFit, compensate_, input_moments

__all__ = ["Compensation", "InputMoments", "LayerFit", "compensate_", "input_moments", "reestimate_batch_norms_"]
