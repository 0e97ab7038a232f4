"""Make the images that models of transformers take, in the shapes in which their processors hand them over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.entry import noise

_GRID = 4
"""Patches of a side, of images that come as a list of patches. Merging 2 x 2 of them leaves a whole number."""


def pictures(config: Any, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield images in the shapes that the arguments of a model ask for, the most specific first.

    Args:
        config: the configuration of the model.
        wanted: the arguments of its forward.
    """
    part = vision_part(config)
    for name in ("image_grid_thw", "grid_thw"):
        if name in wanted and ("pixel_values" in wanted or "hidden_states" in wanted):
            yield from _of_a_grid(config, part, wanted, name)
    for arguments, kind in _KINDS:
        if arguments <= set(wanted):
            yield from kind(config, part)
    if "pixel_values" in wanted:
        yield from _plain(config, part, wanted)


def vision_part(config: Any) -> Any:
    """Return the configuration of the part that sees images; the configuration itself without one."""
    return getattr(config, "vision_config", None) or config


def size_of(config: Any) -> int:
    """Return the pixels of a side that a configuration asks for."""
    parts = [getattr(config, name, None) for name in ("vision_config", "backbone_config", "encoder")]
    for part in (config, *parts, *(getattr(parts[0], name, None) for name in ("sam_config",))):
        size = getattr(part, "image_size", None) or getattr(part, "img_size", None)
        if isinstance(size, list | tuple):
            size = size[0]
        if isinstance(size, int):
            return size
    return 64


def _channels(part: Any) -> int:
    found = getattr(part, "num_channels", None) or getattr(part, "in_channels", None) or 3
    return found if isinstance(found, int) else 3


def _patch(part: Any) -> int:
    found = getattr(part, "patch_size", None) or 14
    return int(found[0]) if isinstance(found, list | tuple) else int(found)


