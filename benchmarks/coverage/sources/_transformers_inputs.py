"""Make example inputs of a model of transformers from the arguments of its forward and its configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.entry import noise, tokens

from ._common import _error_of_forward, arguments_of
from ._transformers_pictures import pictures, size_of

_TOKENS, _TARGET = 12, 6


def inputs_of(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield inputs to try, the fullest first. Each runs only if its shapes fit the model."""
    wanted = arguments_of(model.forward)
    text = _text(model, wanted)
    shown: dict[str, dict[str, Any]] = {}
    for others in _others(model, wanted):
        for kind in _kinds_of(others) if "input_ids" in text else ():
            for each in _with_places(model, kind, text, others):
                if kind not in shown and _error_of_forward(model, each) is None:
                    shown[kind] = each
                    if len(shown) > 1:
                        yield _joined(*shown.values())
                yield each
        yield {**text, **others}
        if others and text:
            yield {**_first_row(text), **others}
    if text:
        yield text
    if text and "encoder_hidden_states" in wanted:
        config: Any = model.config
        width: Any = getattr(config, "cross_attention_hidden_size", None) or getattr(config, "hidden_size", 64)
        yield {**text, "encoder_hidden_states": noise(2, _TARGET, width)}


def _first_row(text: dict[str, Any]) -> dict[str, Any]:
    """Return the first sequence, for one image."""
    return {name: value[:1] for name, value in text.items()}


def _kinds_of(others: dict[str, Any]) -> list[str]:
    """Return what the features show, by the names of their arguments."""
    if "pixel_values_videos" in others:
        return ["video"]
    return ["image"] if any("pixel" in name for name in others) else ["audio"] if others else []


def _joined(*each: dict[str, Any]) -> dict[str, Any]:
    """Return inputs with an image and a sound or a video: the text of one behind that of the other."""
    names = {name: [inputs[name] for inputs in each if name in inputs] for inputs in each for name in inputs}
    return {name: found[0] if len(found) == 1 else torch.cat(found, dim=1) for name, found in names.items()}


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
    if "entity_ids" in wanted and "entity_position_ids" in wanted:
        found["entity_ids"] = tokens(2, 3, vocabulary=90)
        found["entity_position_ids"] = torch.tensor([[1, 2, -1], [4, -1, -1], [6, 7, 8]]).expand(2, 3, 3).clone()
    if "visual_embeds" in wanted:
        found["visual_embeds"] = noise(2, 4, getattr(config, "visual_embedding_dim", 64))
        for name in ("visual_attention_mask", "visual_token_type_ids"):
            found[name] = torch.ones(2, 4, dtype=torch.long)
    if "qformer_input_ids" in wanted:
        found["qformer_input_ids"] = tokens(2, _TARGET, vocabulary=90, seed=3)
    if "visual_feats" in wanted:
        found["visual_feats"] = noise(2, 4, getattr(config, "visual_feat_dim", 64))
        found["visual_pos"] = noise(2, 4, getattr(config, "visual_pos_dim", 4)).sigmoid()
    if "protein_input_ids" in wanted:
        found["protein_input_ids"] = tokens(2, _TOKENS, vocabulary=90, seed=2)
        found["protein_attention_mask"] = torch.ones_like(ids)
    return found


def _others(model: nn.Module, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield images, videos, waves, spectra and series, in the shapes that models take them."""
    config: Any = model.config
    yield from pictures(config, wanted)
    if "input_values" in wanted:
        if isinstance(strides := getattr(getattr(config, "audio_config", config), "patch_sizes", None), list | tuple):
            yield {"input_values": noise(1, 4 * prod(strides))}
        yield {"input_values": noise(2, 4000)}
        yield {"input_values": noise(2, 1, 4000)}
        yield {"input_values": noise(1, 1, 4000)}
        yield {"input_values": noise(1, getattr(config, "max_length", 64), getattr(config, "num_mel_bins", 16))}
    if "input_features" in wanted:
        yield from _spectra(config, wanted)
    if "audio_input_ids" in wanted:
        bins = getattr(getattr(config, "audio_config", None), "n_mel_bins", 80)
        yield {"audio_input_ids": tokens(1, 6, bins, vocabulary=90)}
    if "past_values" in wanted:
        yield from _series(config, wanted)
    if "input_audio_embeds" in wanted or "inputs" in wanted:
        yield {"inputs": tokens(2, _TOKENS, vocabulary=90)}
    if "pixel_values_videos" in wanted and ("input_ids" not in wanted or hasattr(model.base_model, "video_tower")):
        yield {"pixel_values_videos": noise(1, 4, 3, size_of(config), size_of(config))}
    if "inputs_embeds" in wanted and "input_ids" not in wanted:
        yield {"inputs_embeds": noise(2, _TOKENS, getattr(config, "hidden_size", 64))}
    yield {}


def _spectra(config: Any, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    part = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    bins = next((v for n in ("num_mel_bins", "feature_size", "input_dim") if (v := getattr(part, n, None))), 80)
    masks = [name for name in ("input_features_mask", "feature_attention_mask") if name in wanted]
    for length in dict.fromkeys([2 * (getattr(part, "max_source_positions", None) or 30), 200]):
        mask: dict[str, Any] = {name: torch.ones(1, length, dtype=torch.long) for name in masks}
        for count in dict.fromkeys([bins, 80, 128, getattr(part, "feature_projection_input_dim", 80)]):
            yield {"input_features": noise(1, count, length), **mask}
            yield {"input_features": noise(1, length, count), **mask}
            yield {"input_features": noise(1, length, count)}
            yield {"input_features": noise(1, 64, count)}


def _series(config: Any, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    lags = max(getattr(config, "lags_sequence", None) or [0])
    length = (getattr(config, "context_length", None) or 32) + lags
    ahead = getattr(config, "prediction_length", None) or 8
    features = getattr(config, "num_time_features", 1)
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
    "video": ("video_token_id", "video_token_index"),
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
    rest = {n: v[:1] for n, v in text.items() if n.startswith(("decoder_", "qformer_"))}
    yield {"input_ids": ids, **more, **rest, **others, **kinds}


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
    return _count_frames(model, others) if kind == "audio" else None


def _count_frames(model: nn.Module, others: dict[str, Any]) -> int | None:
    """Return the number of frames that the tower of sounds says that it makes of spectra."""
    tower = getattr(getattr(model, "model", model), "audio_tower", None)
    method = getattr(tower, "_get_feat_extract_output_lengths", None)
    if method is None or "feature_attention_mask" not in others:
        return None
    lengths = method(others["feature_attention_mask"].sum(-1))
    return int(lengths[-1] if isinstance(lengths, tuple) else lengths)


def _count_in_error(model: nn.Module, inputs: dict[str, Any]) -> int | None:
    """Return the number of features that the model names when it finds no places for them."""
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:  # noqa: BLE001 - as above
        found = re.search(r"features:? (\d+)", str(error))
        return int(found[1]) if found else None
    return None
