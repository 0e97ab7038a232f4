"""CIFAR-10: ResNet-20 and ResNet-56 with their published weights; DenseNet-40 and ResNet-164, trained first.

The published weights were trained on all 50,000 training images. At the scales ``cpu`` and ``paper`` the validation
images are among them: there the accuracy before and right after surgery is flattered on the validation part, not on the
test part. At ``full`` all 50,000 images train, and the validation part is the first 4,000 of the 10,000 test images.
The scale ``cpu`` has read those before. The test part is the other 6,000, which no shorter run has read.
On a CPU the networks without weights are shallower.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from benchmarks.tasks.base import Recipe, Scale, require
from benchmarks.tasks.images import PhotoTask, Sizes
from etp_graph.demo.zoo.data import DataError, Split, cifar10, data_root, load_weights
from etp_graph.demo.zoo.models import VGG, CifarResNet, DenseNet, PreactResNet

SIZES = {
    "smoke": Sizes(train=60, val=20, test=20),
    "cpu": Sizes(train=10_000, val=1_000, test=4_000),
    "full": Sizes(train=45_000, val=5_000, test=10_000),
    "paper": Sizes(train=45_000, val=5_000, test=10_000),
}
HELD_OUT = Sizes(train=50_000, val=4_000, test=6_000)
"""Of networks whose published weights know all training images: both parts are from the test images."""
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
VGG19: tuple[int | str, ...] = (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4)
"""Channels of its 16 convolutions; M: the image is halved."""
EPOCH = 390
"""Steps of a pass over 50,000 images in batches of 128."""
_FULL = {  # rates: `python -m benchmarks contest recipe cifar10`, whose lines a test compares with these
    20: Recipe(
        dense_steps=0, sparse_steps=2 * EPOCH, finetune_steps=4 * EPOCH, scratch_steps=30 * EPOCH, dense_rate=0.1,
        sparse_rate=0.01, finetune_rate=0.01, batch_size=128, tune_share=1.0, pushes=(0.2, 0.6, 2.0, 6.0),
        extensions=2, precision="bf16",
    ),
    56: Recipe(
        dense_steps=0, sparse_steps=3 * EPOCH, finetune_steps=12 * EPOCH, scratch_steps=30 * EPOCH, dense_rate=0.1,
        sparse_rate=0.02, finetune_rate=0.02, batch_size=128, tune_share=1.0, pushes=(0.2, 0.6, 2.0, 6.0),
        extensions=2, precision="bf16",
    ),
}  # fmt: skip
_FIRST_FULL = Recipe(  # of networks without weights: 45,000 images, 351 steps a pass
    dense_steps=40 * 351, sparse_steps=5 * 351, finetune_steps=10 * 351, scratch_steps=55 * 351, dense_rate=0.1,
    sparse_rate=0.02, finetune_rate=0.02, batch_size=128, tune_share=1.0, pushes=(0.2, 0.6, 2.0, 6.0), extensions=2,
)  # fmt: skip
_FIRST = Recipe(  # of networks without weights, on a CPU
    dense_steps=1_500, sparse_steps=150, finetune_steps=250, scratch_steps=1_900, dense_rate=0.1, sparse_rate=0.02,
    finetune_rate=0.05, batch_size=64, tune_share=0.2,
)  # fmt: skip
_PAPER = Recipe(  # 100 epochs of each phase, as DepGraph's authors take on CIFAR
    dense_steps=0, sparse_steps=35_100, finetune_steps=35_100, scratch_steps=105_300, dense_rate=0.1,
    sparse_rate=0.01, finetune_rate=0.01, batch_size=128, tune_share=0.1, pushes=(0.2, 0.6, 2.0, 6.0, 20.0),
    precision="bf16",
)  # fmt: skip
_SMOKE = Recipe(
    dense_steps=0, sparse_steps=2, finetune_steps=2, scratch_steps=2, dense_rate=0.1, sparse_rate=0.02,
    finetune_rate=0.05, batch_size=16, tune_share=0.5, pushes=(1.0,),
)  # fmt: skip


class Cifar10(PhotoTask):
    """A network on CIFAR-10; subclasses say which."""

    speed_ups = (2.5, 5.0)

    def __init__(self, scale: Scale, *, sizes: Sizes, held_out: bool = False) -> None:
        super().__init__(scale)
        try:
            self.split = _held_out(sizes) if held_out else cifar10(
                limit=sizes.train, validation=sizes.val, test_limit=sizes.test
            )  # fmt: skip
        except DataError as error:
            require(False, str(error))


class Pretrained(Cifar10):
    """A CIFAR ResNet with option-A shortcuts."""

    checkpoint_note = "published weights (akamaster/pytorch_resnet_cifar10), the same for all seeds"

    def __init__(self, scale: Scale, *, depth: int) -> None:
        weights = data_root() / "weights" / f"resnet{depth}_cifar10.safetensors"
        require(weights.is_file(), f"{weights} is missing")
        less = {"val": 500, "test": 2_000} if scale == "cpu" and depth > 20 else {}
        held_out = scale == "full"
        super().__init__(scale, sizes=HELD_OUT if held_out else replace(SIZES[scale], **less), held_out=held_out)
        self.depth = depth
        self.name = "cifar10" if depth == 20 else f"cifar10-resnet{depth}"
        self.title = f"ResNet-{depth} on CIFAR-10"
        self.recipe = {"smoke": _SMOKE, "cpu": _CPU[depth], "full": _FULL[depth], "paper": _PAPER}[scale]

    def build(self) -> nn.Module:
        return CifarResNet(self.depth)

    def start(self) -> nn.Module:
        model = self.build()
        load_weights(model, f"resnet{self.depth}_cifar10")
        return model


class Untrained(Cifar10):
    """A network of Torque's tables, for which there are no published weights."""

    def __init__(self, scale: Scale, *, kind: type[DenseNet] | type[PreactResNet]) -> None:
        super().__init__(scale, sizes=SIZES[scale])
        self.kind, (family, depths) = kind, _DEPTHS[kind]
        self.depth = depths[scale]
        self.name = f"cifar10-{family.lower()}{depths['paper']}"
        self.title = f"{family}-{self.depth} on CIFAR-10"
        first = {"dense_steps": 2, "dense_rate": 0.05}
        paper = replace(_PAPER, dense_steps=70_200, scratch_steps=140_400)
        self.recipe = {
            "smoke": replace(_SMOKE, **first), "cpu": _FIRST, "full": _FIRST_FULL, "paper": paper,
        }[scale]  # fmt: skip

    def build(self) -> nn.Module:
        return self.kind(self.depth)


