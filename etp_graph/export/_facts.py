"""Sizes that a configuration decides: shapes of tensors, and the sizes of heads in attributes of modules."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
from torch import nn

from etp_graph.model import all_tensors, persistent_names

Fact = tuple[str, int | str]
"""Name of a tensor and an axis, or name of a module and an attribute."""

Facts = dict[Fact, int]

_HEAD_SIZE = re.compile(r"head_(dim|size)$|^key_value_proj_dim$|^d_kv$")
"""Attributes of modules with the number of dimensions of a head, which shapes alone do not tell."""

_BROKEN = (ValueError, TypeError, AttributeError, RuntimeError, AssertionError, ZeroDivisionError, KeyError, IndexError)
"""What the classes of transformers raise for sizes that they cannot have."""


def build_skeleton(model_class: type[nn.Module], config: Any) -> nn.Module:
    """Build a model on the meta device, without values, from a copy of the configuration."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model_class(copy.deepcopy(config))


def read_facts(model: nn.Module) -> Facts:
    """Return the shapes of parameters and stored buffers, and the head sizes of modules."""
    stored = persistent_names(model)
    found: Facts = {
        (name, axis): size
        for name, tensor in all_tensors(model).items() if name in stored
        for axis, size in enumerate(tensor.shape)
    }  # fmt: skip
    for name, module in model.named_modules():
        found.update({(name, key): v for key, v in vars(module).items() if type(v) is int and _HEAD_SIZE.search(key)})
    return found


def facts_of(model_class: type[nn.Module], config: Any) -> Facts | str:
    """Return the sizes of the model that a configuration describes, or why the class refuses it."""
    try:
        return read_facts(build_skeleton(model_class, config))
    except _BROKEN as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def fact_text(fact: Fact) -> str:
    """Return a fact as text: a tensor with its axis, or the attribute of a module."""
    name, place = fact
    return f"axis {place} of {name}" if isinstance(place, int) else f"{name}.{place}"


def pattern(fact: Fact) -> tuple[str, int | str]:
    """Return the fact without the numbers of layers: equal for the same place in all layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", fact[0]), fact[1]
