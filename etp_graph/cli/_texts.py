"""Texts for language models: windows of tokens that score units, and others that measure the perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph._config import require
from etp_graph.collect import OwnLabels, needs_backward, watch
from etp_graph.criteria import find_criterion
from etp_graph.errors import EtpError
from etp_graph.plan import Plan

_CHARACTERS = 1 << 20
"""Characters of a file that are read."""

_SCORED, _LENGTH = 16, 256
"""Number and length of the windows that score units."""

_HELD_OUT = 2048
"""Tokens of the windows that measure the perplexity."""

_LEAST = 64
"""A file has at least this many tokens."""


class TextError(EtpError):
    """A file of texts cannot be read, is too short, or is of no use for the model."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Texts:
    """Windows of the tokens of a file. No token is in both lists.

    Attributes:
        scored: windows of the first four fifths, each int64 [1, length].
        held_out: windows of the last fifth, each int64 [1, length].
    """

    scored: list[Tensor]
    held_out: list[Tensor]

    @property
    def batches(self) -> list[dict[str, Any]]:
        """Return the windows that score units as inputs of the model."""
        return [{"input_ids": window, "use_cache": False} for window in self.scored]

    @property
    def example_inputs(self) -> dict[str, Any]:
        """Return the beginning of the text as inputs of the model."""
        return {"input_ids": self.scored[0][:, :_LEAST], "use_cache": False}


def read_texts(path: Path, model: Any, tokenizer: Any) -> Texts:
    """Read a text file as windows of tokens for a causal language model.

    Raises:
        TextError: the file cannot be read or is too short, the model is no causal language model, or has no tokenizer.
    """
    require(
        "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__,
        f"--data: texts are for causal language models, and this is a {type(model).__name__}. Leave --data out.",
        TextError,
    )
    require(callable(tokenizer), "--data: the folder of the model has no tokenizer; put it there.", TextError)
    try:
        with path.open(encoding="utf8") as stream:
            text = stream.read(_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"--data {path}: not a readable text file ({error}).") from error
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    n_tokens, known = tokens.shape[1], model.get_input_embeddings().weight.shape[0]
    require(n_tokens >= _LEAST, f"--data {path}: {n_tokens} tokens, at least {_LEAST} are needed.", TextError)
    require(
        int(tokens.max()) < known,
        f"--data {path}: the tokenizer gives token {int(tokens.max())}, the model knows {known}: they do not fit.",
        TextError,
    )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _HELD_OUT
    first, last = tokens.split([n_tokens * 4 // 5, n_tokens - n_tokens * 4 // 5], dim=1)
    return Texts(
        scored=[window for window in first.split(min(_LENGTH, longest), dim=1) if window.shape[1] > 1][:_SCORED],
        held_out=[w for w in last[:, :_HELD_OUT].split(min(_HELD_OUT, longest), dim=1) if w.shape[1] > 1],
    )


def score_on_texts(criterion: str, model: nn.Module, plan: Plan, texts: Texts) -> Tensor:
    """Return the scores of a criterion that needs data, float [plan.n_units].

    The loss is that of the next token; for ``fisher`` the one of labels that the model draws itself.
    """
    found, own = find_criterion(criterion), OwnLabels()
    with watch(model, plan, criterion) as record:
        for window, batch in zip(texts.scored, texts.batches):
            model.zero_grad()
            with torch.set_grad_enabled(needs_backward(found.observes)):
                loss = own(model, batch) if criterion == "fisher" else _loss(model, window)
            if loss.requires_grad:
                loss.backward()
    model.zero_grad()
    return found.score(model, plan, record=record)


def perplexity(model: nn.Module, windows: list[Tensor]) -> float:
    """Return exp of the mean cross-entropy of each token given those before it in its window."""
    with torch.no_grad():
        total = sum(float(_loss(model, window)) * (window.shape[1] - 1) for window in windows)
    mean = total / sum(window.shape[1] - 1 for window in windows)
    return math.exp(mean) if mean < 700 else math.inf


def _loss(model: Any, window: Tensor) -> Tensor:
    window = window.to(model.device)
    loss: Tensor = model(input_ids=window, labels=window, use_cache=False).loss
    return loss