class Vgg19(Cifar10):
    """VGG-19 with batch norm, a quarter of its channels, trained first: the network of Torque's figures."""

    name = "cifar10-vgg19"

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale, sizes=SIZES[scale])
        self.divided_by = 1 if scale == "paper" else 16 if scale == "smoke" else 4
        narrow = f", channels / {self.divided_by}" if self.divided_by > 1 else ""
        self.title = f"VGG-19-BN{narrow} on CIFAR-10"
        first, paper = {"dense_steps": 2, "dense_rate": 0.05}, {"dense_steps": 70_200, "scratch_steps": 140_400}
        self.recipe = {
            "smoke": replace(_SMOKE, **first), "cpu": replace(_FIRST, dense_rate=0.05),
            "full": replace(_FIRST_FULL, dense_rate=0.05), "paper": replace(_PAPER, **paper),
        }[scale]  # fmt: skip

    def build(self) -> nn.Module:
        return VGG([c if isinstance(c, str) else c // self.divided_by for c in VGG19], num_classes=10)


def _held_out(sizes: Sizes) -> Split:
    """All training images, and a validation part that was carved from the test images."""
    whole = cifar10(limit=sizes.train, validation=0, test_limit=sizes.val + sizes.test)
    x, y = whole.test_x, whole.test_y
    return replace(whole, val_x=x[: sizes.val], val_y=y[: sizes.val], test_x=x[sizes.val :], test_y=y[sizes.val :])


_DEPTHS: dict[type[nn.Module], tuple[str, dict[Scale, int]]] = {
    DenseNet: ("DenseNet", {"smoke": 10, "cpu": 22, "full": 22, "paper": 40}),
    PreactResNet: ("ResNet", {"smoke": 11, "cpu": 29, "full": 29, "paper": 164}),
}
