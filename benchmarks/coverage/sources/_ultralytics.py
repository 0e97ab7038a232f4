"""Every model description of ultralytics, at its smallest scale."""

from __future__ import annotations

import contextlib
import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from ._common import first_that_runs, square_images

PACKAGE = "ultralytics"
os.environ.setdefault("YOLO_VERBOSE", "False")


@cache
def names() -> list[str]:
    """Return the names of the YAML files that describe models."""
    found = find_spec("ultralytics")
    if found is None or found.origin is None:
        return []
    return sorted(file.stem for file in (Path(found.origin).parent / "cfg" / "models").rglob("*.yaml"))


def family(name: str) -> str:
    """Return the family of the page."""
    return "ultralytics"


def build(name: str) -> tuple[nn.Module, Any]:
    """Return the network with an image of 64 or 128 pixels."""
    ultralytics = import_module("ultralytics")

    def make() -> nn.Module:
        model: nn.Module = (ultralytics.RTDETR if name.startswith("rtdetr") else ultralytics.YOLO)(f"{name}.yaml").model
        return model

    with contextlib.redirect_stdout(None):
        return first_that_runs([make], lambda model: square_images([64, 128]))
