"""Views of routers and expert layers, which are recognised by the shapes of their parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph.model import PackedExperts, mixture, routed

from ._registry import Row, register_fallback


def experts_view(module: nn.Module) -> type[nn.Module] | None:
    """Return the view of an expert layer or of a router; ``None`` for any other module."""
    parameters = dict(module.named_parameters(recurse=False))
    if (experts := _packed(module)) is not None and _takes_index(type(module)):
        interleaved = _takes_turns(module, experts.down.shape[1 if experts.transposed else 2])
        return None if interleaved is None else _view(type(module), _mixture_in_turns if interleaved else _mixture)
    weight = parameters.get("weight")
    if weight is not None and weight.ndim == 2 and _experts(module) == weight.shape[0] and _top_k(module):
        return _view(type(module), _routed)
    return None


def _takes_index(cls: type) -> bool:
    """Return True unless a forward takes the tokens only, sorted by experts already, as that of Llama 4."""
    return len(inspect.signature(cls.forward).parameters) > 2  # type: ignore[attr-defined]


def _packed(module: nn.Module, *, interleaved: bool = False) -> PackedExperts | None:
    """Return the parameters of an expert layer; ``None`` for a module of another form."""
    found = dict(module.named_parameters(recurse=False))
    if any(True for _ in module.children()):
        found.pop("weight", None)
    gate_up, down = found.pop("gate_up_proj", None), found.pop("down_proj", None)
    biases = found.pop("gate_up_proj_bias", None), found.pop("down_proj_bias", None)
    if found or gate_up is None or down is None or gate_up.ndim != 3 or down.ndim != 3:
        return None
    for transposed in (False, True):
        wide, into = gate_up.shape[1:] if not transposed else gate_up.shape[:0:-1]
        out, neurons = down.shape[1:] if not transposed else down.shape[:0:-1]
        if (wide, into, len(gate_up)) != (2 * neurons, out, len(down)):
            continue
        if biases == (None, None):
            return PackedExperts(gate_up, down, None, transposed, interleaved)
        both = [None if bias is None else tuple(bias.shape) for bias in biases]
        if both == [(len(down), wide), (len(down), out)]:
            return PackedExperts(gate_up, down, biases, transposed, interleaved)  # type: ignore[arg-type]
    return None


def _takes_turns(module: nn.Module, neurons: int) -> bool | None:
    """Return whether gates and inputs of neurons take turns, or all gates come first; ``None`` if it is neither.

    It shows by a NaN that goes through the method that joins them.
    """
    join = getattr(module, "_apply_gate", None)
    if join is None or neurons < 2:
        return False
    like = next(module.parameters())
    values = torch.ones(2, 2 * neurons, dtype=like.dtype, device="cpu" if like.is_meta else like.device)
    values[0, 1] = values[1, 2 * neurons - 2] = torch.nan
    with torch.no_grad():
        try:
            found = join(values).isnan()
        except MemoryError:  # says nothing about the method
            raise
        except Exception:  # noqa: BLE001 - a method of another meaning
            return None
    if found.shape != (2, neurons):
        return None
    places = [row.nonzero().flatten().tolist() for row in found]
    return {((1,), (neurons - 2,)): False, ((0,), (neurons - 1,)): True}.get((tuple(places[0]), tuple(places[1])))


def _experts(module: nn.Module) -> int | None:
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    return next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), int)), None)


def _top_k(module: nn.Module) -> int:
    return next((int(getattr(module, name)) for name in ("top_k", "num_experts_per_tok") if hasattr(module, name)), 0)


_known: dict[tuple[type, Callable[..., Any]], type[nn.Module]] = {}


def _view(cls: type[nn.Module], wrap: Callable[..., Any]) -> type[nn.Module]:
    if (cls, wrap) not in _known:
        _known[cls, wrap] = _made(cls, wrap)
    return _known[cls, wrap]


def _made(cls: type[nn.Module], wrap: Callable[..., Any]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrap(self, cls.forward, *args, **kwargs)

    return type(f"Followed{cls.__name__}", (cls,), {"forward": forward, "__module__": __name__})


def _mixture(
    module: Any, run: Any, hidden_states: Tensor, top_k_index: Tensor, *args: Any, interleaved: bool = False,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    experts = _packed(module, interleaved=interleaved)
    assert experts is not None
    return mixture(
        hidden_states, experts, top_k_index, lambda: run(module, hidden_states, top_k_index, *args, **kwargs)
    )


def _mixture_in_turns(*args: Any, **kwargs: Any) -> Tensor:
    return _mixture(*args, interleaved=True, **kwargs)


def _routed(module: Any, run: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    n = module.weight.shape[0]
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    vectors = [tensor for name, tensor in own if name != "weight" and tuple(tensor.shape) == (n,)]
    return routed(
        hidden_states, module.weight, vectors, _top_k(module), lambda: run(module, hidden_states, *args, **kwargs)
    )


register_fallback(Row(experts_view, view=True))
