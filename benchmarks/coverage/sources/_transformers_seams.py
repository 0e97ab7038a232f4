"""Make the sizes of a small configuration of transformers fit each other, where the parts of a model meet."""

from __future__ import annotations

from math import ceil, isqrt
from typing import Any

_STATES = ("vision_feature_layer", "vision_feature_layers", "feature_layer")
"""Attributes that hold numbers of hidden states of a tower: 0 is what the first layer takes."""

_LAYERS = ("intermediate_layers_indices", "deepstack_visual_indexes", "global_attn_indexes", "fullatt_block_indexes")
"""Attributes that hold numbers of layers, counted from 0."""

_TEXT_WIDTHS = ("projection_dim", "out_hidden_size", "text_hidden_size", "image_token_embed_dim")
"""Attributes of towers that hold the width of the language model, or of what it merges."""


def fit(small: Any, full: Any, *, narrow: bool) -> None:
    """Change sizes of a small configuration so that they fit its others, in the relations of the full one.

    Args:
        small: the configuration after its sizes were made small; changed.
        full: the configuration as it was.
        narrow: whether its layers were made narrow, and not only few.
    """
    for rule in _RULES:
        rule(small, full)
    if narrow:
        _narrow_timm(small)


def _part(config: Any, name: str) -> Any:
    """Return the configuration of a part; ``None`` without one. Properties are not read, for they may raise."""
    return vars(config).get(f"{name}_config")


def _fit_states(small: Any, full: Any) -> None:
    """Take hidden states of the same depth: the 20th of 24 becomes the second of two."""
    before, now = _depth(full), _depth(small)
    for name in _STATES if now < before else ():
        if (value := getattr(full, name, None)) is not None:
            many = isinstance(value, list | tuple)
            found = [_at_depth(v, before, now) for v in (value if many else [value])]
            setattr(small, name, type(value)(found) if many else found[0])
    adapter = _part(small, "adapter")
    if now < before and hasattr(adapter, "vision_feature_layer"):  # here layers are counted, from 0
        adapter.vision_feature_layer = [_at_depth(v + 1, before, now) - 1 for v in adapter.vision_feature_layer]


def _fit_layers(small: Any, full: Any) -> None:
    """Name the same share of the layers, at least one, the last ones."""
    before, now = _depth(full), _depth(small)
    for name in _LAYERS:
        value = getattr(full, name, None)
        if isinstance(value, list | tuple) and value and now < before:
            count = max(1, round(len(value) * now / before))
            setattr(small, name, type(value)(range(now - count, now)))
    if isinstance(value := getattr(full, "insert_layer_id", None), int) and now < before:
        for part in {id(p): p for p in (small, _part(small, "vision") or small)}.values():
            part.insert_layer_id = max(0, round((value + 1) * now / before) - 1)


def _depth(config: Any) -> int:
    """Return the number of layers of the tower that sees images, or of the configuration."""
    part = _part(config, "vision") or config
    return next((v for n in ("num_hidden_layers", "depth") if isinstance(v := getattr(part, n, None), int)), 0)


def _at_depth(number: int, before: int, now: int) -> int:
    """Return the number of a hidden state at the same depth of a tower with fewer layers."""
    counted = number + before + 1 if number < 0 else number
    found = min(now, max(1, ceil(counted * now / before)))
    return found - now - 1 if number < 0 else found


def _fit_stacked_layers(small: Any, full: Any) -> None:
    """Keep the width of the output of a tower that puts hidden states of several layers beside each other."""
    if hasattr(small, "vision_output_dim") and hasattr(small, "intermediate_layers_indices"):
        small.vision_output_dim = small.hidden_size * (1 + len(small.intermediate_layers_indices))


