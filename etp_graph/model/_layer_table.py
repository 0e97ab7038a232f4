"""The layer table: which function a layer calls, which axes of its tensors hold channels, which attributes count them.

Layers are recognised by the function of ``torch.nn.functional`` that they call, not by their class: a subclass
with a forward of its own (torchvision's ``LayerNorm2d``), a functional call on a bare parameter and the plain
module take the same row. Classes appear only where attributes have to follow the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import nn

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixingLayer:
    """A layer that mixes its input units into new output units.

    Attributes:
        arguments: names of the positional arguments of the function.
        spatial: number of spatial dimensions; the channels are at ``-(spatial + 1)`` of input and output.
        out_axis, in_axis: axes of the weight that belong to the output and to the input units.
        kind: what an output unit is called.
    """

    arguments: tuple[str, ...]
    spatial: int
    out_axis: int = 0
    in_axis: int = 1
    kind: str = "channels"

    @property
    def transposed(self) -> bool:
        """Whether every input position (not every output position) meets the whole kernel."""
        return self.out_axis == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelwiseLayer:
    """A layer that works on every channel by itself (or normalises over them) and owns tensors along the channels.

    Attributes:
        arguments: names of the positional arguments of the function.
        tensors: those arguments that are tensors of shape [channels].
        trailing: the channels are the trailing dimensions that ``normalized_shape`` names, not dimension 1.
    """

    arguments: tuple[str, ...]
    tensors: tuple[str, ...]
    trailing: bool = False


MIXING_LAYERS: Mapping[Callable[..., Any], MixingLayer] = {
    F.conv1d: MixingLayer(arguments=_CONV, spatial=1),
    F.conv2d: MixingLayer(arguments=_CONV, spatial=2),
    F.conv3d: MixingLayer(arguments=_CONV, spatial=3),
    F.conv_transpose1d: MixingLayer(arguments=_TRANSPOSED, spatial=1, out_axis=1, in_axis=0),
    F.conv_transpose2d: MixingLayer(arguments=_TRANSPOSED, spatial=2, out_axis=1, in_axis=0),
    F.conv_transpose3d: MixingLayer(arguments=_TRANSPOSED, spatial=3, out_axis=1, in_axis=0),
    F.linear: MixingLayer(arguments=("input", "weight", "bias"), spatial=0, kind="neurons"),
}

CHANNELWISE_LAYERS: Mapping[Callable[..., Any], ChannelwiseLayer] = {
    F.batch_norm: ChannelwiseLayer(
        arguments=("input", "running_mean", "running_var", "weight", "bias"),
        tensors=("running_mean", "running_var", "weight", "bias"),
    ),
    F.instance_norm: ChannelwiseLayer(
        arguments=("input", "running_mean", "running_var", "weight", "bias"),
        tensors=("running_mean", "running_var", "weight", "bias"),
    ),
    F.group_norm: ChannelwiseLayer(arguments=("input", "num_groups", "weight", "bias"), tensors=("weight", "bias")),
    F.layer_norm: ChannelwiseLayer(
        arguments=("input", "normalized_shape", "weight", "bias"), tensors=("weight", "bias"), trailing=True
    ),
    F.rms_norm: ChannelwiseLayer(arguments=("input", "normalized_shape", "weight"), tensors=("weight",), trailing=True),
    F.prelu: ChannelwiseLayer(arguments=("input", "weight"), tensors=("weight",)),
}

POOLS: Mapping[Callable[..., Any], int] = {
    F.adaptive_avg_pool1d: 1,
    F.adaptive_avg_pool2d: 2,
    F.adaptive_avg_pool3d: 3,
}
"""Pools whose operators depend on the memory format -> number of spatial dimensions; the others are operators."""

EMBEDDING_ARGUMENTS = ("input", "weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class CountingAttributes:
    """The attributes of a module class that count output units, input units, and groups of a grouped convolution."""

    out: str | None = None
    into: str | None = None
    groups: str | None = None


ATTRIBUTES: Mapping[type[nn.Module], CountingAttributes] = {
    nn.modules.conv._ConvNd: CountingAttributes(out="out_channels", into="in_channels", groups="groups"),
    nn.Linear: CountingAttributes(out="out_features", into="in_features"),
    nn.modules.batchnorm._NormBase: CountingAttributes(into="num_features"),
    nn.GroupNorm: CountingAttributes(into="num_channels"),
    nn.LayerNorm: CountingAttributes(into="normalized_shape"),
    nn.RMSNorm: CountingAttributes(into="normalized_shape"),
    nn.PReLU: CountingAttributes(into="num_parameters"),
    nn.Embedding: CountingAttributes(out="embedding_dim"),
    nn.RNNBase: CountingAttributes(out="hidden_size", into="input_size"),  # and proj_size, see recurrent.py
    nn.modules.rnn.RNNCellBase: CountingAttributes(out="hidden_size", into="input_size"),
}

ATTRIBUTES_BY_NAME: Mapping[str, CountingAttributes] = {
    "torch_geometric.nn.dense.linear.Linear": CountingAttributes(out="out_channels", into="in_channels"),
    "transformers.pytorch_utils.Conv1D": CountingAttributes(out="nf", into="nx"),
}
"""The same for classes of libraries that are not imported for it."""

PADDINGS: dict[type[nn.Module], tuple[str, str]] = {}
"""Module classes that pad the channels with zeros -> their attributes for the widths before and after."""

M = TypeVar("M", bound=type[nn.Module])


def register_padding(cls: M, *, before: str = "before", after: str = "after") -> M:
    """Declare that ``cls.forward`` pads its channels by the widths in two integer attributes of the module.

    Surgery then narrows the padding with the units that meet it (CIFAR ResNet's option A shortcut); the padding
    of any other module has a fixed width, and the units that meet it are locked. Also a class decorator.
    """
    PADDINGS[cls] = (before, after)
    return cls


def counting_attributes(module: nn.Module | None) -> CountingAttributes:
    """The row of the module's class or of its nearest base class; an empty row if there is none."""
    for cls in type(module).__mro__:
        if cls in ATTRIBUTES:
            return ATTRIBUTES[cls]
        if (name := f"{cls.__module__}.{cls.__qualname__}") in ATTRIBUTES_BY_NAME:
            return ATTRIBUTES_BY_NAME[name]
    return CountingAttributes()


def bind_arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name; builtins such as ``F.conv2d`` have no signature to inspect."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def is_editable(module: nn.Module, name: str) -> bool:
    """Whether surgery may write this integer of this module: of a layer of the table only what counts its units."""
    row = counting_attributes(module)
    return row == CountingAttributes() or name in (row.out, row.into, row.groups, "proj_size")
