"""The smallest member of every family of timm. A family is a module of ``timm.models``."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import nn

from ._common import first_that_runs, square_images

PACKAGE = "timm"
_SMALL = (
    "atto",
    "femto",
    "pico",
    "nano",
    "zepto",
    "xxs",
    "xx_small",
    "mini",
    "xs",
    "x_small",
    "tiny",
    "micro",
    "s",
    "small",
    "xxt",
    "t",
)
"""Words of names of small members, the smallest first."""


@cache
def names() -> list[str]:
    """Return one name of each family."""
    if find_spec("timm") is None:
        return []
    import timm

    found = []
    for module in timm.list_modules():
        members = [name for name in timm.list_models(module=module) if not name.startswith("test_")]
        if members:
            found.append(min(members, key=_size_rank))
    return sorted(set(found))


def _size_rank(name: str) -> tuple[int, float, int]:
    """Return a key that is small for names of small models: a word for small, then the numbers in the name."""
    words = re.split(r"[_.]", name)
    rank = min(
        (i for i, word in enumerate(_SMALL) if word in words or word in name[len(words[0]) :]), default=len(_SMALL)
    )
    numbers = [float(n) for n in re.findall(r"\d+", name)]
    return rank, sum(numbers), len(name)


def family(name: str) -> str:
    """Return the family of the page."""
    return "timm"


def build(name: str) -> tuple[nn.Module, Any]:
    """Return the model with images of 64, 96 or 128 pixels, or of the size that it was designed for."""
    import timm

    config: Any = timm.get_pretrained_cfg(name)
    _, height, _ = config.input_size

    def make() -> nn.Module:
        model: nn.Module = timm.create_model(name, pretrained=False)
        return model

    return first_that_runs(
        [make], lambda model: square_images([height] if config.fixed_input_size else [64, 96, 128, 160, height])
    )
