"""Every configuration of transformers that can be built small, with the class of its most telling head."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ._common import NotBuilt, first_that_runs
from ._transformers_inputs import inputs_of
from ._transformers_sizes import LEVELS, shrunken

PACKAGE = "transformers"
_HEADS = (
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "CAUSAL_LM",
    "SEQUENCE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION", "CTC", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION", "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "INSTANCE_SEGMENTATION", "DEPTH_ESTIMATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "ZERO_SHOT_OBJECT_DETECTION", "TOKEN_CLASSIFICATION", "VISUAL_QUESTION_ANSWERING",
    "TIME_SERIES_PREDICTION", "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM", "KEYPOINT_DETECTION", "KEYPOINT_MATCHING",
    "MASK_GENERATION", "MULTIMODAL_LM", "IMAGE_TO_IMAGE", "",
)  # fmt: skip
"""Tasks of the auto classes, the preferred one first; the last are the models without a head."""


@cache
def names() -> list[str]:
    """Return the model types that have a class of a task or a base class."""
    if find_spec("transformers") is None:
        return []
    auto = import_module("transformers.models.auto.configuration_auto")

    with_class = {name for head in _HEADS for name in _mapping(head)}
    return sorted(set(auto.CONFIG_MAPPING_NAMES) & with_class)


def family(name: str) -> str:
    """Return the family of the page: the first task with a class for the model."""
    task = next(head for head in _HEADS if name in _mapping(head))
    return f"transformers, {task.lower().replace('_', ' ') or 'base models'}"


def build(name: str) -> tuple[nn.Module, Any]:
    """Return the model with the smallest widths that its class takes.

    Raises:
        NotBuilt: no class of the configuration could be built and run.
    """
    transformers = import_module("transformers")

    transformers.logging.set_verbosity_error()
    said = []
    for head in [head for head in _HEADS if name in _mapping(head)][:3]:
        found = _mapping(head)[name]
        for cls_name in [found] if isinstance(found, str) else list(found):
            cls = getattr(transformers, cls_name, None)
            if cls is None:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    return first_that_runs(_makers(cls, name), inputs_of)
                except NotBuilt as error:
                    said.append(f"{cls_name}: {error}")
    raise NotBuilt(" || ".join(said) or "no class can be imported")


def _makers(cls: Any, name: str) -> Iterator[Callable[[], nn.Module]]:
    """Yield functions that build the class with small widths, with few layers, and as it is."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_cls = CONFIG_MAPPING[name]
    for level in LEVELS:
        yield partial(_make, cls, config_cls, level)


def _make(cls: Any, config_cls: Any, level: str) -> nn.Module:
    """Build the class. A version of full width is first built on the meta device, because it may not fit."""
    if level not in LEVELS[:3]:
        with torch.device("meta"):
            cls(shrunken(config_cls(), level))
    model: nn.Module = cls(shrunken(config_cls(), level))
    return model


@cache
def _mapping(head: str) -> dict[str, Any]:
    """Return model type -> name or names of the class, of a task."""
    from transformers.models.auto import modeling_auto

    name = f"MODEL_FOR_{head}_MAPPING_NAMES" if head else "MODEL_MAPPING_NAMES"
    return dict(getattr(modeling_auto, name, {}))
