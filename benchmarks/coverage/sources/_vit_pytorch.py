"""The vision transformers of vit-pytorch, whose code is written with einops."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from ._common import arguments_of, first_that_runs, square_images

PACKAGE = "vit-pytorch"
_VALUES: Mapping[str, Any] = {
    "image_size": 32, "patch_size": 8, "num_classes": 7, "dim": 64, "depth": 2, "heads": 4, "mlp_dim": 96,
    "dim_head": 16, "num_kernel_layers": 1, "cls_depth": 1, "num_memory_tokens": 3, "num_register_tokens": 3,
    "patch_merge_num_tokens": 4, "patch_merge_layer": 1, "num_layers": 2, "num_heads": 4, "mlp_ratio": 2,
    "embedding_dim": 64, "max_tokens_per_depth": (16, 8), "num_residual_streams": 2,
}  # fmt: skip
_CLASSES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "vit": ("ViT", {}), "simple_vit": ("SimpleViT", {}), "deepvit": ("DeepViT", {}), "cait": ("CaiT", {}),
    "rvt": ("RvT", {}), "parallel_vit": ("ViT", {}), "learnable_memory_vit": ("ViT", {}), "pit": ("PiT", {
        "depth": (1, 1)}), "vit_for_small_dataset": ("ViT", {}), "vit_with_patch_merger": ("ViT", {}),
    "vit_with_patch_dropout": ("ViT", {}), "simple_vit_with_qk_norm": ("SimpleViT", {}),
    "simple_vit_with_register_tokens": ("SimpleViT", {}), "simple_vit_with_fft": ("SimpleViT", {
        "freq_patch_size": 8}), "simple_vit_with_value_residual": ("SimpleViT", {}),
    "simple_vit_with_patch_dropout": ("SimpleViT", {}), "simple_vit_with_hyper_connections": ("SimpleViT", {}),
    "simple_flash_attn_vit": ("SimpleViT", {}), "normalized_vit": ("nViT", {}), "ats_vit": ("ViT", {}),
    "xcit": ("XCiT", {}),
    "nest": ("NesT", {"num_hierarchies": 2, "block_repeats": (1, 1), "image_size": 32, "patch_size": 4}),
    "cvt": ("CvT", {"s1_emb_dim": 32, "s2_emb_dim": 48, "s3_emb_dim": 64, "s2_heads": 3, "s3_heads": 4,
                    "s3_depth": 1}),
    "twins_svt": ("TwinsSVT", {"s1_emb_dim": 32, "s2_emb_dim": 48, "s3_emb_dim": 64, "s4_emb_dim": 64,
                               "s3_depth": 1, "s1_local_patch_size": 1, "s2_local_patch_size": 1,
                               "s3_local_patch_size": 1}),
    "levit": ("LeViT", {"image_size": 64, "stages": 2, "depth": 1, "heads": (2, 4), "dim": (32, 48),
                        "mlp_mult": 2}),
    "cross_vit": ("CrossViT", {"sm_dim": 48, "lg_dim": 64, "image_size": 96, "depth": 1}),
    "crossformer": ("CrossFormer", {"dim": (32, 48, 64, 80), "depth": (1, 1, 1, 1)}),
    "regionvit": ("RegionViT", {"dim": (32, 48, 64, 80), "depth": (1, 1, 1, 1)}),
    "scalable_vit": ("ScalableViT", {"heads": (2, 2, 2, 2), "depth": (1, 1, 1, 1), "dim": 32,
                                     "ssa_dim_key": 16, "reduction_factor": (4, 2, 2, 1), "window_size": (8, 4, None,
                                                                                                         None)}),
    "sep_vit": ("SepViT", {"dim": 32, "depth": (1, 1), "heads": (2, 4), "window_size": 4}),
    "max_vit": ("MaxViT", {"dim": 32, "depth": (1, 1), "window_size": 4, "dim_head": 16}),
    "mobile_vit": ("MobileViT", {"image_size": (64, 64), "patch_size": (2, 2), "dims": [48, 64, 80],
                                 "channels": [16, 16, 24, 24, 32, 32, 48, 48, 64, 64, 96]}),
    "t2t": ("T2TViT", {}), "cct": ("cct_2", {"img_size": 32}),
}  # fmt: skip
"""Module -> name of its class, and what it takes besides the values above."""


def names() -> list[str]:
    """Return the names of the modules."""
    return list(_CLASSES) if find_spec("vit_pytorch") is not None else []


def family(name: str) -> str:
    """Return the family of the page."""
    return "vit-pytorch"


def build(name: str) -> tuple[nn.Module, Any]:
    """Return the model with an image of the size that it was built for, or of another one that it takes."""
    class_name, more = _CLASSES[name]
    cls = getattr(import_module(f"vit_pytorch.{name}"), class_name)
    wanted = arguments_of(cls)
    options = {key: value for key, value in _VALUES.items() if key in wanted} | dict(more)
    return first_that_runs([lambda: cls(**options)], lambda model: square_images([32, 64, 128, 224]))
