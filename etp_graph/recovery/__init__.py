"""Recover accuracy after surgery without training: compensation in closed form, batch norms measured anew."""

from __future__ import annotations

from ._batch_norms import reestimate_batch_norms_
from ._compensate import Compensation, LayerFit, compensate_

__all__ = ["Compensation", "LayerFit", "compensate_", "reestimate_batch_norms_"]
