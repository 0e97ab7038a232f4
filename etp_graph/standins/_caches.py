"""Let the caches of a pruned model of transformers follow the number of its heads."""

from __future__ import annotations

from torch import nn

_SHAPE = "_get_static_cache_init_shape"
"""Method of transformers' generation that reads heads and their size from the configuration, for a static cache."""


def no_shape_from_config() -> None:
    """Return that the configuration does not tell the shape of a static cache.

    The cache then takes its shape from the first keys and values, as it does without chunks in the prefill.
    """


def size_caches_by_keys_(model: nn.Module) -> None:
    """Keep a pruned model from allocating caches by its configuration, which describes the dense model."""
    for module in model.modules():
        if hasattr(type(module), _SHAPE):
            module.__dict__[_SHAPE] = no_shape_from_config


def size_caches_by_config_(model: nn.Module) -> None:
    """Undo :func:`size_caches_by_keys_`."""
    for module in model.modules():
        if module.__dict__.get(_SHAPE) is no_shape_from_config:
            del module.__dict__[_SHAPE]
