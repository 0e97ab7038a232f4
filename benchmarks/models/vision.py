"""Image classifiers: torchvision's, and those of the CIFAR literature."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from benchmarks.models.entry import Entry, entry, images
from etp_graph.demo.zoo import models as cifar

CIFAR: dict[str, Callable[[], nn.Module]] = {
    "cifar_resnet20": cifar.resnet20,
    "cifar_resnet56": cifar.resnet56,
    "cifar_resnet164": cifar.resnet164,
    "cifar_vgg19_bn": cifar.vgg19_bn,
    "cifar_densenet40": cifar.densenet40,
}

SIZES: dict[str, tuple[int, int]] = {
    "inception_v3": (299, 299),
    "maxvit_t": (224, 224),  # its windows divide 224 only
    "swin_v2_t": (256, 64),
    "swin_v2_s": (256, 64),
    "swin_v2_b": (256, 64),
}
"""Height and width of the images where they are not 224, and the least that strides, pools and windows allow if not 64.
A name that starts with ``vit_`` has as many position embeddings as 224 pixels need."""


def entries() -> Iterator[Entry]:
    """CIFAR's models, then torchvision's classifiers in alphabetical order, if torchvision is installed."""
    for name, build in CIFAR.items():
        yield entry(name, "vision", build, images(32))
    try:
        from torchvision import models
    except ImportError:
        return
    for name in sorted(models.list_models(module=models)):
        size, small = (224, 224) if name.startswith("vit_") else SIZES.get(name, (224, 64))
        yield entry(name, "vision", _torchvision(name), images(size), images(small))


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        # Their default initialisation draws truncated normals through scipy, which takes half a minute.
        slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model: nn.Module = models.get_model(name, weights=None, **slow)
        return model

    return build