def _of_a_grid(config: Any, part: Any, wanted: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Yield the patches of one image in the order of its grid: as rows of numbers, as small images, as merged ones."""
    channels, patch, count = _channels(part), _patch(part), _GRID * _GRID
    merge = getattr(part, "spatial_merge_size", None) or getattr(part, "merge_size", None) or 1
    frames = getattr(part, "temporal_patch_size", None) or getattr(part, "patch_temporal", None) or 1
    more = {name: torch.tensor([[1, _GRID, _GRID]])}
    for merges in ("image_merge_sizes", "merge_sizes"):
        if merges in wanted:
            more[merges] = torch.tensor([getattr(config, "spatial_merge_size", None) or 2])
    patches = "pixel_values" if "pixel_values" in wanted else "hidden_states"
    for frames_ in dict.fromkeys([frames, 1, 2]):
        yield {patches: noise(count, channels * frames_ * patch * patch), **more}
    yield {patches: noise(count, channels, patch, patch), **more}
    merged = noise(4, merge * patch, merge * patch, channels)  # the grid counts merged patches
    yield {patches: merged, **more, name: torch.tensor([[1, 2, 2]])}


def _tiles_of_ratios(config: Any, part: Any) -> Iterator[dict[str, Any]]:
    """Yield an image cut into tiles, with the number of its aspect ratio."""
    tiles, size = getattr(part, "max_num_tiles", 1), size_of(config)
    yield {
        "pixel_values": noise(1, 1, tiles, _channels(part), size, size),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.long),
    }


def _two_resolutions(config: Any, part: Any) -> Iterator[dict[str, Any]]:
    """Yield the same image for two towers."""
    size, high = size_of(config), size_of(getattr(config, "high_res_vision_config", config))
    channels = _channels(part)
    yield {"pixel_values": noise(1, channels, size, size), "high_res_pixel_values": noise(1, channels, high, high)}


def _padded_patches(config: Any, part: Any) -> Iterator[dict[str, Any]]:
    """Yield the patches of an image as rows of numbers, with the height and the width in patches."""
    patch, count = _patch(part), _GRID * _GRID
    yield {
        "pixel_values": noise(1, count, _channels(part) * patch * patch),
        "spatial_shapes": torch.tensor([[_GRID, _GRID]]),
        "pixel_attention_mask": torch.ones(1, count, dtype=torch.long),
    }


def _cubes(config: Any, part: Any) -> Iterator[dict[str, Any]]:
    """Yield patches of an image, each with two frames, colours last."""
    patch, frames = _patch(part), getattr(part, "temporal_patch_size", 2)
    yield {"pixel_values": noise(4, frames, patch, patch, _channels(part))}


def _masked_tiles(config: Any, part: Any) -> Iterator[dict[str, Any]]:
    """Yield tiles of an image, with a mask of the tiles and with a mask of their pixels."""
    size = size_of(config)
    tiles = noise(1, 2, _channels(part), size, size)
    yield {"pixel_values": tiles, "pixel_attention_mask": torch.ones(1, 2, dtype=torch.bool)}
    yield {"pixel_values": tiles, "pixel_attention_mask": torch.ones(1, 2, size, size, dtype=torch.bool)}


def _strip(config: Any, part: Any) -> Iterator[dict[str, Any]]:
    """Yield the patches of an image beside each other, in one row of pixels as high as a patch."""
    patch = _patch(part)
    for side in (_GRID, 2 * _GRID):
        strip = noise(1, _channels(part), patch, patch * side * side)
        yield {"pixel_values": strip, "target_sizes": torch.tensor([[side, side]], dtype=torch.int32)}


def _patches_for_a_decoder(config: Any, part: Any) -> Iterator[dict[str, Any]]:
    """Yield patches of which the first two numbers are the row and the column."""
    numbers = getattr(part, "patch_embed_hidden_size", 64)
    places = [torch.arange(1, _GRID + 1).repeat_interleave(_GRID), torch.arange(1, _GRID + 1).repeat(_GRID)]
    patches = torch.cat([torch.stack(places, dim=-1).float(), noise(_GRID * _GRID, numbers)], dim=-1)
    yield {"flattened_patches": patches[None]}


def _numbered_patches(config: Any, part: Any) -> Iterator[dict[str, Any]]:
    """Yield patches of which the first two numbers are the row and the column, with a mask of their places in text."""
    patches = next(_patches_for_a_decoder(config, part))["flattened_patches"]
    count = getattr(config, "latent_query_num", 4)
    text = torch.arange(count + 4)[None]
    yield {
        "input_ids": text + 5,
        "attention_mask": torch.ones_like(text),
        "flattened_patches": patches,
        "image_embeds_position_mask": ((text >= 2) & (text < 2 + count)).long(),
    }


def _pooled_patches(config: Any, part: Any) -> Iterator[dict[str, Any]]:
    """Yield patches of one crop as rows of numbers, with the four patches that each token pools."""
    size = size_of(config)
    patch = _patch(part)
    side = size // patch
    index = torch.arange(side * side).reshape(side // 2, 2, side // 2, 2).transpose(1, 2).reshape(-1, 4)
    yield {
        "pixel_values": noise(1, side * side, _channels(part) * patch * patch),
        "image_token_pooling": index,
        "image_grids": torch.tensor([[side // 2, side // 2, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    }


def _tiles_and_speech(config: Any, part: Any) -> Iterator[dict[str, Any]]:
    """Yield an image as a small copy of all of it and one tile, and the spectrum of a sound, with text around them.

    Each row of pooled patches ends with a number of its own, and one separates the two images.
    """
    size, audio = size_of(part), config.audio_config
    side, frames = size // _patch(part), 4
    pooled = side // 2
    places = [part.image_token_id] * (2 * pooled * (pooled + 1) + 1), [audio.audio_token_id] * frames
    ids = torch.tensor([[7, 8, *places[0], 9, *places[1], 10]])
    yield {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "image_pixel_values": noise(1, 2, _channels(part), size, size), "image_sizes": torch.tensor([[size, size]]),
        "image_attention_mask": torch.ones(1, 2, side, side),
        "audio_input_features": noise(1, frames * audio.time_reduction, audio.input_size),
        "audio_embed_sizes": torch.tensor([frames]),
    }  # fmt: skip


_KINDS = (
    ({"pixel_values", "aspect_ratio_ids"}, _tiles_of_ratios),
    ({"pixel_values", "high_res_pixel_values"}, _two_resolutions),
    ({"pixel_values", "spatial_shapes"}, _padded_patches),
    ({"pixel_values", "pixel_attention_mask"}, _masked_tiles),
    ({"pixel_values", "audio_input_ids"}, _cubes),
    ({"pixel_values", "target_sizes"}, _strip),
    ({"flattened_patches", "image_embeds_position_mask"}, _numbered_patches),
    ({"flattened_patches", "decoder_input_ids"}, _patches_for_a_decoder),
    ({"pixel_values", "image_token_pooling"}, _pooled_patches),
    ({"image_pixel_values", "audio_input_features"}, _tiles_and_speech),
)
"""Arguments that a forward has -> the images that go with them."""


def _plain(config: Any, part: Any, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield images and videos as tensors of pixels, in the sizes that models have."""
    channels, own = _channels(part), size_of(config)
    for size in dict.fromkeys([64 if own > 128 else own, own, 64, 32, 128, 224]):  # convolutions take any size
        picture = noise(1, channels, size, size)
        yield {"pixel_values": picture}
        if "image_sizes" in wanted:
            yield from _with_sizes(picture, size)
        yield {"pixel_values": picture[:, None]}
        yield {"pixel_values": noise(1, 2, channels, size, size)}
        frames = getattr(part, "num_frames", 4)
        yield {"pixel_values": noise(1, frames if isinstance(frames, int) else 4, channels, size, size)}


def _with_sizes(picture: Tensor, size: int) -> Iterator[dict[str, Any]]:
    """Yield an image with its height and width: alone, and cut into tiles behind a small copy of all of it."""
    yield {"pixel_values": picture, "image_sizes": torch.tensor([[size, size]])}
    yield {"pixel_values": picture.expand(5, -1, -1, -1)[None], "image_sizes": torch.tensor([[2 * size, 2 * size]])}
    yield {"pixel_values": picture.expand(5, -1, -1, -1)[None], "image_sizes": torch.tensor([[size, size]])}
    yield {"pixel_values": picture.expand(2, -1, -1, -1)[None], "image_sizes": torch.tensor([[size, size]])}
