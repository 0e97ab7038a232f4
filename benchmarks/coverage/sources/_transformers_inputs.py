"""Make example inputs of a model of transformers from the arguments of its forward and its configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.entry import noise, tokens

from ._common import arguments_of

_TOKENS, _TARGET = 12, 6


def inputs_of(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield inputs to try, the fullest first. Each runs only if its shapes fit the model."""
    wanted = arguments_of(model.forward)
    text = _text(model, wanted)
    for others in _others(model, wanted):
        for kind in ("image", "audio") if others and "input_ids" in text else ():
            yield from _with_places(model, kind, text, others)
        yield {**text, **others}
    if text:
        yield text


def _text(model: nn.Module, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return tokens of the source and of the target."""
    config: Any = model.config
    found: dict[str, Any] = {}
    ids = tokens(2, _TOKENS, vocabulary=90)
    if "input_ids" in wanted:
        found["input_ids"] = ids
        if "attention_mask" in wanted:
            found["attention_mask"] = torch.ones_like(ids)
    if "decoder_input_ids" in wanted:
        found["decoder_input_ids"] = tokens(2, _TARGET, vocabulary=90, seed=1)
    if "bbox" in wanted:
        found["bbox"] = torch.tensor([1, 2, 5, 7]).expand(2, _TOKENS, 4).clone()
    if "langs" in wanted and getattr(config, "n_langs", 1) > 1:
        found["langs"] = torch.zeros_like(ids)
    return found


def _size(config: Any) -> int:
    """Return the pixels of a side that the configuration asks for."""
    for part in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None),
                 getattr(config, "encoder", None)):  # fmt: skip
        size = getattr(part, "image_size", None) or getattr(part, "img_size", None)
        if isinstance(size, list | tuple):
            size = size[0]
        if isinstance(size, int):
            return size
    return 64


def _others(model: nn.Module, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield images, videos, waves, spectra and series, in the shapes that models take them."""
    config: Any = model.config
    if "pixel_values" in wanted:
        yield from _pictures(config, wanted)
    if "input_values" in wanted:
        yield {"input_values": noise(2, 4000)}
        yield {"input_values": noise(2, 1, 4000)}
        yield {"input_values": noise(1, getattr(config, "max_length", 64), getattr(config, "num_mel_bins", 16))}
    if "input_features" in wanted:
        yield from _spectra(config, wanted)
    if "past_values" in wanted:
        yield from _series(config, wanted)
    if "input_audio_embeds" in wanted or "inputs" in wanted:
        yield {"inputs": tokens(2, _TOKENS, vocabulary=90)}
    if "pixel_values_videos" in wanted and "input_ids" not in wanted:
        yield {"pixel_values_videos": noise(1, 4, 3, _size(config), _size(config))}
    if "inputs_embeds" in wanted and "input_ids" not in wanted:
        yield {"inputs_embeds": noise(2, _TOKENS, getattr(config, "hidden_size", 64))}
    yield {}


def _pictures(config: Any, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    part = getattr(config, "vision_config", config)
    channels = getattr(part, "num_channels", None) or getattr(part, "in_channels", None) or 3
    channels = channels if isinstance(channels, int) else 3
    own = _size(config)
    sizes = dict.fromkeys([64 if own > 128 else own, own, 64, 32, 128, 224])  # convolutions take any size
    if "image_grid_thw" in wanted or "grid_thw" in wanted:
        patch = getattr(part, "patch_size", 14)
        numbers = channels * getattr(part, "temporal_patch_size", 1) * patch * patch
        name = "image_grid_thw" if "image_grid_thw" in wanted else "grid_thw"
        yield {"pixel_values": noise(16, numbers), name: torch.tensor([[1, 4, 4]])}
    for size in sizes:
        picture = noise(1, channels, size, size)
        yield {"pixel_values": picture}
        if "image_sizes" in wanted:
            yield {"pixel_values": picture, "image_sizes": torch.tensor([[size, size]])}
            yield {"pixel_values": picture.expand(5, -1, -1, -1)[None], "image_sizes": torch.tensor([[size, size]])}
        yield {"pixel_values": picture[:, None]}
        frames = getattr(part, "num_frames", 4)
        yield {"pixel_values": noise(1, frames if isinstance(frames, int) else 4, channels, size, size)}


def _spectra(config: Any, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    part = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    bins = getattr(part, "num_mel_bins", None) or getattr(part, "feature_size", None) or 80
    masks = [name for name in ("input_features_mask", "feature_attention_mask") if name in wanted]
    for length in dict.fromkeys([2 * (getattr(part, "max_source_positions", None) or 30), 200]):
        mask = dict.fromkeys(masks, torch.ones(1, length, dtype=torch.long))
        for count in dict.fromkeys([bins, 80, 128, getattr(part, "feature_projection_input_dim", 80)]):
            yield {"input_features": noise(1, count, length), **mask}
            yield {"input_features": noise(1, length, count), **mask}
            yield {"input_features": noise(1, 64, count)}


def _series(config: Any, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    lags = max(getattr(config, "lags_sequence", None) or [0])
    length = (getattr(config, "context_length", None) or 32) + lags
    ahead = getattr(config, "prediction_length", None) or 8
    features = getattr(config, "num_time_features", 0) or 1
    values = noise(2, length)
    yield {
        "past_values": values, "past_time_features": noise(2, length, features),
        "past_observed_mask": torch.ones_like(values), "future_time_features": noise(2, ahead, features),
        "future_values": noise(2, ahead),
    }  # fmt: skip
    yield {"past_values": noise(2, length, getattr(config, "num_input_channels", 1) or 1)}
    yield {"past_values": values}
    yield {"past_values": [noise(length), noise(length)], "freq": [0, 0]}


_PLACES = {
    "image": ("image_token_id", "image_token_index", "img_context_token_id", "image_patch_id"),
    "audio": ("audio_token_id", "audio_token_index", "audio_input_id", "audio_soft_token_id"),
}
"""What the features show -> attributes of configurations that name the token that holds the place of one."""


def _with_places(model: nn.Module, kind: str, text: dict[str, Any], others: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield inputs whose tokens hold a place for every feature, if the model says how many there are."""
    config: Any = model.config
    token = next((v for name in _PLACES[kind] if isinstance(v := getattr(config, name, None), int)), None)
    count = None
    if token is not None:
        count = _count_features(model, kind, others) or _count_in_error(model, {**text, **others})
    if token is None or count is None:
        return
    ids = tokens(1, count + 4, vocabulary=90)
    ids[0, 2 : 2 + count] = token
    more = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in text else {}
    wanted = arguments_of(model.forward)
    names_ = ("token_type_ids", "mm_token_type_ids")
    kinds: dict[str, Any] = {n: (ids == token).long() for n in names_ if n in wanted}
    yield {"input_ids": ids, **more, **others, **kinds}


def _count_features(model: nn.Module, kind: str, others: dict[str, Any]) -> int | None:
    """Return the number of features that the language model takes."""
    for part in (model, getattr(model, "model", None)):
        method = getattr(part, f"get_{kind}_features", None)
        if method is None:
            continue
        wanted = arguments_of(method)
        given = {k: v for k, v in others.items() if k in wanted or "kwargs" in wanted}
        try:
            with torch.no_grad():
                found = method(**given)
        except Exception:  # noqa: BLE001, S112 - shapes that do not fit are tried with the next inputs
            continue
        found = getattr(found, "pooler_output", None) if not isinstance(found, Tensor | list | tuple) else found
        parts = [p for p in (found if isinstance(found, list | tuple) else [found]) if isinstance(p, Tensor)]
        if parts:
            return sum(p.numel() // p.shape[-1] for p in parts)
    return None


def _count_in_error(model: nn.Module, inputs: dict[str, Any]) -> int | None:
    """Return the number of features that the model names when it finds no places for them."""
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:  # noqa: BLE001 - as above
        found = re.search(r"features:? (\d+)", str(error))
        return int(found[1]) if found else None
    return None
