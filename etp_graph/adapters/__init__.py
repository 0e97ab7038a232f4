"""The old place of :mod:`etp_graph.standins`, for models that version 0.1.0 pickled whole."""

from __future__ import annotations

from etp_graph.standins import unpickled_instance as _instance

__all__ = ["_instance"]
