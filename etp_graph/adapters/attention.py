"""The old place of the stand-in of ``nn.MultiheadAttention``, for models that version 0.1.0 pickled whole."""

from __future__ import annotations

from etp_graph.standins import MultiheadAttention

__all__ = ["MultiheadAttention"]
