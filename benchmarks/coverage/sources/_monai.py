"""Networks of MONAI for volumes and images, small where they let the widths be chosen."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from benchmarks.models.entry import noise

from ._common import first_that_runs

PACKAGE = "monai"
_IO = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
_LEVELS = {**_IO, "channels": (16, 24, 32), "strides": (2, 2)}
_FLAT = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
_ROWS: Mapping[str, tuple[Mapping[str, Any], tuple[int, ...]]] = {
    "UNet": ({**_LEVELS, "num_res_units": 2}, (1, 1, 16, 16, 16)),
    "AttentionUnet": (_LEVELS, (1, 1, 16, 16, 16)),
    "AutoEncoder": ({**_LEVELS, "strides": (2, 2, 2)}, (1, 1, 16, 16, 16)),
    "BasicUNet": ({**_FLAT, "features": (16, 16, 24, 32, 40, 16)}, (1, 1, 32, 32)),
    "BasicUNetPlusPlus": ({**_FLAT, "features": (16, 16, 24, 32, 40, 16)}, (1, 1, 32, 32)),
    "DynUNet": (
        {**_FLAT, "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2],
         "filters": [16, 24, 32]},
        (1, 1, 32, 32),
    ),
    "SegResNet": ({**_IO, "init_filters": 8}, (1, 1, 16, 16, 16)),
    "SegResNetDS": ({**_IO, "init_filters": 8}, (1, 1, 16, 16, 16)),
    "HighResNet": (_FLAT, (1, 1, 32, 32)),
    "FlexibleUNet": ({**_FLAT, "backbone": "efficientnet-b0"}, (1, 1, 64, 64)),
    "EfficientNetBN": ({"model_name": "efficientnet-b0", "spatial_dims": 2, "in_channels": 1, "pretrained": False},
        (1, 1, 64, 64)),
    "UNETR": (
        {**_IO, "img_size": 16, "feature_size": 16, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4},
        (1, 1, 16, 16, 16),
    ),
    "SwinUNETR": ({**_FLAT, "feature_size": 12}, (1, 1, 64, 64)),
    "ViT": (
        {"in_channels": 1, "img_size": 16, "patch_size": 8, "hidden_size": 48, "mlp_dim": 64, "num_layers": 2,
         "num_heads": 4, "classification": True},
        (1, 1, 16, 16, 16),
    ),
    "VNet": (_IO, (1, 1, 16, 16, 16)),
    "DenseNet121": (_FLAT, (1, 1, 64, 64)),
    "SEResNet50": ({"spatial_dims": 2, "in_channels": 1}, (1, 1, 64, 64)),
    "MedNeXt": ({**_FLAT, "init_filters": 8}, (1, 1, 32, 32)),
    "AutoencoderKL": (
        {**_FLAT, "channels": (16, 32), "num_res_blocks": 1, "norm_num_groups": 8, "latent_channels": 3,
         "attention_levels": (False, True)},
        (1, 1, 32, 32),
    ),
    "VQVAE": (
        {**_FLAT, "channels": (16, 24), "num_res_channels": (16, 24), "num_embeddings": 16,
         "downsample_parameters": ((2, 4, 1, 1),) * 2, "upsample_parameters": ((2, 4, 1, 1, 0),) * 2},
        (1, 1, 32, 32),
    ),
}  # fmt: skip


def names() -> list[str]:
    """Return the names of the classes."""
    return list(_ROWS) if find_spec("monai") is not None else []


def family(name: str) -> str:
    """Return the family of the page."""
    return "monai"


def build(name: str) -> tuple[nn.Module, Any]:
    """Return the network with a small volume or image."""
    nets = import_module("monai.networks.nets")

    config, shape = _ROWS[name]
    return first_that_runs([lambda: getattr(nets, name)(**config)], lambda model: [noise(*shape)])
