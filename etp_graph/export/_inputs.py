"""Example inputs of models of transformers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def huggingface_inputs(model: nn.Module) -> dict[str, Any]:
    """Return small inputs that a model of transformers accepts: text, pixels, sound, and the start of the answer.

    Caches of keys and values are switched off. Decoders would return them, and what a model returns cannot be pruned.
    """
    found: Any = model
    accepted = inspect.signature(found.forward).parameters
    text = found.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {}
    if "pixel_values" in accepted:
        inputs["pixel_values"] = _pixels(found.config, generator)
    if "input_features" in accepted:
        length = 2 * getattr(found.config, "max_source_positions", 50)
        inputs["input_features"] = torch.randn(1, found.config.num_mel_bins, length, generator=generator)
    elif "input_values" in accepted:
        inputs["input_values"] = torch.randn(1, 4000, generator=generator)
    elif "input_ids" in accepted:
        inputs["input_ids"] = _tokens(text, generator)
    if "decoder_input_ids" in accepted and found.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _tokens(text, generator)
    if "use_cache" in accepted and (text.is_encoder_decoder or getattr(text, "is_decoder", True)):
        inputs["use_cache"] = False
    device, dtype = found.device, found.dtype
    return {name: _to(value, device, dtype) for name, value in inputs.items()}


def _tokens(config: Any, generator: torch.Generator) -> Tensor:
    """Return two texts of twelve tokens. The last token ends the text, because CLIP reads the state at that place."""
    tokens = torch.randint(0, config.vocab_size, (2, 12), generator=generator)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < config.vocab_size:
        tokens[:, -1] = end
    return tokens


def _pixels(config: Any, generator: torch.Generator) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return torch.randn(2, getattr(vision, "num_channels", 3), height, width, generator=generator)


def _to(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)
