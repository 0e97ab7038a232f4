"""Compensation in closed form: the layers that read removed units get new weights and biases, without training."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph._config import require, require_count, require_number
from etp_graph.errors import ScoreError
from etp_graph.model import eval_mode, is_sharded, named_tensors, run_model
from etp_graph.plan import Plan, Selection, with_no_unit
from etp_graph.surgery import PreparedChanges, writing

from ._fit import Compensation, fit_readers, lossy_axes
from ._record import Call, InputMoments, record_inputs


@torch.no_grad()
def compensate_(
    model: nn.Module,
    plan: Plan,
    selection: Selection,
    batches: Iterable[Any] | InputMoments,
    *,
    ridge: float = 1e-3,
    places: int = 4096,
) -> Compensation:
    """Change the weights that read removed units so that their layers give nearly the same outputs without them.

    Call it before :func:`etp_graph.prune_` with the same selection. In between the model is wrong, because the units
    that surgery will remove still count beside what makes them good. Each layer is fitted on its own, by least squares
    of its dense outputs on its kept inputs. If removed inputs are linear combinations of kept ones, the outputs are
    the same, except for ``ridge``. Layers whose weight is computed, packed for several uses or tied to an embedding are
    not changed.

    Source: reconstruction of ThiNet (Luo et al. 2017) and channel pruning (He et al. 2017); the mean goes into the
    bias as in FLAP (An et al. 2024).

    Args:
        model: the dense model, changed in place. It runs in eval mode.
        plan: its plan.
        selection: the units that stay.
        batches: example inputs as :func:`etp_graph.trace` takes them; a few hundred samples. Tokens whose
            ``attention_mask`` is zero are left out, except of packed experts. Or what :func:`input_moments` recorded of
            them, which serves for any number of selections.
        ridge: how strongly the old weights are preferred, relative to the mean square of an input. Raise it if there
            are fewer samples than inputs of a layer.
        places: at most this many pixels per convolution and batch are used, drawn at random with a fixed seed.

    Raises:
        PlanError: the plan is not of this model.
        SelectionError: the selection violates a constraint of a group.
        ScoreError: there are no batches, the model does not run on one, activations are not finite, or weights are on
            the meta device or sharded. The model is unchanged, as after any other exception.
    """
    found = prepare_compensation(model, plan, selection, batches, ridge=ridge, places=places)
    found.changes().commit()
    return found.fits


@dataclass(frozen=True, slots=True)
class NewWeights:
    """New weights that :func:`prepare_compensation` found and nobody has written yet.

    Attributes:
        fits: the fit of each layer.
        old: the parameters that change, by name.
        new: their new values.
    """

    fits: Compensation
    old: Mapping[str, Tensor]
    new: Mapping[str, Tensor]

    @torch.no_grad()
    def changes(self, blend: float = 1.0) -> PreparedChanges:
        """Return the change to ``old + blend * (new - old)``."""
        return PreparedChanges([writing(old, old.lerp(self.new[name], blend)) for name, old in self.old.items()])


@torch.no_grad()
def prepare_compensation(
    model: nn.Module,
    plan: Plan,
    selection: Selection,
    batches: Iterable[Any] | InputMoments,
    *,
    ridge: float = 1e-3,
    places: int = 4096,
) -> NewWeights:
    """Do all of :func:`compensate_` that can fail, and change nothing. The arguments are those of :func:`compensate_`.

    Raises:
        PlanError, SelectionError, ScoreError: as :func:`compensate_`.
    """
    plan.check(model)
    selection.check(plan)
    require_number("ridge", ridge, 0)
    require_count("places", places, 1)
    tensors = _whole_tensors(model)
    lossy = lossy_axes(plan, with_no_unit(selection.flat(plan).cpu(), True), tensors)
    recorded = batches if isinstance(batches, InputMoments) else _record(model, lossy, tensors, batches, places)
    values, done = fit_readers(recorded, lossy, tensors, ridge=ridge)
    return NewWeights(done, {name: tensors[name].detach() for name in values}, values)


@torch.no_grad()
def input_moments(model: nn.Module, plan: Plan, batches: Iterable[Any], *, places: int = 4096) -> InputMoments:
    """Record what :func:`compensate_` needs of batches, for all selections of a plan.

    Many pruned sizes of one model, or many criteria, then cost one run of the batches. Needs memory for a float64
    matrix [inputs, inputs] of each layer that reads units, and of each expert of a mixture.

    Args:
        model: the dense model. It runs in eval mode and is not changed.
        plan: its plan.
        batches: example inputs, as for :func:`compensate_`.
        places: as for :func:`compensate_`.

    Raises:
        PlanError, ScoreError: as :func:`compensate_`.
    """
    plan.check(model)
    require_count("places", places, 1)
    tensors = _whole_tensors(model)
    goes = torch.zeros(plan.n_units, dtype=torch.bool)
    for group, span in plan.spans():
        goes[span] = group.locked is None
    return _record(model, lossy_axes(plan, with_no_unit(~goes, True), tensors), tensors, batches, places)


def _whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model by name. Raise :class:`ScoreError` if one has no values or is sharded."""
    tensors = dict(named_tensors(model))
    for name, tensor in tensors.items():
        require(
            not (tensor.is_meta or is_sharded(tensor)),
            f"{name} is on the meta device or sharded: compensate a whole model with its weights.",
            ScoreError,
        )
    return tensors


def _record(
    model: nn.Module, lossy: Mapping[str, Collection[int]], tensors: Mapping[str, Tensor], batches: Iterable[Any],
    places: int,
) -> InputMoments:  # fmt: skip
    """Run the model on all batches and return what was recorded of the layers with these weights."""
    with eval_mode(model):
        return record_inputs(lossy, tensors, _calls(model, batches), places=places)


def _calls(model: nn.Module, batches: Iterable[Any]) -> Iterator[Call]:
    for batch in batches:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        yield mask, partial(run_model, model, batch)
