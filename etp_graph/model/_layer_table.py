"""Layer table: functions that layers call, axes of their tensors that hold units, attributes that count the units.

The tracer recognises a layer by the function of ``torch.nn.functional`` that it calls, not by its class. A subclass
with its own forward (torchvision's ``LayerNorm2d``), a functional call on a bare parameter and the plain module
therefore use the same row. Only the attributes are looked up by class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from enum import Enum
from numbers import Integral
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor, nn

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixingLayer:
    """Layer that computes new output units from all its input units.

    Attributes:
        arguments: names of the positional arguments of the function.
        spatial: number of spatial dimensions; the channels are at ``-(spatial + 1)`` of input and output.
        out_axis, in_axis: axes of the weight that belong to the output and to the input units.
        kind: kind of the output units.
    """

    arguments: tuple[str, ...]
    spatial: int
    out_axis: int = 0
    in_axis: int = 1
    kind: str = "channels"

    @property
    def transposed(self) -> bool:
        """Return True if each input position (not each output position) is multiplied with the whole kernel."""
        return self.out_axis == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelwiseLayer:
    """Layer that works on each channel separately, or normalises over channels, and owns tensors along the channels.

    Attributes:
        arguments: names of the positional arguments of the function.
        tensors: names of the arguments that are tensors of shape [channels].
        trailing: whether the channels are the last dimensions, as many as ``normalized_shape`` has, not dimension 1.
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


def is_weightless_norm(func: Callable[..., Any], call: Mapping[str, Any]) -> bool:
    """Return True for a call of a norm that reduces over channels and has no weight that shows which ones."""
    return func in (F.layer_norm, F.rms_norm, F.group_norm) and call.get("weight") is None


POOLS: Mapping[Callable[..., Any], int] = {
    F.adaptive_avg_pool1d: 1,
    F.adaptive_avg_pool2d: 2,
    F.adaptive_avg_pool3d: 3,
}
"""Pooling functions -> number of spatial dimensions, if their operator depends on the memory format.

The tracer follows the operators of all other pooling functions.
"""

EMBEDDING_ARGUMENTS = ("input", "weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class CountingAttributes:
    """Attributes of a module class that count its output units, its input units, and the groups of a convolution."""

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
    nn.RNNBase: CountingAttributes(out="hidden_size", into="input_size"),  # proj_size: see recurrent.py
    nn.modules.rnn.RNNCellBase: CountingAttributes(out="hidden_size", into="input_size"),
}

ATTRIBUTES_BY_NAME: Mapping[str, CountingAttributes] = {
    "torch_geometric.nn.dense.linear.Linear": CountingAttributes(out="out_channels", into="in_channels"),
    "torchvision.ops.deform_conv.DeformConv2d": CountingAttributes(out="out_channels", into="in_channels"),
    "transformers.pytorch_utils.Conv1D": CountingAttributes(out="nf", into="nx"),
}
"""Full class name -> attributes, for classes of libraries that this module does not import."""

PADDINGS: dict[type[nn.Module], tuple[str, str]] = {}
"""Module classes that pad the channels with zeros -> names of the attributes for the widths before and after."""

M = TypeVar("M", bound=type[nn.Module])


def register_padding(cls: M, *, before: str = "before", after: str = "after") -> M:
    """Declare that ``cls.forward`` pads its channels by the widths in two integer attributes of the module.

    Surgery then lowers these widths when it removes units that are added to the padding (option A shortcut of CIFAR
    ResNets). The padding of other modules has a fixed width, so units that are added to it are locked. Can be used as a
    class decorator.
    """
    PADDINGS[cls] = (before, after)
    return cls


def counting_attributes(module: nn.Module | None) -> CountingAttributes:
    """Return the attributes of the module's class or of its nearest base class; an empty row if there are none."""
    for cls in type(module).__mro__:
        if cls in ATTRIBUTES:
            return ATTRIBUTES[cls]
        if (name := f"{cls.__module__}.{cls.__qualname__}") in ATTRIBUTES_BY_NAME:
            return ATTRIBUTES_BY_NAME[name]
    return CountingAttributes()


def bind_arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name. Builtins such as ``F.conv2d`` have no signature to inspect."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


_NO_COUNTS = frozenset(
    "training kernel_size stride padding dilation output_padding output_size padding_idx upscale_factor "
    "downscale_factor scale_factor start_dim end_dim dim num_layers bidirectional".split()
)
"""Attributes of PyTorch's own layers that are integers and count no units."""


def is_editable(module: nn.Module, name: str) -> bool:
    """Return True if surgery may write this integer attribute. In a layer of the table, it must count units.

    A subclass may have attributes of its own that count units, such as the experts of a router that is a linear layer.
    """
    row = counting_attributes(module)
    if row != CountingAttributes():
        return name in (row.out, row.into, row.groups, "proj_size") or _is_of_subclass(module, name)
    return name not in _NO_COUNTS or not type(module).__module__.startswith("torch.nn.")


def _is_of_subclass(module: nn.Module, name: str) -> bool:
    """Return True if the class is not PyTorch's own, and PyTorch's own class has no attribute of this name."""
    own = [cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.")]
    constants = {constant for cls in own for constant in getattr(cls, "__constants__", ())}
    return type(module) not in own and own[0] is not nn.Module and name not in _NO_COUNTS | constants


_SIZES: MutableMapping[type[nn.Module], Mapping[str, int]] = WeakKeyDictionary()
"""Results of :func:`sizes_of_class`. Weak keys let classes go that a program makes while it runs."""


def sizes_of_class(cls: type[nn.Module]) -> Mapping[str, int]:
    """Return the integers above 1 among the attributes of a class and its bases, without those of PyTorch.

    Surgery lowers such a size on the instance only.
    """
    found = _SIZES.get(cls)
    if found is None:
        found = _SIZES[cls] = _find_sizes(cls)
    return found


def _find_sizes(cls: type[nn.Module]) -> Mapping[str, int]:
    own = [base for base in reversed(cls.__mro__) if not base.__module__.startswith("torch.")]
    found = {name: value for base in own for name, value in vars(base).items()}
    return {name: n for name, n in found.items() if type(n) is int and n > 1 and not name.startswith("_")}


def as_count(value: object) -> int | None:
    """Return a size as a plain integer, also one of NumPy or a tensor with one integer; ``None`` for anything else.

    Code that computes a width with arrays or tensors passes such values to layers, which keep them.
    """
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta:
        value = value.item()
    return int(value) if isinstance(value, Integral) and not isinstance(value, (bool, Enum)) else None


def held_size(module: nn.Module, name: str) -> Any:
    """Return an attribute of a module or a size of its class, without calling a property; ``None`` if there is none."""
    of_class: Any = type(module)
    return vars(module).get(name, sizes_of_class(of_class).get(name))