def _fit_tokens(small: Any, full: Any) -> None:
    """Make fewer tokens of an image than it has patches, in the same proportion, but not less than four."""
    part, part_full = _part(small, "vision"), _part(full, "vision")
    value = getattr(full, "mm_tokens_per_image", None)
    if value is None or part is None:
        return
    before, now = ((p.image_size // p.patch_size) ** 2 for p in (part_full, part))
    small.mm_tokens_per_image = max(4, isqrt(now * value // before) ** 2)


def _fit_queries(small: Any, full: Any) -> None:
    """Give the number of queries for the patches of a small image."""
    if hasattr(small, "projector_patch_to_query_dict"):
        part = small.vision_config
        small.projector_patch_to_query_dict = {(part.image_size // part.patch_size) ** 2: 4}
        small.max_value_projector_patch_to_query_dict = 4


def _fit_tiles(small: Any, full: Any) -> None:
    """Give the sizes of tiled images in the small tiles."""
    sizes = getattr(full, "image_grid_pinpoints", None)
    before, now = (getattr(_part(c, "vision"), "image_size", None) for c in (full, small))
    if sizes and isinstance(before, int) and isinstance(now, int):
        tiles = [[max(1, height // before), max(1, width // before)] for height, width in sizes]
        small.image_grid_pinpoints = [[h * now, w * now] for h, w in tiles if h * w <= 4]


def _fit_text_widths(small: Any, full: Any) -> None:
    """Project the outputs of towers to the width of the language model, or to a multiple of their own width."""
    text = _part(small, "text")
    width, width_full = (getattr(_part(c, "text"), "hidden_size", None) for c in (small, full))
    if not isinstance(width, int) or width == width_full:
        return
    if hasattr(text, "projection_dim") or getattr(full, "projection_dim", width_full) != width_full:
        return  # two towers meet in a space of their own
    for key, part in [("", small), *((n, v) for n, v in vars(small).items() if n.endswith("_config"))]:
        owner = getattr(full, key) if key else full
        for name in _TEXT_WIDTHS if part is not text else ():
            if isinstance(getattr(part, name, None), int):
                times = _times_vision(full, getattr(owner, name)) if getattr(owner, name) != width_full else None
                setattr(part, name, times * small.vision_config.hidden_size if times else width)


def _times_vision(full: Any, width: int) -> int | None:
    """Return how often the width of the tower goes into a width: that of 2 x 2 or 4 x 4 merged patches."""
    own = getattr(_part(full, "vision"), "hidden_size", None)
    return next((n for n in (4, 16) if isinstance(own, int) and n * own == width), None)


def _fit_widths_between(small: Any, full: Any) -> None:
    """Give a part the width that the part before it has, where each configuration names it in its own way."""
    if hasattr(sam := _part(small, "sam"), "downsample_channels"):
        sam.downsample_channels = [*sam.downsample_channels[:-1], small.encoder_config.hidden_size]
    encoder, projector, audio = (_part(small, name) for name in ("encoder", "projector", "audio"))
    if hasattr(encoder, "hidden_dim") and hasattr(projector, "encoder_hidden_size"):
        projector.encoder_hidden_size = encoder.hidden_dim
    if getattr(small, "model_type", None) == "voxtral" and audio is not None:  # its projector takes four frames as one
        audio.intermediate_size = 4 * audio.hidden_size


def _narrow_timm(small: Any) -> None:
    """Take a narrow tower of timm, of the same kind."""
    kind = getattr(small, "architecture", None) or ""
    narrow: dict[str, dict[str, Any]] = {
        "fastvit": {"embed_dims": (16, 16, 32, 32)},
        "vit_": {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 64},
    }
    found = next((more for start, more in narrow.items() if kind.startswith(start)), None)
    if found:
        small.model_args = {**(small.model_args or {}), **found}
        small.architecture = "fastvit_t8" if "embed_dims" in found else kind


def _fit_positions(small: Any, full: Any) -> None:
    """Have a position for every patch."""
    size, patch = getattr(small, "image_size", None), getattr(small, "patch_size", None)
    if isinstance(size, list | tuple) and isinstance(patch, int) and getattr(small, "num_position_embeddings", None):
        small.num_position_embeddings = (size[0] // patch) * (size[1] // patch)


def _fit_required(small: Any, full: Any) -> None:
    """Give a value to what has no default and every user gives."""
    if getattr(small, "prediction_length", 0) is None:
        small.prediction_length = small.context_length = 8


def _fit_tokens_of_places(small: Any, full: Any) -> None:
    """Name the tokens that hold the places of images and sounds, each another one."""
    names = ("image_token_id", "video_token_id", "audio_token_id")
    for offset, name in enumerate(names):
        if hasattr(small, name) and getattr(small, name) is None and hasattr(small, "text_config"):
            setattr(small, name, 120 + offset)
    vision, audio = _part(small, "vision"), _part(small, "audio")
    if (token := getattr(audio, "audio_token_id", None)) is not None:
        audio.audio_token_id = token - (token == getattr(vision, "image_token_id", None))


_RULES = (_fit_states, _fit_layers, _fit_stacked_layers, _fit_tokens, _fit_queries, _fit_tiles, _fit_text_widths,
          _fit_widths_between, _fit_positions, _fit_required,
          _fit_tokens_of_places)  # fmt: skip
