"""Named image classifiers with example inputs: torchvision's without attention, and those of the CIFAR literature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etp_graph.demo import models as cifar

ATTENTION = ("maxvit", "swin", "vit_")
"""Families of torchvision's classifiers that mix positions by attention; everything else is in the registry."""

CIFAR: dict[str, Callable[[], nn.Module]] = {
    "cifar_resnet20": cifar.resnet20,
    "cifar_resnet56": cifar.resnet56,
    "cifar_resnet164": cifar.resnet164,
    "cifar_vgg19_bn": cifar.vgg19_bn,
    "cifar_densenet40": cifar.densenet40,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model of the registry.

    Attributes:
        name: name in the registry; torchvision's own name for its models.
        build: makes the model in eval mode, with the initial weights of its authors.
        size: height and width in pixels of the images that it was designed for.
        small: the least size, rounded up, that its strides and pools allow.
    """

    name: str
    build: Callable[[], nn.Module]
    size: int
    small: int

    def inputs(self, size: int | None = None, *, batch: int = 1, seed: int = 0) -> Tensor:
        """Normal noise, [batch, 3, size, size]."""
        size = self.size if size is None else size
        return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def registry() -> dict[str, Entry]:
    """Every model by name; CIFAR's first, then torchvision's in alphabetical order, if torchvision is installed."""
    entries = {name: Entry(name=name, build=_evaluated(build), size=32, small=32) for name, build in CIFAR.items()}
    try:
        from torchvision import models
    except ImportError:
        return entries
    for name in sorted(models.list_models(module=models)):
        if not name.startswith(ATTENTION):
            size, small = (299, 299) if name == "inception_v3" else (224, 64)
            entries[name] = Entry(name=name, build=_evaluated(_torchvision(name)), size=size, small=small)
    return entries


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        # Their default initialisation draws truncated normals through scipy, which takes half a minute.
        slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model: nn.Module = models.get_model(name, weights=None, **slow)
        return model

    return build


def _evaluated(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: build().eval()
