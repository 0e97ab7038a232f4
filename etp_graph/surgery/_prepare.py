"""Prepare the surgery of one model: make its new tensors and find its new attributes, and change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etp_graph.errors import PlanError
from etp_graph.model import is_sharded, named_tensors
from etp_graph.plan import Plan, Selection
from etp_graph.standins import replace_, replaceable

from ._attributes import find_edits, prepare_attributes, require_agreement
from ._commit import Change
from ._cuts import WEIGHT_NORM_DIRECTION, Cut, find_cuts
from ._record import Edit, SurgeryRecord, get_record, swap_data, swap_record


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """Prepared changes of one model.

    Attributes:
        cuts: the cut of each tensor that shrinks, by name.
        attributes: changes of classes and attributes of modules.
        tensors: changes of tensors and their gradients.
        record: change of the record of surgery.
    """

    cuts: Mapping[str, Cut]
    attributes: Sequence[Change]
    tensors: Sequence[Change]
    record: Change


def prepare_model(model: nn.Module, plan: Plan, selection: Selection, keep: Tensor) -> PreparedModel:
    """Return the changes that remove units from a model that fits the plan.

    Args:
        model: the model.
        plan: its plan.
        selection: the units that stay.
        keep: the same, bool [n_units + 1]; the last entry is True.

    Raises:
        PlanError: parameters are sharded, or the plan contradicts the model or itself.
    """
    tensors = dict(named_tensors(model))
    if shared := [name for name, tensor in tensors.items() if is_sharded(tensor)]:
        raise PlanError(f"{shared[0]} is shared among processes (FSDP2): use etp_graph.fsdp.prune, which rebuilds.")
    try:
        cuts = find_cuts(plan, tensors, keep)
        edits = find_edits(model, plan, keep)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise PlanError(f"the plan contradicts itself ({error!r}): trace the model again.") from error
    require_agreement(model, cuts, edits)
    changed = {name.rpartition(".")[0] for name in cuts} | {edit.module for edit in edits}
    standins = [name for name in replaceable(model) if any(at == name or at.startswith(f"{name}.") for at in changed)]
    values = {name: cut.apply(tensors[name]) for name, cut in cuts.items() if tensors[name] is cut.tensor}
    for name, value in _weight_norms(cuts, tensors).items():
        values[name] = cuts[name].apply(value) if name in cuts else value
    return PreparedModel(
        cuts=cuts,
        attributes=[_replace_classes(model, standins), *prepare_attributes(model, edits)],
        tensors=[_swap_tensor(tensors[name], value, cuts.get(name)) for name, value in values.items()],
        record=_extend_record(model, plan, selection, edits, set(cuts), standins),
    )


def list_copies(also: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    """Return the models of ``also`` as a list; one model may be given alone."""
    return [also] if isinstance(also, nn.Module) else list(also)


def bare_copies(model: nn.Module, plan: Plan, also: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    """Return the models of ``also`` without their wrappers.

    Raises:
        PlanError: one is no module, does not fit the plan, or shares tensors with another.
    """
    found: list[nn.Module] = []
    copies = list_copies(also)
    seen = {id(tensor): "the model" for _, tensor in named_tensors(model)} if copies else {}
    for number, given in enumerate(copies):
        where = f"also[{number}]"
        if not isinstance(given, nn.Module):
            raise PlanError(f"{where}: expected an nn.Module, got {type(given).__name__}.")
        bare = _unwrapped(given, plan)
        try:
            plan.check(bare)
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from error
        mine = {id(tensor): where for _, tensor in named_tensors(bare)}
        if shared := seen.keys() & mine.keys():
            raise PlanError(f"{where} shares tensors with {seen[min(shared)]}, and is cut with it: leave it out.")
        seen |= mine
        found.append(bare)
    return found


def _unwrapped(model: nn.Module, plan: Plan) -> nn.Module:
    """Return the model inside of wrappers that keep it in ``module``, such as ``AveragedModel``."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        if dict(named_tensors(model)).keys() == plan.tensors.keys():
            break
        model = inner
    return model


def _swap_tensor(tensor: Tensor, value: Tensor, cut: Cut | None) -> Change:
    """Return the change that gives a tensor its new values and its gradient the kept part."""
    grad, old = tensor.grad, tensor.data
    kept = grad if grad is None or cut is None else cut.apply(grad)
    apply, undo = swap_data(tensor, old, value)

    def change(step: object, gradient: Tensor | None) -> None:
        tensor.grad = None
        step()  # type: ignore[operator]
        tensor.grad = gradient

    return Change(lambda: change(apply, kept), lambda: change(undo, grad))


def _weight_norms(cuts: Mapping[str, Cut], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return new magnitudes, not yet cut, for weight-normalised layers that lose inputs.

    The weight is g * v / ||v||. Without the removed inputs ||v|| is smaller, so g must shrink in proportion to keep the
    other weights.
    """
    rescaled = {}
    for name, cut in cuts.items():
        if not name.endswith(WEIGHT_NORM_DIRECTION):
            continue
        magnitude = name[: -len("1")] + "0"
        g = tensors[magnitude].detach()
        dims = [d for d in range(g.ndim) if g.shape[d] == 1]
        v = cut.tensor.detach()
        inner = {axis: index for axis, index in cut.kept.items() if axis in dims}
        part = v
        for axis, index in inner.items():
            part = part.index_select(axis, index)
        if inner:
            length = torch.linalg.vector_norm(v, dim=dims, keepdim=True)
            rescaled[magnitude] = g * torch.linalg.vector_norm(part, dim=dims, keepdim=True) / length
    return rescaled


def _replace_classes(model: nn.Module, names: Sequence[str]) -> Change:
    """Return the change that gives modules the classes of their stand-ins."""
    before = [(module := model.get_submodule(name), type(module), dict(vars(module))) for name in names]

    def put_back() -> None:
        for module, cls, attributes in before:
            module.__class__ = cls
            for name in [name for name in vars(module) if name not in attributes]:
                del vars(module)[name]

    return Change(lambda: replace_(model, names), put_back)


def _extend_record(
    model: nn.Module, plan: Plan, selection: Selection, edits: Sequence[Edit], cut: set[str], standins: Sequence[str]
) -> Change:
    old = get_record(model)
    merged = {(e.module, e.name, e.item): e for e in (*old.edits, *edits)}
    record = SurgeryRecord(
        fingerprints=(*old.fingerprints, plan.fingerprint),
        selections=(*old.selections, selection.to_json()),
        edits=tuple(merged.values()),
        tensors=tuple(sorted({*old.tensors, *cut})),
        standins=(*old.standins, *standins),
        blocks=old.blocks,
    )
    return Change(*swap_record(model, record))
