"""CIFAR-10: ResNet-20 and ResNet-56 with their published weights.

The weights were trained on all 50,000 training images, the validation images among them: their accuracy before and
right after surgery is flattered on the validation part, not on the test part.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from etp_graph.demo.data import DataError, cifar10, data_root, load_weights
from etp_graph.demo.models import CifarResNet

from .base import Recipe, Scale, require
from .images import PhotoTask, Sizes

SIZES = {
    "smoke": Sizes(train=60, val=20, test=20),
    "cpu": Sizes(train=10_000, val=1_000, test=4_000),
    "paper": Sizes(train=45_000, val=5_000, test=10_000),
}
_CPU = {
    20: Recipe(
        dense_steps=0, sparse_steps=150, finetune_steps=250, scratch_steps=600, dense_rate=0.1, sparse_rate=0.02,
        finetune_rate=0.05, batch_size=64, tune_share=0.2,
    ),
    56: Recipe(
        dense_steps=0, sparse_steps=60, finetune_steps=90, scratch_steps=220, dense_rate=0.1, sparse_rate=0.02,
        finetune_rate=0.05, batch_size=64, tune_share=0.2,
    ),
}  # fmt: skip
_PAPER = Recipe(  # 100 epochs of each phase, as DepGraph's authors take on CIFAR
    dense_steps=0, sparse_steps=35_100, finetune_steps=35_100, scratch_steps=105_300, dense_rate=0.1,
    sparse_rate=0.01, finetune_rate=0.01, batch_size=128, tune_share=0.1, pushes=(0.2, 0.6, 2.0, 6.0, 20.0),
)  # fmt: skip
_SMOKE = Recipe(
    dense_steps=0, sparse_steps=2, finetune_steps=2, scratch_steps=2, dense_rate=0.1, sparse_rate=0.02,
    finetune_rate=0.05, batch_size=16, tune_share=0.5, pushes=(1.0,),
)  # fmt: skip


class Cifar10(PhotoTask):
    """A CIFAR ResNet with option-A shortcuts."""

    speed_ups = (2.5, 5.0)
    checkpoint_note = "published weights (akamaster/pytorch_resnet_cifar10), the same for all seeds"

    def __init__(self, scale: Scale, *, depth: int) -> None:
        super().__init__(scale)
        self.depth = depth
        self.name = "cifar10" if depth == 20 else f"cifar10-resnet{depth}"
        self.title = f"ResNet-{depth} on CIFAR-10"
        self.recipe = {"smoke": _SMOKE, "cpu": _CPU[depth], "paper": _PAPER}[scale]
        weights = data_root() / "weights" / f"resnet{depth}_cifar10.safetensors"
        require(weights.is_file(), f"{weights} is missing")
        sizes = SIZES[scale]
        if scale == "cpu" and depth > 20:
            sizes = replace(sizes, val=500, test=2_000)
        try:
            self.split = cifar10(limit=sizes.train, validation=sizes.val, test_limit=sizes.test)
        except DataError as error:
            require(False, str(error))

    def build(self) -> nn.Module:
        return CifarResNet(self.depth)

    def start(self) -> nn.Module:
        model = self.build()
        load_weights(model, f"resnet{self.depth}_cifar10")
        return model
