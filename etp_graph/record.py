"""The old place of :class:`etp_graph.surgery.SurgeryRecord`, for models that version 0.1.0 pickled whole."""

from __future__ import annotations

from etp_graph.surgery import Edit, get_record
from etp_graph.surgery import SurgeryRecord as Record

__all__ = ["Edit", "Record", "get_record"]
