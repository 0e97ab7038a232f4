"""One more token of a language model, with the keys and values of its prompt in a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph.errors import EtpError
from etp_graph.model import convert_inputs, named_tensors, run_model

_REMEDY = "give a model of transformers that generates, and a prompt that is shorter than its window of attention"


@dataclass(frozen=True, slots=True)
class NextToken:
    """Example inputs of a measurement: one more token after a prompt, whose keys and values are in a cache.

    Serving a language model has two costs: the prompt, which is one forward, and each further token. Pass this in
    place of example inputs to measure the second one.

    Attributes:
        prompt: example inputs of the prompt, as for :func:`etp_graph.trace`: a mapping with ``input_ids`` (for an
            encoder and a decoder also ``decoder_input_ids``), or the token numbers [samples, tokens].
    """

    prompt: Any


def next_token_call(model: nn.Module, prompt: Any) -> Callable[[], object]:
    """Run the prompt, and return a function that runs one more token and then forgets it again.

    Args:
        model: a model of transformers in eval mode.
        prompt: as in :class:`NextToken`.

    Raises:
        EtpError: the model returns no cache, its cache cannot forget a token, or the prompt has no tokens.
    """
    name = type(model).__name__
    key = next((key for key in ("cache", "past_key_values") if key in signature(model.forward).parameters), None)
    if key is None:
        raise EtpError(f"the forward of {name} takes no cache: {_REMEDY}.")
    given = dict(prompt) if isinstance(prompt, Mapping) else {"input_ids": _first(prompt)}
    like = next((tensor for _, tensor in named_tensors(model) if tensor.is_floating_point()), None)
    given = given if like is None else convert_inputs(given, like=like)
    decoder = "decoder_" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else ""
    ids = given.get(f"{decoder}input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
        raise EtpError(f"the prompt has no {decoder}input_ids [samples, tokens]: {_REMEDY}.")
    with torch.no_grad():
        out = run_model(model, {**given, "use_cache": True})
    cache: Any = getattr(out, key, None)
    if not callable(getattr(cache, "crop", None)):
        found = "returns no cache" if cache is None else f"keeps a {type(cache).__name__}, which cannot forget a token"
        raise EtpError(f"{name} {found}: {_REMEDY}.")
    step = {f"{decoder}input_ids": ids[:, -1:], key: cache, "use_cache": True, **_others(given, out, decoder)}

    def run() -> object:
        found = run_model(model, step)
        cache.crop(-1)
        return found

    with torch.no_grad():
        try:
            run()
        except (RuntimeError, ValueError) as error:  # a cache with a window that is full
            raise EtpError(f"{name} does not run one more token, or cannot forget it ({error}): {_REMEDY}.") from error
    return run


def _others(given: Mapping[str, Any], out: Any, decoder: str) -> dict[str, Any]:
    """Return the other inputs of the next token: the mask one token longer, or what the encoder returned."""
    mask = given.get("attention_mask")
    if decoder:
        kept = {} if mask is None else {"attention_mask": mask}
        return {"encoder_outputs": (out.encoder_last_hidden_state,), **kept}
    return {} if mask is None else {"attention_mask": torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)}


def _first(prompt: Any) -> Any:
    return prompt[0] if isinstance(prompt, (tuple, list)) and prompt else prompt
