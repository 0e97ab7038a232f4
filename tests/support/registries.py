"""Registries of the library as they are without what a test registers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from etp_graph import criteria, forces, methods, schedules
from etp_graph.plan import QUANTITIES


@contextmanager
def temporary_entries() -> Iterator[None]:
    """Remove what is registered inside of the block when it ends, in every registry."""
    with ExitStack() as stack:
        stack.enter_context(criteria.temporary())
        for registry in (forces.FORCES, schedules.SCHEDULES, methods.METHODS, QUANTITIES):
            stack.enter_context(registry.temporary())
        yield
