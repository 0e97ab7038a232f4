"""Denoisers and autoencoders of diffusers, each with a small configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks.models.entry import noise

from ._common import first_that_runs

PACKAGE = "diffusers"
_UNET = {
    "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
}  # fmt: skip
_CROSS = {
    **_UNET, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 24, "attention_head_dim": 8,
}  # fmt: skip
_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (32, 64), "norm_num_groups": 8,
}  # fmt: skip
_DIT = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "patch_size": 2}
_ROWS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "UNet2DModel": (
        {**_UNET, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8},
        "image",
    ),
    "UNet2DConditionModel": (_CROSS, "text"),
    "AutoencoderKL": (_VAE, "picture"),
    "AsymmetricAutoencoderKL": (
        {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
         "down_block_out_channels": (32, 64), "up_block_out_channels": (32, 64), "norm_num_groups": 8},
        "picture",
    ),
    "AutoencoderTiny": (
        {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16),
         "num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1)},
        "picture",
    ),
    "VQModel": (_VAE, "picture"),
    "DiTTransformer2DModel": ({**_DIT, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 20}, "classes"),
    "PixArtTransformer2DModel": (
        {**_DIT, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 64, "caption_channels": 24}, "pixart",
    ),
    "PriorTransformer": (
        {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": 24,
         "num_embeddings": 7, "additional_embeddings": 4},
        "prior",
    ),
    "SD3Transformer2DModel": (
        {**_DIT, "in_channels": 4, "joint_attention_dim": 24, "caption_projection_dim": 64,
         "pooled_projection_dim": 20, "out_channels": 4, "pos_embed_max_size": 16},
        "pooled",
    ),
    "AuraFlowTransformer2DModel": (
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
         "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 24, "caption_projection_dim": 64,
         "out_channels": 4, "pos_embed_max_size": 64},
        "text_latents",
    ),
    "UVit2DModel": (
        {"hidden_size": 64, "cond_embed_dim": 24, "encoder_hidden_size": 24, "vocab_size": 40, "codebook_size": 32,
         "in_channels": 32, "block_out_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 96, "micro_cond_encode_dim": 8, "micro_cond_embed_dim": 64},
        "uvit",
    ),
}  # fmt: skip


def names() -> list[str]:
    """Return the names of the classes."""
    return list(_ROWS) if find_spec("diffusers") is not None else []


def family(name: str) -> str:
    """Return the family of the page."""
    return "diffusers"


def build(name: str) -> tuple[nn.Module, Any]:
    """Return the model with latents, a time step and the conditions that it takes."""
    diffusers = import_module("diffusers")

    config, sort = _ROWS[name]
    return first_that_runs([lambda: getattr(diffusers, name)(**config)], lambda model: [_inputs(sort)])


def _inputs(sort: str) -> Any:
    """Return inputs by what a forward takes."""
    time, latents, text = torch.tensor([7]), noise(1, 4, 8, 8), noise(1, 5, 24)
    makers: Mapping[str, Callable[[], Any]] = {
        "image": lambda: (noise(1, 3, 16, 16), time),
        "text": lambda: (noise(1, 4, 16, 16), time, text),
        "picture": lambda: noise(1, 3, 32, 32),
        "classes": lambda: {"hidden_states": latents, "timestep": time, "class_labels": torch.tensor([3])},
        "pixart": lambda: {
            "hidden_states": latents, "encoder_hidden_states": text, "timestep": time,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        "prior": lambda: {
            "hidden_states": noise(1, 24), "timestep": time, "proj_embedding": noise(1, 24, seed=1),
            "encoder_hidden_states": noise(1, 7, 24),
        },
        "pooled": lambda: {
            "hidden_states": latents, "encoder_hidden_states": text, "pooled_projections": noise(1, 20),
            "timestep": time,
        },
        "text_latents": lambda: {"hidden_states": latents, "encoder_hidden_states": text, "timestep": time / 10},
        "uvit": lambda: (torch.randint(0, 31, (1, 4, 4)), text, noise(1, 24), torch.zeros(1, 2)),
    }  # fmt: skip
    return makers[sort]()
