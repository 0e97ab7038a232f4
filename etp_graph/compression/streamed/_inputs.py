"""Check batches of tokens before anything runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

import torch
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

from etp_graph._config import require
from etp_graph.errors import ScoreError

Batch = dict[str, Any]
"""Keyword arguments of the model."""

_TRACED_TOKENS = 32
"""Tokens of the first sample that the plan is traced on. More would only take memory."""


def read_batches(batches: Iterable[Any], model: nn.Module, vocabulary: int, device: torch.device) -> list[Batch]:
    """Return the batches as keyword arguments of the model, on its device and without a cache.

    Raises:
        ScoreError: there are none, one is no input of the model, or it holds tokens beyond the vocabulary.
    """
    found = [_as_keywords(batch, model, number) for number, batch in enumerate(batches, start=1)]
    require(bool(found), "batches is empty: pass at least one batch of example inputs.", ScoreError)
    for number, batch in enumerate(found, start=1):
        tokens = batch.get("input_ids")
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
            raise ScoreError(f"batch {number}: expected input_ids, integers of shape [samples, tokens].")
        low, high = int(tokens.min()), int(tokens.max())
        require(
            low >= 0 and high < vocabulary,
            f"batch {number}: token {low if low < 0 else high} is not in the vocabulary of {vocabulary} tokens: use "
            "the tokenizer of the model.",
            ScoreError,
        )
    return [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in found]


def _as_keywords(batch: Any, model: nn.Module, number: int) -> Batch:
    parameters = signature(model.forward).parameters
    if isinstance(batch, Tensor):
        batch = (batch,)
    found = dict(zip(parameters, batch)) if isinstance(batch, (tuple, list)) else batch  # the first ones
    require(
        isinstance(found, Mapping) and found.keys() <= parameters.keys(),
        f"batch {number}: {type(model).__name__} does not take it. Pass input_ids, or a dict of its arguments.",
        ScoreError,
    )
    return {**found, **({"use_cache": False} if "use_cache" in parameters else {})}


def mask_of(batch: Batch) -> Tensor | None:
    """Return the mask of the tokens of a batch [samples, tokens], zero at padding, or ``None``."""
    mask = batch.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def shortened(batch: Batch) -> Batch:
    """Return the first tokens of the first sample of a batch, without its mask and labels."""
    tokens = batch["input_ids"][:1, :_TRACED_TOKENS]
    return {"input_ids": tokens.cpu(), **{key: value for key, value in batch.items() if not isinstance(value, Tensor)}}


def digest_of(batches: Iterable[Batch]) -> str:
    """Return the SHA-256 of all tensors of the batches."""
    digest = hashlib.sha256()
    for batch in batches:
        tensors = {key: value.detach().cpu().contiguous() for key, value in batch.items() if isinstance(value, Tensor)}
        digest.update(tensor_bytes(tensors))
        digest.update(repr(sorted(batch.keys() - tensors.keys())).encode())
    return digest.hexdigest()
