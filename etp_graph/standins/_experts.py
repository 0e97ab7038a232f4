"""Views of routers and expert layers, which are recognised by the shapes of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from etp_graph.model import mixture, routed

from ._registry import Row, register_fallback


def experts_view(module: nn.Module) -> type[nn.Module] | None:
    """Return the view of an expert layer or of a router; ``None`` for any other module."""
    parameters = dict(module.named_parameters(recurse=False))
    if any(True for _ in module.children()) and set(parameters) - {"weight"} == {"gate_up_proj", "down_proj"}:
        parameters = {name: parameters[name] for name in ("gate_up_proj", "down_proj")}
    if set(parameters) == {"gate_up_proj", "down_proj"} and all(p.ndim == 3 for p in parameters.values()):
        gate_up, down = parameters["gate_up_proj"].shape, parameters["down_proj"].shape
        if gate_up[0] == down[0] and gate_up[1] == 2 * down[2] and gate_up[2] == down[1]:
            return _view(type(module), _mixture)
    weight = parameters.get("weight")
    if weight is not None and weight.ndim == 2 and _experts(module) == weight.shape[0] and _top_k(module):
        return _view(type(module), _routed)
    return None


def _experts(module: nn.Module) -> int | None:
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    return next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), int)), None)


def _top_k(module: nn.Module) -> int:
    return next((int(getattr(module, name)) for name in ("top_k", "num_experts_per_tok") if hasattr(module, name)), 0)


_known: dict[type, type[nn.Module]] = {}


def _view(cls: type[nn.Module], wrap: Callable[..., Any]) -> type[nn.Module]:
    if cls not in _known:
        _known[cls] = _made(cls, wrap)
    return _known[cls]


def _made(cls: type[nn.Module], wrap: Callable[..., Any]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrap(self, cls.forward, *args, **kwargs)

    return type(f"Followed{cls.__name__}", (cls,), {"forward": forward, "__module__": __name__})


def _mixture(module: Any, run: Any, hidden_states: Tensor, top_k_index: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    whole = (hidden_states, top_k_index, *args)
    return mixture(
        hidden_states, module.gate_up_proj, module.down_proj, top_k_index, lambda: run(module, *whole, **kwargs)
    )


def _routed(module: Any, run: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    n = module.weight.shape[0]
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    vectors = [tensor for name, tensor in own if name != "weight" and tuple(tensor.shape) == (n,)]
    return routed(
        hidden_states, module.weight, vectors, _top_k(module), lambda: run(module, hidden_states, *args, **kwargs)
    )


register_fallback(Row(experts_view, view=True))
