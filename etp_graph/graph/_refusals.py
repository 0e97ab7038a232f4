"""Refuse models that cannot be traced, with the remedy, before anything runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from etp_graph.errors import PlanError
from etp_graph.model import named_tensors, require_bare


def require_traceable(model: nn.Module) -> None:
    """Raise :class:`PlanError` if the model is a wrapper, is compiled, scripted, exported or quantised, or is empty."""
    require_bare(model)
    if type(model).__name__ == "OptimizedModule":
        raise PlanError("the model is compiled; trace the original module (model._orig_mod) and compile it afterwards.")
    for name, module in model.named_modules():
        _require_python(f"the module {name!r}" if name else "the model", module)
    tensors = dict(named_tensors(model))
    for name, tensor in tensors.items():
        _require_plain(name, tensor)
    if not tensors:
        raise PlanError("the model has no parameters: there is nothing to prune.")


def require_plan_alone(plan: object, *, prune: object, ignore: object, outputs: object) -> None:
    """Raise :class:`PlanError` if options of :func:`etp_graph.trace` are given beside a plan."""
    if plan is not None and (ignore or prune is not None or outputs is not None):
        raise PlanError(
            "ignore, prune and outputs have no effect on a plan that is given: pass them to trace(model, ...)."
        )


def _require_python(what: str, module: nn.Module) -> None:
    """Raise :class:`PlanError` if a module does not run Python code whose sizes are attributes."""
    origin = f"{type(module).__module__}."
    if isinstance(module, torch.jit.ScriptModule):
        raise PlanError(
            f"{what} is TorchScript (torch.jit), whose sizes and weights cannot change: trace and prune the Python "
            "module that it was made from, and script it afterwards."
        )
    if isinstance(module, torch.fx.GraphModule) and _calls_operators(module):
        raise PlanError(
            f"{what} was exported (torch.export), so that its sizes are constants: trace and prune the module that it "
            "was exported from, and export it afterwards."
        )
    if origin.startswith(("torch.ao.", "torch.ao_", "torchao.")) and any(True for _ in module.buffers()):
        raise PlanError(
            f"{what} ({type(module).__name__}) is prepared for quantization or quantised: trace and prune the float "
            "model, and quantise it afterwards."
        )


def _calls_operators(module: torch.fx.GraphModule) -> bool:
    return any(isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes)


def _require_plain(name: str, tensor: Tensor) -> None:
    """Raise :class:`PlanError` if a stored tensor is made of other tensors, as quantised weights are."""
    if is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor):
        raise PlanError(
            f"{name} is a {type(tensor).__name__}, which is made of other tensors (quantised weights): prune the float "
            "model, and quantise it afterwards."
        )
    if tensor.is_quantized:
        raise PlanError(f"{name} is quantised ({tensor.dtype}): prune the float model, and quantise it afterwards.")
