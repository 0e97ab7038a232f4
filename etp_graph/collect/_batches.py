"""Say which batch a model does not run on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from etp_graph.errors import EtpError, ScoreError


@contextmanager
def naming_batch(number: int) -> Iterator[None]:
    """Context of a run of batch ``number``, counted from 1. An error of the model becomes a :class:`ScoreError`."""
    try:
        yield
    except EtpError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        raise ScoreError(
            f"batch {number}: the model does not run on it ({type(error).__name__}: {str(error)[:200]}). Pass what the "
            "model takes: a tensor, a tuple of arguments or a dict of keyword arguments, and tokens of its vocabulary."
        ) from error
