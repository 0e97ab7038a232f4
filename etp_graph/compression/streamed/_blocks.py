"""Run one block of a model inside the model's own forward, with the weights of this block alone in memory.

The model computes everything that its blocks get beside the hidden states: masks, positions, the kind of attention. The
other blocks hand on what they get. The hidden states come from outside, so what the embeddings would give is not
needed: weights that are not loaded are one number, expanded to their shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from etp_graph._config import quoted, require
from etp_graph.errors import PlanError
from etp_graph.model import all_tensors, first_names, named_tensors, persistent_names

from ._inputs import Batch
from ._memory import untouched
from ._source import SourceFolder

T = TypeVar("T")


_UNKNOWN = torch.full((), math.nan)
"""Stands for what a block returns beside the hidden states."""


class _Reached(BaseException):
    """Ends a forward with the hidden states; no ``except Exception`` in the code of a model catches it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class BlockwiseModel:
    """Model whose blocks run one at a time.

    Attributes:
        model: the model. Tensors that are not loaded hold one number, and take no memory.
        blocks: names of the blocks, in their order.
        source: the folder.
        dtype: element type in which it computes.
        device: where it computes.

    Args:
        source: the folder.
        config: configuration of the model.
        dtype: element type in which it computes.
        device: where it computes.

    Raises:
        PlanError: it has no list of blocks.
        CheckpointError: the folder holds other tensors than the class has.
    """

    def __init__(self, source: SourceFolder, config: Any, *, dtype: torch.dtype, device: torch.device) -> None:
        self.source = source
        self.model: Any = build_without_weights(source.model_class, config, dtype)
        self.blocks = find_block_names(self.model)
        tensors = all_tensors(self.model)
        self._first = first_names(tensors, tensors)
        self._stored = persistent_names(self.model)
        self.dtype, self.device = dtype, device
        self._at, self._after = -1, False
        self._leaves: list[Any] = []
        self._structure: Any = None
        self._hidden: Tensor | None = None
        fill_buffers(self.model, device)
        self.set_(dict.fromkeys(self._stored))
        for number, name in enumerate(self.blocks):
            module = self.model.get_submodule(name)
            module.forward = self._in_turn(number, module.forward)

    def like(self, config: Any) -> BlockwiseModel:
        """Return the model of another configuration whose blocks return the same."""
        found = BlockwiseModel(self.source, config, dtype=self.dtype, device=self.device)
        found._leaves, found._structure = self._leaves, self._structure
        return found

    def names_in(self, number: int) -> list[str]:
        """Return the names of the stored tensors of a block."""
        start = f"{self.blocks[number]}."
        return [name for name in self._stored if name.startswith(start)]

    def tensors_in(self, number: int) -> dict[str, Tensor]:
        """Return what is held now of the stored tensors of a block: shapes and element types are always right."""
        tensors = all_tensors(self.model)
        return {name: tensors[name] for name in self.names_in(number)}

    def names_outside(self) -> list[str]:
        """Return the names of the stored tensors that belong to no block."""
        starts = tuple(f"{name}." for name in self.blocks)
        return sorted(name for name in self._stored if not name.startswith(starts))

    def set_(self, values: Mapping[str, Tensor | None], *, trained: bool = False) -> None:
        """Replace tensors by name, under all names of tied ones.

        In the place of ``None`` there is one number, expanded to the shape: NaN outside of the blocks, else zero.
        """
        wanted = {self._first[name]: value for name, value in values.items()}
        owners = dict(self.model.named_modules(remove_duplicate=False))
        new: dict[str, Tensor | nn.Parameter] = {}
        for name, first in self._first.items():
            if first not in wanted:
                continue
            home, _, leaf = name.rpartition(".")
            module, value = owners[home], wanted[first]
            held = module._parameters if leaf in module._parameters else module._buffers
            if first not in new:
                filled = self._nothing(first, held[leaf]) if value is None else value
                new[first] = nn.Parameter(filled, requires_grad=trained) if held is module._parameters else filled
            held[leaf] = new[first]

    def _nothing(self, name: str, like: Tensor) -> Tensor:
        outside = not name.startswith(tuple(f"{block}." for block in self.blocks))
        fill = math.nan if outside and like.dtype.is_floating_point else 0
        return torch.full((), fill, dtype=like.dtype, device=self.device).expand(like.shape)

    @contextmanager
    def zero_outside(self) -> Iterator[None]:
        """Hold zeros outside of the blocks, for criteria that look for NaN in all weights."""
        names = self.names_outside()
        tensors = dict(named_tensors(self.model))
        zeros = {
            name: torch.zeros((), dtype=t.dtype, device=self.device).expand(t.shape) for name, t in tensors.items()
        }
        with self.loaded({name: zeros[name] for name in names if name in zeros}):
            yield

    def cast(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor on the device, and in the element type in which the model computes."""
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

    @contextmanager
    def loaded(self, values: Mapping[str, Tensor], *, trained: bool = False) -> Iterator[None]:
        """Hold these tensors inside of the context."""
        try:
            self.set_(values, trained=trained)
            yield
        finally:
            self.set_(dict.fromkeys(values))

    @contextmanager
    def loading(self, read: Callable[[str], Tensor]) -> Iterator[None]:
        """Load what modules outside of the blocks need when they run, before the first block or after the last one.

        Args:
            read: returns a stored tensor by its name in the model.
        """
        outside = self.names_outside()
        with ExitStack() as stack:
            stack.callback(self.set_, dict.fromkeys(outside))
            for home in {name.rpartition(".")[0] for name in outside}:
                own = [name for name in outside if name.rpartition(".")[0] == home]
                module = self.model.get_submodule(home)
                stack.callback(module.register_forward_pre_hook(self._load_hook(own, read)).remove)
            yield

    def _load_hook(self, names: list[str], read: Callable[[str], Tensor]) -> Callable[..., None]:
        ready: set[str] = set()

        def load(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._at >= 0 and not self._after:
                return  # it runs before the blocks, which get their hidden states from elsewhere
            for name in names:
                if type(module).forward is nn.Embedding.forward and self.device.type == "cpu":
                    self.set_({name: self._rows(read(name), args[0])})
                elif name not in ready:
                    self.set_({name: self.cast(read(name))})
                    ready.add(name)

        return load

    def embed(self, batch: Batch) -> Tensor:
        """Return what the first block gets; inside of :meth:`loading`."""
        return self._run(-1, None, batch)

    def _rows(self, stored: Tensor, tokens: Tensor) -> Tensor:
        """Return a table of embeddings of which only the rows of some tokens take memory."""
        rows, table = tokens.unique(), untouched(stored.shape, self.dtype)
        table[rows] = stored[rows].to(self.dtype)
        return table

    def run_block(self, number: int, batch: Batch, hidden: Tensor) -> Tensor:
        """Return what a block makes of the hidden states that it gets."""
        return self._run(number, hidden, batch)

    def run_head(self, hidden: Tensor, call: Callable[[], T]) -> T:
        """Return what ``call`` returns, which runs the model once: the last block gives these hidden states.

        Call it inside of :meth:`loading`.
        """
        self._at, self._hidden, self._after = len(self.blocks), hidden, False
        try:
            return call()
        finally:
            self._hidden = None

    def _run(self, number: int, hidden: Tensor | None, batch: Batch) -> Tensor:
        self._at, self._hidden, self._after = number, hidden, False
        try:
            self.model(**batch)
        except _Reached as found:
            return found.hidden
        finally:
            self._hidden = None
        raise PlanError(f"{type(self.model).__name__} does not call its block {self.blocks[max(number, 0)]!r}.")

    def _in_turn(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward of a block that only runs in its turn."""

        @wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(given, Tensor):
                raise PlanError(f"{self.blocks[number]}: gets no hidden states first, so it cannot run alone.")
            if self._hidden is None:
                raise _Reached(given)
            if number < min(self._at, len(self.blocks) - 1):
                return self._as_returned(given)
            if self._at == len(self.blocks):
                self._after = True
                return self._as_returned(self._hidden)
            self._require_independent(number, (args[1:], {**kwargs, "hidden_states": None}))
            args, kwargs = (
                ((self._hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": self._hidden})
            )
            output = tree_leaves(forward(*args, **kwargs))
            raise _Reached(next(leaf for leaf in output if isinstance(leaf, Tensor)))

        return call

    def note_returns(self, number: int, given: Any, output: Any) -> None:
        """Note in which place of what a block returns the hidden states are: they are the first tensor.

        Args:
            number: of the block.
            given: its arguments.
            output: what it returns.

        Raises:
            PlanError: the first tensor that it returns has another shape than the first one that it gets.
        """
        leaves, self._structure = tree_flatten(output)
        self._leaves = [_UNKNOWN if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        shapes = [next((x.shape for x in tree_leaves(v) if isinstance(x, Tensor)), None) for v in (given, output)]
        require(
            shapes[0] is not None and shapes[0] == shapes[1],
            f"{self.blocks[number]}: gets {_text(shapes[0])} and returns {_text(shapes[1])}, so that it cannot run "
            "alone: use etp_graph.oneshot_.",
            PlanError,
        )

    def _as_returned(self, hidden: Tensor) -> Any:
        """Return hidden states as a block does. The other tensors that it returns are not known, and are NaN."""
        leaves = list(self._leaves)
        leaves[next(place for place, leaf in enumerate(leaves) if leaf is _UNKNOWN)] = hidden
        return tree_unflatten(leaves, self._structure)

    def _require_independent(self, number: int, others: Any) -> None:
        """Raise :class:`PlanError` if a block gets something else that other weights were needed for, which are NaN."""
        for leaf in tree_leaves(others):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any()):
                raise PlanError(
                    f"{self.blocks[number]}: also gets what embeddings or other blocks computed, so it cannot run "
                    "alone: use etp_graph.oneshot_."
                )


def build_without_weights(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """Build a model on the meta device, in eval mode and with frozen weights."""
    with torch.device("meta"):
        model = model_class(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # buffers keep theirs, as in from_pretrained
    return model.eval().requires_grad_(False)


def find_block_names(model: Any) -> list[str]:
    """Return the names of the blocks: the entries of the list with as many as the configuration has hidden layers.

    Raises:
        PlanError: there is no such list, or several.
    """
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    found = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted and any(True for _ in module.parameters())
    ]  # fmt: skip
    require(
        len(found) == 1 and not model.config.is_encoder_decoder,
        f"{type(model).__name__} is no decoder with one list of {wanted} blocks (found {quoted(found) or 'none'}): it "
        "cannot be streamed. Use etp_graph.oneshot_.",
        PlanError,
    )
    return [f"{found[0]}.{number}" for number in range(wanted)]


@torch.no_grad()
def fill_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no file stores, such as the frequencies of rotary positions.

    The class sets them when it initialises a module without weights.

    Raises:
        PlanError: the class leaves one as it is.
    """
    for name, module in model.named_modules():
        volatile = [key for key in module._non_persistent_buffers_set if module._buffers.get(key) is not None]
        for key in volatile:
            old = module._buffers[key]
            module._buffers[key] = torch.full(
                old.shape, math.nan if old.is_floating_point() else 0, dtype=old.dtype, device=device
            )
        if volatile:
            _initializer(model, name)(module)
        for key in volatile:
            value = module._buffers[key]
            require(
                not (value.is_floating_point() and bool(value.isnan().any())),
                f"{name}.{key} is neither stored nor computed by {type(model).__name__}: it cannot be streamed. Use "
                "etp_graph.oneshot_.",
                PlanError,
            )


def _initializer(model: Any, name: str) -> Callable[[nn.Module], None]:
    """Return the method of the innermost model around a module that initialises modules."""
    parts = name.split(".") if name else []
    around = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts), -1, -1)]
    found: Callable[[nn.Module], None] = next(one._init_weights for one in around if hasattr(one, "_init_weights"))
    return found


def _text(shape: torch.Size | None) -> str:
    return "no tensor" if shape is None else f"a tensor {list(shape)}"
