"""The architectures of open_clip with two layers in each tower."""

from __future__ import annotations

import copy
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from benchmarks.models.entry import noise, tokens

from ._common import first_that_runs

PACKAGE = "open_clip_torch"


@cache
def names() -> list[str]:
    """Return one name of each kind of towers, of those that need no files from a hub."""
    if find_spec("open_clip") is None:
        return []
    open_clip = import_module("open_clip")

    found: dict[tuple[Any, ...], str] = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if "hf_model_name" not in config["text_cfg"]:
            found.setdefault(_kind(config), name)
    return sorted(found.values())


def _kind(config: dict[str, Any]) -> tuple[Any, ...]:
    """Return what sets the code that runs: the options of the towers without their sizes."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    towers = [tuple(sorted(k for k, v in part.items() if not isinstance(v, int) or isinstance(v, bool)))
              for part in (vision, text)]  # fmt: skip
    return (*towers, "multimodal_cfg" in config, isinstance(vision.get("layers"), list))


def family(name: str) -> str:
    """Return the family of the page."""
    return "open_clip"


def build(name: str) -> tuple[nn.Module, Any]:
    """Return the model with an image and a text of its length."""
    open_clip = import_module("open_clip")

    config = copy.deepcopy(open_clip.get_model_config(name))
    vision, text = config["vision_cfg"], config["text_cfg"]
    vision["layers"] = [1] * 4 if isinstance(vision.get("layers"), list) else 2
    text["layers"], text["vocab_size"] = 2, 128
    cls = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CLIP
    if config.pop("custom_text", False) and cls is open_clip.CLIP:
        cls = open_clip.CustomTextCLIP
    size = vision.get("image_size", 224)
    size = size if isinstance(size, int) else size[0]
    ids = tokens(1, text.get("context_length", 77), vocabulary=100)
    return first_that_runs([lambda: cls(**config)], lambda model: [(noise(1, 3, size, size), ids)])
