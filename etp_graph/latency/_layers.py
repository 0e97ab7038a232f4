"""Record the layers behind a plan's cost terms, and run each of them at other sizes for timing.

One dense forward is recorded. A convolution, a linear or a recurrent layer is then rebuilt with new weights at any
size of its two weight axes. Products of tensors (attention) are recorded as the low-level operators that run, and are
repeated with fewer heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from etp_graph.model import (
    ATTRIBUTES_BY_NAME,
    ModuleStack,
    counting_attributes,
    named_tensors,
    plain_forward,
    preserved_rng,
    without_attention_fast_path,
)
from etp_graph.plan import Op, Plan

from ._clock import Call, device_of, forwards

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}

_BATCHED = {"bmm": 0, "baddbmm": 0}

_ATTENTION = "_scaled_dot_product"

ROOT = "the model's forward"
"""Name of the model itself in the plan's cost terms."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TimedLayer:
    """Module that applies one weight with two channel axes to one input.

    Attributes:
        name: name of the module.
        module: the module. Only its settings are read, not its weights.
        weight: name of the weight; for a recurrent layer ``weight_ih_l0``, the first one applied to the input.
        sizes: sizes of the weight's first two axes.
        shape: shape of the input.
        dtype: element type of the input.
        device: device of the input.
    """

    name: str
    module: nn.Module
    weight: str
    sizes: tuple[int, int]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def key(self) -> tuple[Any, ...]:
        """Return a key that is equal for layers that take the same time."""
        names = "kernel_size stride padding output_padding dilation groups mode num_layers bidirectional".split()
        settings = tuple(str(getattr(self.module, name, None)) for name in names)
        return type(self.module), settings, self.sizes, self.shape, self.dtype, self.device

    def call(self, sizes: tuple[int, ...]) -> Call:
        """Return a function that runs one forward with these sizes of the weight's two axes.

        Only recurrent layers have a bias.
        """
        module, (a, b) = self.module, (sizes[0], sizes[1])
        if isinstance(module, nn.RNNBase):
            return self._recurrent(module, max(1, round(a / _GATES[module.mode])), b)
        if not isinstance(module, nn.modules.conv._ConvNd):
            weight, x = self._zeros(a, b), self._input(b if isinstance(module, nn.Linear) else a, -1)
            if isinstance(module, nn.Linear):
                return lambda: F.linear(x, weight)
            return lambda: torch.mm(x.flatten(0, -2), weight)
        spatial = len(module.kernel_size)
        if module.transposed:
            weight, x = self._zeros(a, b, *module.kernel_size), self._input(a, -spatial - 1)
            function: Callable[..., Tensor] = getattr(F, f"conv_transpose{spatial}d")
            return lambda: function(
                x, weight, None, module.stride, module.padding, module.output_padding, 1, module.dilation
            )
        groups = module.groups if self.sizes[1] > 1 else max(1, a * module.groups // module.out_channels)
        weight = self._zeros(-(-a // groups) * groups, b, *module.kernel_size)
        x = self._input(b * groups, -spatial - 1)
        function = getattr(F, f"conv{spatial}d")
        return lambda: function(x, weight, None, module.stride, module.padding, module.dilation, groups)

    def _recurrent(self, module: nn.RNNBase, hidden: int, width: int) -> Call:
        kind = nn.RNN if module.mode.startswith("RNN") else getattr(nn, module.mode)
        own = kind(
            width, hidden, module.num_layers, batch_first=module.batch_first, bidirectional=module.bidirectional,
            device=self.device, dtype=self.dtype,
        ).eval()  # fmt: skip
        x = self._input(width, -1)
        return lambda: own(x)

    def _input(self, channels: int, axis: int) -> Tensor:
        shape = list(self.shape)
        shape[axis] = channels
        return self._zeros(*shape)

    def _zeros(self, *shape: int) -> Tensor:
        # zeros leave the random state unchanged, and avoid denormal numbers, which are slow
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TimedProducts:
    """Operators of one module that multiply tensors, such as those of an attention, with an axis of heads.

    Attributes:
        name: name of the module.
        size: number of heads, or of matrices in a batch.
        calls: (operator, arguments, keyword arguments) of each call, with shapes in place of tensors.
        device: device that they run on.
    """

    name: str
    size: int
    calls: tuple[tuple[Any, Any, Any], ...]
    device: torch.device

    @property
    def key(self) -> tuple[Any, ...]:
        """Return a key that is equal for products that take the same time."""
        return self.size, self.device, str(self.calls)

    def call(self, sizes: tuple[int, ...]) -> Call:
        """Return a function that runs all operators with ``sizes[0]`` heads."""
        count = sizes[0]

        def smaller(axis: int | None, value: Any) -> Any:
            if not isinstance(value, _Shape):
                return value
            shape = list(value.shape)
            if axis is not None and len(shape) > axis and shape[axis] % self.size == 0:
                shape[axis] = shape[axis] // self.size * count
            return torch.zeros(shape, dtype=value.dtype, device=self.device)

        made = [
            (func, *(tree_map(partial(smaller, _axis(func)), part) for part in parts)) for func, *parts in self.calls
        ]

        def everything() -> None:
            for func, args, kwargs in made:
                func(*args, **kwargs)

        return everything


@dataclass(frozen=True, slots=True)
class _Shape:
    """Shape and element type of a tensor, recorded in its place."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _axis(func: Any) -> int | None:
    """Return the axis of heads of an operator's tensors; ``None`` for an operator that is no product."""
    name = func._overloadpacket.__name__
    return 1 if name.startswith(_ATTENTION) else _BATCHED.get(name)


class _Watch(TorchDispatchMode):
    """Dispatch mode that records product operators under the innermost of the named modules that runs them."""

    def __init__(self, running: ModuleStack, names: Mapping[nn.Module, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running, self.names = running, names
        self.found: dict[str, list[tuple[Any, Any, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _axis(func) is not None:
            inside = [self.names[m] for m in reversed(self.running.modules) if m in self.names]
            if inside:
                self.found.setdefault(inside[0], []).append(
                    (func, *(tree_map(_shape, x) for x in (args, kwargs or {})))
                )
        return func(*args, **(kwargs or {}))


def _shape(value: Any) -> Any:
    return _Shape(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def record_calls(model: nn.Module, plan: Plan, example_inputs: Any) -> tuple[list[TimedLayer], list[TimedProducts]]:
    """Record the layers and products behind the plan's cost terms during one forward. The model is not changed.

    A layer that is called several times appears once for each call. Modules that are neither layers nor products, and
    those that cannot run outside the model, are left out.
    """
    modules = {name or ROOT: module for name, module in model.named_modules()}
    weights = {
        name: found for name in _named(plan.ops) if (found := _weight(modules.get(name), name, plan)) is not None
    }
    others = {modules[name]: name for name in _named(plan.ops) if name in modules and name not in weights}
    device, layers = device_of(model), list[TimedLayer]()

    def note(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        weight = weights[name]
        sizes = plan.tensors[weight][:2]
        layers.append(
            TimedLayer(
                name=name, module=modules[name], weight=weight, sizes=(sizes[0], sizes[1]), shape=shape, dtype=dtype,
                  device=device)
        )  # fmt: skip

    like = next((tensor for _, tensor in named_tensors(model) if tensor.is_floating_point()), None)
    watched = {modules[name]: name for name in weights}
    with (
        without_attention_fast_path(), plain_forward(model), torch.no_grad(), forwards(model, example_inputs) as run,
        ModuleStack(model).watching() as running, _Watch(running, others) as watch, _inputs(watched, note),
    ):  # fmt: skip
        run()
    called = {layer.name for layer in layers}
    for op in plan.ops:  # linear layers that are not called, because another module uses their weight (attention)
        if op.name in weights and op.name not in called and isinstance(modules[op.name], nn.Linear):
            shape = op.coefficient, plan.tensors[weights[op.name]][1]
            note(op.name, shape, torch.float32 if like is None else like.dtype)
    products = [_products(name, calls, device) for name, calls in watch.found.items()]
    with preserved_rng(model), torch.no_grad():  # new recurrent layers draw random weights
        return [one for one in layers if _can_run(one)], [one for one in products if _can_run(one)]


def _can_run(work: TimedLayer | TimedProducts) -> bool:
    """Return True if it runs outside the model. A kernel may need an alignment or dtype that the new tensors lack."""
    try:
        work.call(work.sizes if isinstance(work, TimedLayer) else (work.size,))()
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


def _products(name: str, calls: list[tuple[Any, Any, Any]], device: torch.device) -> TimedProducts:
    lengths = [
        leaf.shape[at]
        for func, args, _ in calls
        for leaf in tree_leaves(args)
        if isinstance(leaf, _Shape) and (at := _axis(func)) is not None and len(leaf.shape) > at and leaf.shape[at] > 1
    ]
    return TimedProducts(name=name, size=math.gcd(*lengths) or 1, calls=tuple(calls), device=device)


def _named(ops: tuple[Op, ...]) -> list[str]:
    return list(dict.fromkeys(op.name for op in ops))


def _weight(module: nn.Module | None, name: str, plan: Plan) -> str | None:
    """Return the name of the weight if :class:`Layer` can rebuild the module; ``None`` otherwise."""
    if isinstance(module, nn.RNNBase):
        weight = f"{name}.weight_ih_l0"
        return weight if not module.proj_size and module.mode in _GATES and weight in plan.tensors else None
    dense = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
    if not dense and counting_attributes(module) is not ATTRIBUTES_BY_NAME["transformers.pytorch_utils.Conv1D"]:
        return None
    if isinstance(module, nn.modules.conv._ConvNd) and module.transposed and module.groups > 1:
        return None
    found = {tensor for op in plan.ops if op.name == name for tensor, _ in op.axes}
    return found.pop() if len(found) == 1 and not next(iter(found)).startswith("~") else None


@contextmanager
def _inputs(
    names: Mapping[nn.Module, str], note: Callable[[str, tuple[int, ...], torch.dtype], None]
) -> Iterator[None]:
    """Call ``note`` inside the context for each call of these modules, with name, input shape and input dtype."""

    def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if module in names and tensors:
            note(names[module], tuple(tensors[0].shape), tensors[0].dtype)

    handle = register_module_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
