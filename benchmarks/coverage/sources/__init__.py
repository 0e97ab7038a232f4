"""Enumerate the models of other packages, each with example inputs.

A source is a module of this package with three functions: ``names`` lists its models without building them, ``family``
says in which table one stands, and ``build`` makes it. A package that is not installed has no models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

SOURCES = ("transformers", "timm", "torchvision", "pyg", "diffusers", "ultralytics", "smp", "monai", "open_clip",
           "vit_pytorch", "torchaudio")  # fmt: skip
"""Names of the sources, in the order of the page."""

PRELOADED = ("torch", "torchvision", "timm", "torch_geometric.nn", "etp_graph", "transformers.pipelines",
             "transformers.models.auto.modeling_auto", "transformers.models.bert.modeling_bert",
             "transformers.models.llava.modeling_llava", "transformers.models.whisper.modeling_whisper",
             "diffusers.models", "segmentation_models_pytorch", "monai.networks.nets", "ultralytics.nn.tasks",
             "open_clip", "einops.layers.torch", "torchaudio.models")  # fmt: skip
"""Modules that measurements import. The process that starts the measurements imports them once. ``transformers``
imports its modules when they are asked for, so that modules of models stand here: they bring what all models need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model of the sweep: its source, its name there, and the family of its table."""

    source: str
    name: str
    family: str

    @property
    def key(self) -> str:
        """Return its name in the results."""
        return f"{self.source}:{self.name}"


def cases(sources: tuple[str, ...] = SOURCES) -> Iterator[Case]:
    """Yield the models of the sources."""
    for source in sources:
        module = _module(source)
        for name in module.names():
            yield Case(source=source, name=name, family=module.family(name))


def missing_packages() -> dict[str, str]:
    """Return source -> package, of the sources whose package is not installed."""
    return {source: _module(source).PACKAGE for source in SOURCES if not _module(source).names()}


def build(case: Case) -> tuple[nn.Module, Any]:
    """Return the model in eval mode, and example inputs on which it runs.

    Raises:
        NotBuilt: no small version of it could be built, or none of the inputs that were tried runs.
    """
    model, inputs = _module(case.source).build(case.name)
    return model.eval(), inputs


def _module(source: str) -> Any:
    return import_module(f"benchmarks.coverage.sources._{source}")
