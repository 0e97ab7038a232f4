"""Try versions of a model and inputs of it, and keep the first that runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from etp_graph.model import run_model


class NotBuilt(Exception):
    """No version of a model could be built small enough, or none of the inputs runs."""


MAX_PARAMS = 120_000_000
"""A model with more parameters is not part of the sweep: its copies in float64 would not fit beside each other."""


def first_that_runs(
    makers: Iterable[Callable[[], nn.Module]], inputs: Callable[[nn.Module], Iterable[Any]]
) -> tuple[nn.Module, Any]:
    """Return the first model that can be built, with the first of its inputs on which a forward succeeds.

    Args:
        makers: functions that make versions of the model, the preferred one first.
        inputs: makes the inputs to try from a model.

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
        for each in inputs(model):
            if (error_ := _error_of_forward(model, each)) is None:
                return model, each
            said.append(error_)
    raise NotBuilt(" | ".join(dict.fromkeys(said[:1] + said[-3:])) or "nothing to try")


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
