"""Raise an exception at the n-th operation of a call, as Ctrl-C or a lack of memory would."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import etp_graph

ROOT = Path(etp_graph.__file__).parent


class Interrupting:
    """Count the lines that run in the library's files, and raise at one of them.

    Args:
        error: the exception to raise.
        at: number of the line, counted from 0; -1: only count.
        parts: files and packages of the library whose lines count.
    """

    def __init__(self, error: type[BaseException], at: int = -1, parts: Sequence[str] = ("",)) -> None:
        self.error, self.at, self.lines = error, at, 0
        self._files = tuple(str(ROOT / part) for part in parts)

    def __enter__(self) -> Interrupting:
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename.startswith(self._files) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line":
            self.lines += 1
            if self.lines == self.at + 1:
                raise self.error
        return self._line


def count_lines(action: Callable[[], object], parts: Sequence[str] = ("",)) -> int:
    """Return how many lines of the library an action runs."""
    with Interrupting(KeyboardInterrupt, parts=parts) as counted:
        action()
    return counted.lines
