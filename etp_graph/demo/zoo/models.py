"""Image classifiers of the pruning literature for 32x32 images, and a small residual network for 8x8 digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etp_graph.model import register_padding

Int2 = tuple[int, int]


def _conv3x3(channels: Int2, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(*channels, 3, stride=stride, padding=1, bias=False)


def _projection(channels: Int2, stride: int) -> nn.Module:
    """Return a 1x1 convolution and norm if the shape changes, else the identity (option B)."""
    if stride == 1 and channels[0] == channels[1]:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(*channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels[1]))


def _padding(channels: Int2, stride: int) -> nn.Module:
    """Return a padded shortcut if the shape changes, else the identity (option A)."""
    added = channels[1] - channels[0]
    if stride == 1 and added == 0:
        return nn.Identity()
    return PaddedShortcut(stride=stride, before=added // 2, after=added - added // 2)


class BasicBlock(nn.Module):
    """Residual block conv-bn-relu-conv-bn plus shortcut, then relu (He et al. 2016)."""

    def __init__(self, channels: Int2, stride: int, *, shortcut: Callable[[Int2, int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels, stride)
        self.bn1 = nn.BatchNorm2d(channels[1])
        self.conv2 = _conv3x3((channels[1], channels[1]))
        self.bn2 = nn.BatchNorm2d(channels[1])
        self.shortcut = shortcut(channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, c_in, h, w] to [n, c_out, h / stride, w / stride]."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class PreactBottleneck(nn.Module):
    """Residual block of three times bn-relu-conv (1x1, 3x3, 1x1) plus shortcut (He et al. 2016b).

    If the shape changes, the shortcut projects the activated input; else it is the identity.
    """

    def __init__(self, channels: Int2, stride: int) -> None:
        super().__init__()
        c_in, c_out = channels
        middle = c_out // 4
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, middle, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv2 = _conv3x3((middle, middle), stride)
        self.bn3 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, c_out, 1, bias=False)
        same = stride == 1 and c_in == c_out
        self.shortcut = None if same else nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, c_in, h, w] to [n, c_out, h / stride, w / stride]."""
        active = F.relu(self.bn1(x))
        identity: Tensor = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv3(F.relu(self.bn3(self.conv2(F.relu(self.bn2(self.conv1(active)))))))
        return identity + out


def _stage(block: Callable[[Int2, int], nn.Module], channels: Int2, *, blocks: int, stride: int) -> nn.Sequential:
    """Return a stage of blocks, of which only the first changes the shape."""
    same = (channels[1], channels[1])
    return nn.Sequential(block(channels, stride), *(block(same, 1) for _ in range(blocks - 1)))


