"""The registry: named models of every family, with example inputs."""

from __future__ import annotations

from itertools import chain

from benchmarks.models import forecasting, graphs, huggingface, recurrent, vision
from benchmarks.models import timm as timm_models
from benchmarks.models.entry import Entry, by_name

__all__ = ["FAMILIES", "Entry", "registry"]

FAMILIES = {
    "vision": vision.entries,
    "timm": timm_models.entries,
    "huggingface": huggingface.entries,
    "graphs": graphs.entries,
    "recurrent": recurrent.entries,
    "forecasting": forecasting.entries,
}
"""What makes the entries of a family, in the order of the page; a family whose library is missing has none."""


def registry() -> dict[str, Entry]:
    """Every model by name, family by family."""
    return by_name(chain.from_iterable(entries() for entries in FAMILIES.values()))
