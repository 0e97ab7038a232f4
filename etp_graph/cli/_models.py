"""Build a model and example inputs from a string on the command line. Nothing is downloaded."""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from etp_graph.errors import EtpError
from etp_graph.export import huggingface_inputs
from etp_graph.model import eval_mode, run_model

from ._huggingface import load_folder
from ._imports import BROKEN, import_from

FORMS = "torchvision:resnet50, timm:NAME, hf:DIR (a folder of transformers), or package.module:callable"


class ResolveError(EtpError):
    """The model string names no model that can be built, or the model rejects its example inputs."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BuiltModel:
    """A model in eval mode, and inputs that it accepts.

    Attributes:
        text: the string that names the model.
        model: the model.
        inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        random: whether the weights are random. Those of a callable count as its own.
        tokenizer: tokenizer or processor of a folder of transformers, or ``None``.
        dtype: element type of the weights in that folder, or ``None``.
    """

    text: str
    model: nn.Module
    inputs: Any
    random: bool = False
    tokenizer: Any = None
    dtype: torch.dtype | None = None

    @property
    def is_huggingface(self) -> bool:
        """True for a model of a folder of transformers."""
        return self.text.startswith("hf:")

    @property
    def shapes(self) -> str:
        """Shapes of the inputs as text, for messages."""
        if isinstance(self.inputs, dict):
            return ", ".join(f"{name} {_shape(value)}" for name, value in self.inputs.items())
        values = self.inputs if isinstance(self.inputs, (tuple, list)) else [self.inputs]
        return ", ".join(_shape(value) for value in values)


def build_model(text: str, *, input_shapes: Sequence[str] = ()) -> BuiltModel:
    """Build the model that a string names, and example inputs for it.

    Args:
        text: ``torchvision:NAME``, ``timm:NAME``, ``hf:DIR`` or ``package.module:callable``. The callable takes no
            arguments and returns a module, or a module and its example inputs. The name may also be that of a module.
        input_shapes: one shape (``"1,3,224,224"``) for each positional input, in place of the model's own inputs. A
            shape of integers ends in ``:long`` (``"1,128:long"``).

    Raises:
        ResolveError: the library, model, file or callable does not exist, the inputs are not known, or the model
            rejects them.
    """
    source, colon, name = text.partition(":")
    if not colon or not source or not name:
        raise ResolveError(f"MODEL {text!r} is none of the known forms: {FORMS}.")
    build = _SOURCES.get(source)
    chosen = tuple(parse_shape(shape) for shape in input_shapes)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # torchvision announces new initialisations
        torch.manual_seed(0)
        found = build(text, name) if build is not None else _from_callable(text, name)
    if chosen:
        found = replace(found, inputs=chosen[0] if len(chosen) == 1 else chosen)
    if found.inputs is None:
        raise ResolveError(f"{text}: the inputs of this model are not known; pass --input-shape, like 1,3,224,224.")
    found.model.eval()
    _require_accepted(found)
    return found


def parse_shape(text: str) -> torch.Tensor:
    """Return an example input of a shape such as ``"1,3,224,224"``: normal numbers, or with ``:long`` zeros and ones.

    Raises:
        ResolveError: the text is not a shape.
    """
    numbers, colon, dtype = text.partition(":")
    try:
        shape = [int(number) for number in numbers.replace("x", ",").split(",")]
    except ValueError as error:
        raise ResolveError(f"--input-shape {text!r} is not a shape; write it like 1,3,224,224.") from error
    if any(size < 1 for size in shape):
        raise ResolveError(f"--input-shape {text!r}: every size must be at least 1.")
    if colon and dtype not in ("float", "long"):
        raise ResolveError(f"--input-shape {text!r}: the type after the colon is 'float' or 'long'.")
    generator = torch.Generator().manual_seed(0)
    if dtype == "long":
        return torch.randint(0, 2, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def _require_accepted(resolved: BuiltModel) -> None:
    """Run the model once. If it fails, raise :class:`ResolveError` with the shapes of the inputs."""
    try:
        with torch.no_grad(), eval_mode(resolved.model):
            run_model(resolved.model, resolved.inputs)
    except BROKEN as error:
        raise ResolveError(
            f"{resolved.text} does not run on the example inputs ({resolved.shapes}): {type(error).__name__}: {error}. "
            "Pass other ones with --input-shape."
        ) from error


def _library(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ResolveError(f'{name} is not installed: pip install "etp-graph[{extra}]".') from error


def _unknown(source: str, name: str, known: Sequence[str]) -> ResolveError:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return ResolveError(f"{source} has no model named {name!r}{hint}")


def _from_torchvision(text: str, name: str) -> BuiltModel:
    models = _library("torchvision", "vision").models
    known = models.list_models()
    if name.lower() not in known:
        raise _unknown("torchvision", name, known)
    model = models.get_model(name, weights=None, **({"weights_backbone": None} if name not in _plain(models) else {}))
    # The input size is read from the preprocessing of the published weights; this downloads nothing.
    weights = list(models.get_model_weights(name))
    transforms = weights[-1].transforms() if weights else None
    size = getattr(transforms, "crop_size", None) or [224]
    height, width = (size[0], size[-1])
    video = "Video" in type(transforms).__name__
    inputs = torch.randn(1, 3, *([16] if video else []), height, width)
    return BuiltModel(text=text, model=model, inputs=inputs, random=True)


def _plain(models: ModuleType) -> set[str]:
    """Return the names of the image and video classifiers, whose builders have no argument ``weights_backbone``."""
    return set(models.list_models(module=models)) | set(models.list_models(module=models.video))


def _from_timm(text: str, name: str) -> BuiltModel:
    timm = _library("timm", "vision")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    model = timm.create_model(name, pretrained=False)
    config = getattr(model, "pretrained_cfg", None) or {}
    inputs = torch.randn(1, *config.get("input_size", (3, 224, 224)))
    return BuiltModel(text=text, model=model, inputs=inputs, random=True)


def _from_huggingface(text: str, name: str) -> BuiltModel:
    found = load_folder(_library("transformers", "hf"), name)
    return BuiltModel(
        text=text, model=found.model, inputs=huggingface_inputs(found.model), random=found.dtype is None,
        tokenizer=found.tokenizer, dtype=found.dtype,
    )  # fmt: skip


def _from_callable(where: str, name: str) -> BuiltModel:
    module_name = where.partition(":")[0]
    found: Any = _import(module_name, where)
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n in vars(found) if not n.startswith("_")] if hasattr(found, "__dict__") else []
            close = difflib.get_close_matches(part, names, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else "."
            raise ResolveError(f"{where}: {module_name} has no {name!r}{hint}")
        found = getattr(found, part)
    made = found
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ResolveError(f"{where} is a {type(found).__name__}, not a module or a callable that returns one.")
        try:
            made = found()
        except BROKEN as error:
            raise ResolveError(
                f"{where}() fails: {type(error).__name__}: {error}. It is called without arguments."
            ) from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ResolveError(
            f"{where}() returned {type(made).__name__}; return a torch.nn.Module, or a module and its example inputs."
        )
    return BuiltModel(text=where, model=model, inputs=inputs)


def _import(module_name: str, where: str) -> ModuleType:
    here = Path.cwd()
    try:
        return import_from(here, module_name)
    except ImportError as error:
        raise ResolveError(
            f"{where}: cannot import {module_name!r} from {here} or the installed packages ({error}). "
            f"MODEL is one of {FORMS}."
        ) from error


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


_SOURCES: dict[str, Callable[[str, str], BuiltModel]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "hf": _from_huggingface,
}
