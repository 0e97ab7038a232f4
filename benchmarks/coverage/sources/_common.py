"""Try versions of a model and inputs of it, and keep the first that runs."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from etp_graph.model import run_model


class NotBuilt(Exception):
    """No version of a model could be built small enough, or none of the inputs runs."""


MAX_PARAMS = 120_000_000
"""A model with more parameters is not part of the sweep: its copies in float64 would not fit beside each other."""


_ENOUGH, _SECONDS = 0.99, 20.0
"""Share of the parameters whose modules run, and seconds, after which no other inputs are tried."""


def first_that_runs(
    makers: Iterable[Callable[[], nn.Module]], inputs: Callable[[nn.Module], Iterable[Any]]
) -> tuple[nn.Module, Any]:
    """Return the first model that can be built and run, with those of its inputs that run most of its parts.

    Of inputs that run the same parts the first are returned. The text alone runs most models that see images, too, and
    leaves out all that sees.

    Args:
        makers: functions that make versions of the model, the preferred one first.
        inputs: makes the inputs to try from a model, the preferred ones first.

    Raises:
        NotBuilt: with what each version said last.
    """
    said: list[str] = []
    for make in makers:
        try:
            model = _build_small(make)
        except Exception as error:  # noqa: BLE001 - code of many libraries; what it says is the record
            said.append(_short(error))
            continue
        best, share, end = None, 0.0, time.monotonic() + _SECONDS
        for each in inputs(model):
            if (error_ := _error_of_forward(model, each)) is not None:
                said.append(error_)
            elif (found := share_run(model, each)) > share + 1e-9 or best is None:
                best, share = each, found
            if best is not None and (share >= _ENOUGH or time.monotonic() > end):
                break
        if best is not None:
            return model, best
    raise NotBuilt(" | ".join(dict.fromkeys(said[:1] + said[-3:])) or "nothing to try")


def share_run(model: nn.Module, inputs: Any) -> float:
    """Return the share of the parameters whose modules, or modules around these, a forward calls.

    A module around others may use their parameters itself, as :class:`torch.nn.MultiheadAttention` does. So a module
    without a call of its own counts if its parent is called and none of the parent's children is.
    """
    called: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda *arguments, name=name: called.add(name), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            run_model(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    run = sum(size for name, size in sizes.items() if _is_run(name.rpartition(".")[0], called))
    return run / max(1, sum(sizes.values()))


def _is_run(module: str, called: set[str]) -> bool:
    """Return whether a module was called, or a parent that calls none of its children and so uses them itself."""
    if module in called:
        return True
    parent = module.rpartition(".")[0]
    children = f"{parent}." if parent else ""
    return parent in called and not any(c != parent and c.startswith(children) for c in called)


def _build_small(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a model, after counting its parameters on the meta device where it can be built there."""
    try:
        with torch.device("meta"):
            _require_small(make())
    except NotBuilt:
        raise
    except Exception:  # noqa: BLE001, S110 - code that reads values cannot be built without them
        pass
    torch.manual_seed(0)
    model = make()
    _require_small(model)
    return model.eval()


def _require_small(model: nn.Module) -> None:
    if (n := sum(p.numel() for p in model.parameters())) > MAX_PARAMS:
        raise NotBuilt(f"{n / 1e6:.0f} million parameters")


def _error_of_forward(model: nn.Module, inputs: Any) -> str | None:
    """Return what a forward raises, or ``None``."""
    try:
        with torch.no_grad():
            run_model(model, inputs)
    except Exception as error:  # noqa: BLE001 - as above
        return _short(error)
    return None


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:150]}"


def arguments_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function by name."""
    return dict(inspect.signature(function).parameters)


def square_images(sizes: Sequence[int], *, channels: int = 3, batch: int = 1) -> list[Any]:
    """Return images of these sizes, to be tried in turn."""
    return [torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0)) for size in sizes]