class SmallResNet(nn.Module):
    """Residual network for 8x8 images with one channel; [n, 1, 8, 8] to [n, classes].

    Args:
        widths: channels of each stage; every stage but the first halves the image, through a projection.
        blocks: residual blocks in each stage.
        num_classes: number of outputs.
    """

    def __init__(self, *, widths: Sequence[int] = (16, 32, 64), blocks: int = 2, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = _conv3x3((1, widths[0]))
        self.bn1 = nn.BatchNorm2d(widths[0])
        block = partial(BasicBlock, shortcut=_projection)
        shapes = enumerate(pairwise((widths[0], *widths)))
        stages = [_stage(block, shape, blocks=blocks, stride=2 if i else 1) for i, shape in shapes]
        self.layers = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[-1], num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return _logits(self.pool, self.linear, self.layers(F.relu(self.bn1(self.conv1(x)))))


class CifarResNet(nn.Module):
    """CIFAR ResNet of He et al. 2016 with option-A shortcuts; [n, 3, 32, 32] to [n, classes].

    Args:
        depth: 6n + 2, with n blocks in each of three stages of 16, 32 and 64 channels.
        num_classes: number of outputs.
    """

    def __init__(self, depth: int = 20, *, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"CifarResNet: depth {depth} is not 6n + 2; take 20, 32, 44, 56 or 110.")
        blocks = (depth - 2) // 6
        block = partial(BasicBlock, shortcut=_padding)
        self.conv1 = _conv3x3((3, 16))
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(block, (16, 16), blocks=blocks, stride=1)
        self.layer2 = _stage(block, (16, 32), blocks=blocks, stride=2)
        self.layer3 = _stage(block, (32, 64), blocks=blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        out = F.relu(self.bn1(self.conv1(x)))
        return _logits(self.pool, self.linear, self.layer3(self.layer2(self.layer1(out))))


class PreactResNet(nn.Module):
    """Pre-activation bottleneck ResNet for CIFAR (He et al. 2016b); [n, 3, 32, 32] to [n, classes].

    Args:
        depth: 9n + 2, with n blocks in each of three stages of 64, 128 and 256 channels.
        num_classes: number of outputs.
    """

    def __init__(self, depth: int = 164, *, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 11 or (depth - 2) % 9:
            raise ValueError(f"PreactResNet: depth {depth} is not 9n + 2; take 29, 56, 110 or 164.")
        blocks = (depth - 2) // 9
        self.conv1 = _conv3x3((3, 16))
        shapes = enumerate(pairwise((16, 64, 128, 256)))
        stages = [_stage(PreactBottleneck, shape, blocks=blocks, stride=2 if i else 1) for i, shape in shapes]
        self.layers = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(256)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(256, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return _logits(self.pool, self.linear, F.relu(self.bn(self.layers(self.conv1(x)))))


class VGG(nn.Module):
    """VGG with BatchNorm for CIFAR; [n, 3, 32, 32] to [n, classes].

    Args:
        layout: output channels of each 3x3 convolution; ``"M"`` halves the image by max pooling.
        num_classes: number of outputs.
    """

    def __init__(self, layout: Sequence[int | str], *, num_classes: int = 100) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        c_in = 3
        for entry in layout:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [_conv3x3((c_in, entry)), nn.BatchNorm2d(entry), nn.ReLU(inplace=True)]
            c_in = entry
        self.features = nn.Sequential(*layers)
        self.pool = nn.AvgPool2d(2)
        self.linear = nn.Linear(c_in, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return _logits(self.pool, self.linear, self.features(x))


class DenseLayer(nn.Module):
    """Layer bn-relu-conv whose output is concatenated to its input (Huang et al. 2017)."""

    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(c_in)
        self.conv = _conv3x3((c_in, growth))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, c_in, h, w] to [n, c_in + growth, h, w]."""
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


class DenseNet(nn.Module):
    """DenseNet without bottlenecks and compression (Huang et al. 2017); [n, 3, 32, 32] to [n, classes].

    Args:
        depth: 3n + 4, with n layers in each of three dense blocks.
        growth: number of channels that each layer adds.
        num_classes: number of outputs.
    """

    def __init__(self, depth: int = 40, *, growth: int = 12, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 7 or (depth - 4) % 3:
            raise ValueError(f"DenseNet: depth {depth} is not 3n + 4; take 40 or 100.")
        channels = 16
        self.conv1 = _conv3x3((3, channels))
        layers: list[nn.Module] = []
        for block in range(3):
            for _ in range((depth - 4) // 3):
                layers.append(DenseLayer(channels, growth))
                channels += growth
            if block < 2:
                transition = nn.Conv2d(channels, channels, 1, bias=False)
                layers += [nn.BatchNorm2d(channels), nn.ReLU(), transition, nn.AvgPool2d(2)]
        self.layers = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return _logits(self.pool, self.linear, F.relu(self.bn(self.layers(self.conv1(x)))))


def _logits(pool: nn.Module, linear: nn.Module, x: Tensor) -> Tensor:
    """Pool [n, c, h, w] and classify."""
    logits: Tensor = linear(pool(x).flatten(1))
    return logits


def _initialise(model: nn.Module) -> None:
    """Initialise every convolution with normal weights as He et al. 2015; keep the default for the classifier."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet20(num_classes: int = 10) -> CifarResNet:
    """Return ResNet-20 for CIFAR, option A: 269,722 parameters at 10 classes."""
    return CifarResNet(20, num_classes=num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """Return ResNet-56 for CIFAR, option A: 853,018 parameters at 10 classes."""
    return CifarResNet(56, num_classes=num_classes)


def resnet164(num_classes: int = 10) -> PreactResNet:
    """Return pre-activation bottleneck ResNet-164 for CIFAR: 1.7 M parameters."""
    return PreactResNet(164, num_classes=num_classes)


def vgg19_bn(num_classes: int = 100) -> VGG:
    """Return VGG-19 with BatchNorm for CIFAR: 20.08 M parameters at 100 classes."""
    m = "M"
    return VGG((64, 64, m, 128, 128, m, *[256] * 4, m, *[512] * 4, m, *[512] * 4), num_classes=num_classes)


def densenet40(num_classes: int = 10) -> DenseNet:
    """Return DenseNet-40 with growth 12 for CIFAR: 1.0 M parameters."""
    return DenseNet(40, num_classes=num_classes)


@register_padding
class PaddedShortcut(nn.Module):
    """Shortcut that subsamples rows and columns and adds zero channels (He et al. 2016, option A).

    It keeps every ``stride``-th row and column, and adds ``before`` zero channels before the input's channels and
    ``after`` zero channels after them: [n, c, h, w] to [n, before + c + after, ceil(h / stride), ceil(w / stride)].
    """

    def __init__(self, *, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and pad; for shapes see the class."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return f"stride={self.stride}, before={self.before}, after={self.after}"
