"""Find the residual blocks of a model: modules that add something to a stream and hand it on.

The model runs once. Inside of each entry of a ``ModuleList`` or ``Sequential``, the first input tensor is followed
through additions, views and norms. The entry is a residual block if its first output tensor is what it leads to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from etp_graph.errors import PlanError
from etp_graph.model import (
    all_tensors,
    eval_mode,
    require_bare,
    restored_state,
    run_model,
    without_attention_fast_path,
)

_SUMS = frozenset(("add", "add_"))

_VIEWS = frozenset(
    "view reshape _unsafe_view alias detach clone _to_copy contiguous unsqueeze squeeze transpose permute".split()
)

_NORMS = frozenset("native_layer_norm _fused_rms_norm rms_norm native_batch_norm native_group_norm".split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Residual block that can be removed.

    Attributes:
        name: name of the module, an entry of ``container``.
        container: name of the ``nn.ModuleList`` or ``nn.Sequential``.
        exact: whether the block computes the identity once all that it adds is zero: its removal then equals setting
            the parameters of its last layers to zero. A block with a norm after the sum (BERT) does not.
        parameters: number of its parameters.
    """

    name: str
    container: str
    exact: bool
    parameters: int


def find_blocks(model: nn.Module, example_inputs: Any) -> tuple[Block, ...]:
    """Find the residual blocks of a model, in the order in which they run. Does not change the model.

    A block runs once in a forward, holds no other residual block, and has the class of another entry of its container.
    Blocks whose tensors have other names than those of most of their container are left out (the first layer of T5,
    which computes positions for the others), and so are blocks that share tensors with others.

    Args:
        model: the model. It runs once, in eval mode and without gradients.
        example_inputs: as for :func:`etp_graph.trace`.

    Raises:
        PlanError: the model has no residual block in a container with at least two entries.
    """
    require_bare(model)
    entries: dict[str, tuple[str, Any]] = {
        f"{path}.{key}" if path else key: (path, child)
        for path, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))
        for key, child in module._modules.items() if [type(c) for c in module._modules.values()].count(type(child)) > 1
    }  # fmt: skip
    watch = _Watch()
    with ExitStack() as stack:
        stack.enter_context(restored_state(model))
        stack.enter_context(eval_mode(model))
        stack.enter_context(without_attention_fast_path())
        stack.enter_context(torch.no_grad())
        for name, (_, child) in entries.items():
            stack.enter_context(watch.follow(name, child))
        with watch:
            run_model(model, example_inputs)
    found = [name for name, calls in watch.found.items() if len(calls) == 1 and calls[0] is not None]
    inner = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    usual = _with_usual_tensors(model, inner, {name: entries[name][0] for name in inner})
    blocks = tuple(
        Block(
            name=name, container=entries[name][0], exact=watch.found[name][0] == "exact",
            parameters=sum(p.numel() for p in entries[name][1].parameters()),
        )
        for name in usual
    )  # fmt: skip
    if not blocks:
        raise PlanError(
            f"{type(model).__name__} has no residual block that can be removed: no entry of an nn.ModuleList or "
            "nn.Sequential adds to its input and returns the sum."
        )
    return blocks


def _with_usual_tensors(model: nn.Module, names: list[str], containers: dict[str, str]) -> list[str]:
    """Return the blocks whose tensors have the names that most blocks of their container have, and share none."""
    owners: dict[int, set[str]] = {}
    for name, tensor in all_tensors(model).items():
        block = next((one for one in names if name.startswith(f"{one}.")), "")
        owners.setdefault(id(tensor), set()).add(block)
    shared = {name for blocks in owners.values() if len(blocks) > 1 for name in blocks}
    tensors = {name: frozenset(n for n, _ in model.get_submodule(name).named_parameters()) for name in names}
    usual: dict[str, frozenset[str]] = {}
    for container in dict.fromkeys(containers.values()):
        later_first = [tensors[name] for name in reversed(names) if containers[name] == container]
        usual[container] = Counter(later_first).most_common(1)[0][0]  # of several, the one of the later blocks
    return [name for name in names if name not in shared and tensors[name] == usual[containers[name]]]


@dataclass(eq=False)
class _Frame:
    """Tensors that the stream of a running block is in: id -> ``exact``, or ``norm`` behind a norm."""

    stream: dict[int, str] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)

    def add(self, tensor: Tensor, state: str) -> None:
        self.stream[id(tensor)] = state
        self.alive.append(tensor)  # so that no later tensor gets its id


class _Watch(TorchDispatchMode):
    """Follow the streams of the blocks that are running.

    Attributes:
        found: for each call of an entry that ended, the state of its output in the stream, or ``None``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, list[str | None]] = {}
        self._running: list[tuple[str, _Frame, Tensor | None]] = []

    @contextmanager
    def follow(self, name: str, module: nn.Module) -> Iterator[None]:
        """Watch the calls of a module inside this context."""

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            frame, given = _Frame(), first_tensor((args, kwargs))
            if given is not None:
                frame.add(given, "exact")
            self._running.append((name, frame, given))

        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            while self._running and self._running[-1][0] != name:
                self._running.pop()
            if not self._running:
                return
            frame, given = self._running.pop()[1:]
            returned = first_tensor(output)
            same = (
                given is not None and returned is not None and returned is not given and returned.shape == given.shape
            )
            self.found.setdefault(name, []).append(frame.stream.get(id(returned)) if same else None)

        with ExitStack() as hooks:
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kept = self._unchanged_by_relu(func, args)
        out = func(*args, **(kwargs or {}))
        operator = func._schema.name.rpartition("::")[2]
        result = out[0] if isinstance(out, (tuple, list)) and out else out
        if not isinstance(result, Tensor):
            return out
        for _, frame, _ in self._running:
            states = [frame.stream[id(a)] for a in args[:2] if isinstance(a, Tensor) and id(a) in frame.stream
                      and (operator not in _SUMS or a.shape == result.shape)]  # fmt: skip
            if not states:
                continue
            if operator in _SUMS or operator in _VIEWS or kept:
                frame.add(result, states[0])
            elif operator in _NORMS:
                frame.add(result, "norm")
            else:
                frame.stream.pop(id(result), None)  # overwritten in place by something else
        return out

    def _unchanged_by_relu(self, func: Any, args: Any) -> bool:
        """Return whether this is a ReLU in a block whose input has no negative number: it then lets the stream pass."""
        if func._schema.name not in ("aten::relu", "aten::relu_") or not self._running:
            return False
        given = self._running[-1][2]
        return given is not None and bool(given.min() >= 0)


def first_tensor(values: Any) -> Tensor | None:
    """Return the first floating-point tensor in arguments or outputs, ``None`` if there is none."""
    leaves = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return next(leaves, None)
