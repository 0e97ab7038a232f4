"""The architectures of torchvision and of CIFAR in sizes for tests.

Built from torchvision's own classes, with fewer blocks and narrower layers where that only saves time: depth and
width are data to the tracer. ``python -m benchmarks coverage`` runs the models at full size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from torch import nn

from etp_graph.demo.zoo import models as cifar

models = pytest.importorskip("torchvision.models")

Build = Callable[[], nn.Module]


def alexnet() -> nn.Module:
    return _small_head(models.AlexNet(num_classes=10), (1, 4, 6))


def _vgg(name: str, *, norm: bool) -> nn.Module:
    from torchvision.models import vgg

    plan = [width if width == "M" else width // 8 for width in vgg.cfgs[name]]
    return _small_head(vgg.VGG(vgg.make_layers(plan, batch_norm=norm), num_classes=10, init_weights=False), (0, 3, 6))


def _small_head(model: nn.Module, at: tuple[int, int, int]) -> nn.Module:
    """The classifier's three linear layers, 48 and 40 wide; the widths of the original are most of its weights."""
    head = model.classifier
    last = [m for m in model.features.modules() if isinstance(m, nn.Conv2d)][-1].out_channels
    pixels = head[at[0]].in_features // (512 if len(model.features) > 13 else 256)
    head[at[0]], head[at[1]], head[at[2]] = nn.Linear(last * pixels, 48), nn.Linear(48, 40), nn.Linear(40, 10)
    return model


def _resnet(block: str, **options: int) -> nn.Module:
    from torchvision.models import resnet

    return resnet.ResNet(getattr(resnet, block), [1, 2, 1, 1], num_classes=10, **options)


def densenet() -> nn.Module:
    return models.DenseNet(8, (2, 3, 2, 2), num_init_features=16, num_classes=10)


def googlenet() -> nn.Module:
    return models.GoogLeNet(num_classes=10, init_weights=False)


def inception() -> nn.Module:
    # Its auxiliary head needs images of nearly 299 pixels; googlenet's, above, is checked in its stead.
    return models.Inception3(num_classes=10, init_weights=False, aux_logits=False)


def _mobilenet_v3(name: str) -> nn.Module:
    from torchvision.models import mobilenetv3

    setting, last = mobilenetv3._mobilenet_v3_conf(f"mobilenet_v3_{name}", width_mult=0.5)
    return models.MobileNetV3(setting, last // 4, num_classes=10)


def _efficientnet(name: str) -> nn.Module:
    from torchvision.models import efficientnet

    factors = {} if "v2" in name else {"width_mult": 0.25, "depth_mult": 0.5}
    setting, last = efficientnet._efficientnet_conf(f"efficientnet_{name}", **factors)
    if last is not None:
        for row in setting:
            row.input_channels, row.out_channels = row.input_channels // 8, row.out_channels // 8
            row.num_layers = min(row.num_layers, 2)
    return models.EfficientNet(setting, 0.2, last_channel=64, num_classes=10)


def _regnet(*, squeeze: float | None) -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    params = BlockParams.from_init_params(depth=6, w_0=16, w_a=8.0, w_m=2.0, group_width=8, se_ratio=squeeze)
    return RegNet(params, num_classes=10)


def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(16, 24, 2), CNBlockConfig(24, 40, 2), CNBlockConfig(40, None, 1)], num_classes=10)


def shufflenet() -> nn.Module:
    return models.ShuffleNetV2([2, 3, 2], [8, 16, 32, 64, 96], num_classes=10)


ZOO: dict[str, tuple[Build, int]] = {
    "alexnet": (alexnet, 64),
    **{f"vgg {name}{norm}": (partial(_vgg, name, norm=bool(norm)), 32) for name in "ABDE" for norm in ("", " bn")},
    "resnet18 34": (partial(_resnet, "BasicBlock"), 32),
    "resnet50 101 152": (partial(_resnet, "Bottleneck", width_per_group=16), 32),
    "resnext": (partial(_resnet, "Bottleneck", groups=4, width_per_group=4), 32),
    "wide_resnet": (partial(_resnet, "Bottleneck", width_per_group=32), 32),
    "densenet": (densenet, 32),
    "googlenet": (googlenet, 64),
    "inception_v3": (inception, 107),
    "squeezenet1_0": (partial(models.SqueezeNet, "1_0", num_classes=10), 64),
    "squeezenet1_1": (partial(models.SqueezeNet, "1_1", num_classes=10), 64),
    "mobilenet_v2": (partial(models.MobileNetV2, num_classes=10, width_mult=0.35), 32),
    "mobilenet_v3_small": (partial(_mobilenet_v3, "small"), 32),
    "mobilenet_v3_large": (partial(_mobilenet_v3, "large"), 32),
    "mnasnet": (partial(models.MNASNet, 0.35, num_classes=10), 32),
    "shufflenet_v2": (shufflenet, 32),
    "efficientnet b0-b7": (partial(_efficientnet, "b0"), 32),
    "efficientnet v2": (partial(_efficientnet, "v2_s"), 32),
    "regnet_x": (partial(_regnet, squeeze=None), 32),
    "regnet_y": (partial(_regnet, squeeze=0.25), 32),
    "convnext": (convnext, 32),
    "cifar resnet20": (cifar.resnet20, 32),
    "cifar resnet56": (partial(cifar.CifarResNet, 14), 16),
    "cifar resnet164": (partial(cifar.PreactResNet, 20), 16),
    "cifar vgg19_bn": (partial(cifar.VGG, (16, 16, "M", 32, 32, "M", 64, 64, "M", 64, "M", 64)), 32),
    "cifar densenet40": (partial(cifar.DenseNet, 13), 16),
}
