"""Find the line of a model's code that runs, or that failed."""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
from functools import cache
from pathlib import Path
from traceback import walk_tb
from types import FrameType

import torch

from ._run import run_model

_MODEL_STARTS = run_model.__code__

_THROUGH = (Path(torch.__file__).parent, Path(__file__).parents[1])
"""Folders of PyTorch and of this library."""

_STANDARD = sysconfig.get_path("stdlib") + os.sep

_REWRITING = ("einops", "opt_einsum")
"""Libraries that only write PyTorch's operators in another way, so that the line which calls them says more."""


def running_line() -> str | None:
    """Return the innermost running line of the model's code, such as ``modeling_llama.py:231``.

    Code of PyTorch, of Python itself, of this library and of libraries that only rewrite operators is passed over.
    Return ``None`` if no model runs, or if it has no code of its own, like a sequence of PyTorch's layers.
    """
    found: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _MODEL_STARTS:
        if found is None and _short_name(frame.f_code.co_filename):
            found = frame
        frame = frame.f_back
    return None if frame is None or found is None else f"{_short_name(found.f_code.co_filename)}:{found.f_lineno}"


def failing_line(error: BaseException) -> tuple[str, str] | None:
    """Return the innermost line of the model's code that an exception left, as ``net.py:12``, and its source.

    If the exception did not pass through the model's own code, return the line that raised it. Return ``None`` if
    this library raised it, or if it was not raised.
    """
    frames = list(walk_tb(error.__traceback__))
    starts = [at for at, (frame, _) in enumerate(frames) if frame.f_code is _MODEL_STARTS]
    inside = frames[starts[-1] if starts else 0 :]
    own = [(frame, number) for frame, number in inside if _short_name(frame.f_code.co_filename)]
    if not frames:
        return None
    frame, number = (own or frames)[-1]
    file = frame.f_code.co_filename
    if Path(file).is_relative_to(_THROUGH[1]):
        return None
    return f"{_short_name(file) or Path(file).name}:{number}", linecache.getline(file, number).strip()


@cache
def _short_name(file: str) -> str | None:
    """Return the name of a file of the model's code, or ``None`` for a file that is passed over.

    The name is the same on every machine. A package's ``__init__.py`` is named with its folder.
    """
    path = Path(file)
    installed = next((i for i, part in enumerate(path.parts) if part in ("site-packages", "dist-packages")), None)
    if any(path.is_relative_to(folder) for folder in _THROUGH) or file.startswith("<frozen "):
        return None
    if installed is None and file.startswith(_STANDARD):
        return None
    if installed is not None and path.parts[installed + 1].partition(".")[0] in _REWRITING:
        return None
    if file.startswith("<eval_with_key>"):
        return "GraphModule.code"  # torch.fx numbers its sources
    name = "/".join(path.parts[-2:]) if path.name == "__init__.py" else path.name
    return name.replace("(", "[").replace(")", "]")
