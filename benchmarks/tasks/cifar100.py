"""CIFAR-100: VGG-19 with batch norm, trained first; a quarter of the channels at ``cpu``, half at ``full``.

Three of five parts of the training images are at hand, 30,000 images, so ``paper``, which needs all, is unavailable.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.tasks.base import Recipe, Scale, require
from benchmarks.tasks.cifar10 import VGG19
from benchmarks.tasks.images import PhotoTask, Sizes
from etp_graph.demo.zoo.data import Split, data_root
from etp_graph.demo.zoo.models import VGG

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
SIZES = {
    "smoke": Sizes(train=200, val=100, test=100),
    "cpu": Sizes(train=18_000, val=2_000, test=5_000),
    "full": Sizes(train=28_000, val=2_000, test=10_000),
    "paper": Sizes(train=45_000, val=5_000, test=10_000),
}
WIDTH = {"smoke": 16, "cpu": 4, "full": 2, "paper": 1}
"""By what the channels of VGG-19 are divided."""
_RECIPES = {
    "smoke": Recipe(
        dense_steps=2, sparse_steps=2, finetune_steps=2, scratch_steps=2, dense_rate=0.05, sparse_rate=0.02,
        finetune_rate=0.05, batch_size=32, tune_share=0.5, pushes=(1.0,),
    ),
    "cpu": Recipe(
        dense_steps=2_800, sparse_steps=250, finetune_steps=350, scratch_steps=900, dense_rate=0.05, sparse_rate=0.02,
        finetune_rate=0.03, batch_size=64, tune_share=0.25,
    ),
    "full": Recipe(  # 218 steps a pass: 40, 3 and 12 passes
        dense_steps=40 * 218, sparse_steps=3 * 218, finetune_steps=12 * 218, scratch_steps=55 * 218, dense_rate=0.05,
        sparse_rate=0.01, finetune_rate=0.01, batch_size=128, tune_share=1.0, pushes=(0.2, 0.6, 2.0, 6.0), extensions=2,
    ),
    "paper": Recipe(
        dense_steps=70_200, sparse_steps=35_100, finetune_steps=35_100, scratch_steps=140_400, dense_rate=0.1,
        sparse_rate=0.01, finetune_rate=0.01, batch_size=128, tune_share=0.1, pushes=(0.2, 0.6, 2.0, 6.0, 20.0),
        precision="bf16",
    ),
}  # fmt: skip


class Cifar100(PhotoTask):
    """VGG-19 with batch norm on the first parts of the training set."""

    name = "cifar100"
    speed_ups = (3.0, 9.0)

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        self.recipe = _RECIPES[scale]
        narrow = f", channels / {WIDTH[scale]}" if WIDTH[scale] > 1 else ""
        self.title = f"VGG-19-BN{narrow} on CIFAR-100"
        sizes, folder = SIZES[scale], data_root() / "cifar100"
        require((folder / "labels.npz").is_file(), f"no CIFAR-100 in {folder}")
        with np.load(folder / "labels.npz", allow_pickle=False) as table:
            labels = {part: torch.from_numpy(table[f"{part}_labels"].astype(np.int64)) for part in ("train", "test")}
        x, v = _images(folder, "train", sizes.train + sizes.val), sizes.val
        self.split = Split(
            train_x=x[v:], train_y=labels["train"][v : len(x)], val_x=x[:v], val_y=labels["train"][:v],
            test_x=_images(folder, "test", sizes.test), test_y=labels["test"][: sizes.test],
        )  # fmt: skip

    def build(self) -> nn.Module:
        by = WIDTH[self.scale]
        return VGG([entry if isinstance(entry, str) else entry // by for entry in VGG19], num_classes=100)


def _images(folder: Path, part: str, count: int) -> Tensor:
    """The first ``count`` images, normalised, [n, 3, 32, 32]; the mosaics hold 10,000 each."""
    tiles = []
    for number in range(-(-count // 10_000)):
        path = folder / f"{part}_{number}.webp"
        require(path.is_file(), f"{path} is missing")
        with Image.open(path) as mosaic:
            rows = np.asarray(mosaic).reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
        tiles.append(rows[: count - 10_000 * number])
    x = torch.from_numpy(np.concatenate(tiles)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
