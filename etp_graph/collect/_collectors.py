"""Collectors: statistics of units over batches of data, recorded while the user runs the model.

::

    with collect.activations(model, plan, "hrank") as record:
        for x, y in batches:
            model(x)
    scores = criteria.hrank(model, plan, record=record)

A collector stores running sums, not activations. It removes its hooks when the block ends.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph._config import quoted
from etp_graph.errors import ScoreError
from etp_graph.model import removing_hooks
from etp_graph.plan import Plan
from etp_graph.units import Units

from ._expert_points import expert_points
from ._packed_points import PackedPoint, PackedReads, packed_points
from ._padding import PaddingMasks
from ._statistics import OBSERVED, BackwardStatistic, Observed, Statistic, needs_backward
from ._watch_points import WatchPoint, watch_points


class UnwatchedGroups(UserWarning):
    """Warning: a criterion that reads activations saw none of a group, and ranks it by the norm of its weights."""


class Observations:
    """Statistics that a collector has recorded; complete when its ``with`` block has ended.

    Attributes:
        values: name of the criterion -> float [n_units], NaN for units without values.
        unwatched: names of the groups that no module showed.
    """

    def __init__(self, values: Mapping[str, Tensor] | None = None, unwatched: Collection[str] = ()) -> None:
        self.values: dict[str, Tensor] = dict(values or {})
        self.unwatched = frozenset(unwatched)
        self._labels: Tensor | None = None

    def labels(self, y: Tensor) -> None:
        """Set the class number of each sample of the next forward, int64 [samples]; only ``f_statistic`` reads it.

        Raises:
            ScoreError: ``y`` does not hold class numbers.
        """
        if not isinstance(y, Tensor) or y.is_floating_point() or y.ndim != 1 or (len(y) and int(y.min()) < 0):
            raise ScoreError("labels: expected one class number for each sample, an integer tensor of shape [samples].")
        self._labels = y.detach().long()

    def take_labels(self) -> Tensor | None:
        """Return the labels of the forward that begins, and clear them."""
        found, self._labels = self._labels, None
        return found

    def read(self, name: str, plan: Plan) -> Tensor:
        """Return the statistic of a criterion, float [plan.n_units]; zero for locked groups.

        Units of groups that no module showed have the mean of all others.

        Raises:
            ScoreError: the record is empty, lacks groups, or belongs to another plan.
        """
        found = self.values.get(name)
        if found is None:
            kept = f"has {quoted(self.values)}" if self.values else "is empty"
            back = " and its loss.backward()" if needs_backward(OBSERVED.get(name)) else ""
            raise ScoreError(
                f"{name}: the record {kept}: run at least one batch{back} "
                f"inside of the collector's with block (with {name!r} among its names), or in the phase 'calibrate' of "
                "compress, and read it afterwards."
            )
        if tuple(found.shape) != (plan.n_units,):
            raise ScoreError(f"{name}: the record knows {len(found)} units, the plan {plan.n_units}: record it anew.")
        blind = [
            group.name for group, span in plan.spans()
            if group.locked is None and group.name not in self.unwatched and not bool(found[span].isfinite().all())
        ]  # fmt: skip
        if blind:
            raise ScoreError(
                f"{name}: no finite values were seen for units of {quoted(blind)}: check the model for NaN, and that "
                "the batches run the modules which hold them; else plan.lock({name: reason}) for these groups."
            )
        return self._with_unwatched(found, plan).nan_to_num(nan=0.0)

    def _with_unwatched(self, found: Tensor, plan: Plan) -> Tensor:
        """Return the values with the mean of all that were seen for the units of groups that were not."""
        if not self.unwatched:
            return found
        found, seen = found.clone(), found[found.isfinite()]
        for group, span in plan.spans():
            if group.name in self.unwatched:
                found[span] = seen.mean() if len(seen) else 1.0
        return found


@contextmanager
def activations(model: nn.Module, plan: Plan, *names: str) -> Iterator[Observations]:
    """Record the activations of every unit that is not locked in all forwards inside the block.

    Args:
        model: the model that the plan was traced from. The caller sets eval or training mode.
        plan: the plan.
        names: the statistics to record, by the names of their criteria. ``"hrank"`` is slow (a singular value
            decomposition of every map), ``"f_statistic"`` needs ``record.labels(y)`` before every forward, ``"fisher"``
            needs a backward of each batch. Default: all that need no backward, but those of experts.

    Positions that an ``attention_mask`` [samples, tokens] excludes are left out. The innermost module that gets the
    mask decides, so that an encoder and a decoder may have masks of their own. The same holds for masks of PyTorch's
    transformer layers (``src_key_padding_mask``) with ``batch_first=True``. Neurons of packed experts are recorded for
    all tokens, also those of padding.

    Groups that no module shows (units of bare parameters, attention that calls no module) are named by the warning
    :class:`UnwatchedGroups`. Their units are ranked by the norm of their weights.

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a name is unknown, no group can be observed, or labels are missing.
    """
    plan.check(model)
    chosen = names or tuple(name for name, observed in OBSERVED.items() if _is_plain(observed))
    statistics = {name: _statistic_of(name) for name in chosen}
    record = Observations()
    running = [(name, make(site)) for name, make in statistics.items() for site in _points(make, model, plan)]
    current: list[Tensor | None] = [None]

    def begin(module: nn.Module, args: Any) -> None:
        current[0] = record.take_labels()
        padding.clear()
        packed.begin_forward()

    padding = PaddingMasks()
    shown = [(s.site, _show(s)) for _, s in running if isinstance(s.site, PackedPoint)]
    packed = PackedReads(model, shown, padding)
    with removing_hooks() as handles, packed.mode():
        handles.append(model.register_forward_pre_hook(begin))
        handles.extend(padding.register(model))
        handles.extend(packed.register())
        for _, statistic in running:
            module = model.get_submodule(statistic.site.module)
            statistic.begin(module)
            if isinstance(statistic.site, PackedPoint):
                continue
            if isinstance(statistic, BackwardStatistic):
                handles.append(_register_join(module, statistic, padding))
            else:
                handles.append(module.register_forward_hook(_see(statistic, current, padding), with_kwargs=True))
        yield record
    for name in chosen:
        seen = [statistic for key, statistic in running if key == name and statistic.samples]
        if seen:
            record.values[name] = _merge(seen, plan, packed)
            record.unwatched |= _unseen_groups(seen, plan)
    if record.unwatched:
        _warn_of_unwatched(record.unwatched)


def _warn_of_unwatched(groups: Collection[str]) -> None:
    warnings.warn(
        f"no module showed the units of {quoted(sorted(groups))}: they are ranked by the norm of their weights. To "
        "keep them all, plan.lock({name: reason}).",
        UnwatchedGroups,
        stacklevel=4,
    )


def _is_plain(observed: Observed) -> bool:
    """Whether any model with units shows what is observed, in its forward."""
    return not needs_backward(observed) and isinstance(observed, type) and not observed.of_experts


def _points(make: type[Statistic], model: nn.Module, plan: Plan) -> Sequence[WatchPoint]:
    if make.of_experts:
        return expert_points(model, plan)
    return watch_points(model, plan, packed=None if make.labelled else packed_points)  # whose rows are no samples


def _statistic_of(name: str) -> type[Statistic]:
    """Return the class of the statistic that a criterion observes.

    Raises:
        ScoreError: no criterion of this name observes activations.
    """
    found = OBSERVED.find(name)
    if found == "gradients":
        raise ScoreError(f"{name} observes gradients: record them with collect.gradients(model, plan, {name!r}).")
    return found


def _see(statistic: Statistic, labels: list[Tensor | None], padding: PaddingMasks) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        with torch.no_grad():
            values, own = statistic.site.values(args, kwargs, output), labels[0] if statistic.labelled else None
            if own is not None and len(own) != len(values):
                statistic.update(values, own)  # which says what is wrong
                return
            for part, found in padding.without_padding(statistic.site.module, values, own):
                statistic.update(part, found)

    return hook


def _show(statistic: Statistic) -> Callable[[Tensor], None]:
    """Return what adds the neurons of packed experts to a statistic. Their order tells no padding."""
    if isinstance(statistic, BackwardStatistic):
        return _follow(statistic, None)

    def show(x: Tensor) -> None:
        with torch.no_grad():
            statistic.update(statistic.site.arranged(x), None)

    return show


def _follow(statistic: BackwardStatistic, padding: PaddingMasks | None) -> Callable[[Tensor], None]:
    """Return what adds activations and their gradients to a statistic, as soon as there are gradients."""
    site = statistic.site

    def follow(x: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if not x.requires_grad:
            x.requires_grad_()  # all weights before are frozen, so the graph begins here
        values = site.arranged(x)

        @torch.no_grad()
        def add(gradient: Tensor) -> None:
            joined = torch.cat([values, site.arranged(gradient).to(values)], 1)
            parts = [(joined, None)] if padding is None else padding.without_padding(site.module, joined, None)
            for part, _ in parts:
                statistic.join(*part.chunk(2, 1))

        x.register_hook(add)

    return follow


def _register_join(module: nn.Module, statistic: BackwardStatistic, padding: PaddingMasks) -> Any:
    """Add the activations and their gradients to a statistic in the backward of each call of the module."""
    site, follow = statistic.site, _follow(statistic, padding)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        follow(site.tensor(args, kwargs, None))

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        follow(site.tensor(args, kwargs, output))

    if site.side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after, with_kwargs=True)


def _unseen_groups(seen: list[Statistic], plan: Plan) -> set[str]:
    """Return the names of the groups that can lose units, of which a unit was at no watch point that ran."""
    shown = torch.zeros(plan.n_units, dtype=torch.bool, device="cpu")
    for statistic in seen:
        shown[statistic.site.units] = True
    return {group.name for group, span in plan.spans() if group.locked is None and not bool(shown[span].all())}


def _merge(seen: list[Statistic], plan: Plan, packed: PackedReads) -> Tensor:
    """Return the mean over the sites of each unit, float64 [n_units]; NaN for units without a site.

    A statistic of packed experts is a mean over pairs of a token and one of its experts. It is multiplied by the number
    of experts of a token. This makes a mean of squares one over tokens; of another statistic it only scales a group.
    """
    total = torch.zeros(plan.n_units, dtype=torch.float64, device="cpu")
    count = torch.zeros_like(total)
    for statistic in seen:
        site: WatchPoint = statistic.site
        times = packed.reads_per_token(site) if isinstance(site, PackedPoint) else 1.0
        total.index_add_(0, site.units, times * statistic.result().cpu())
        count.index_add_(0, site.units, torch.ones(len(site.units), dtype=torch.float64, device="cpu"))
    return total / count


@contextmanager
def gradients(model: nn.Module, plan: Plan, name: str = "taylor") -> Iterator[Observations]:
    """Record Σ_s ⟨∇_s L, w_s,u⟩ of every unit in all backwards inside the block, for the criterion ``taylor``.

    A batch ends when the next forward of ``model`` begins. The record holds the root mean square over the batches,
    float64 [n_units]. If the loss is scaled (``GradScaler``), the scores are scaled too.

    Parameters that are frozen, such as the base weights below adapters, require gradients inside the block. These
    gradients are dropped as soon as they are recorded, so that no optimizer sees them.

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a sliced parameter of a group that is not locked got no gradient in any backward.
    """
    plan.check(model)
    units = Units(model, plan)
    parameters = units.tensors(model)
    needed = {s.tensor for group in plan.prunable for s in group.slices}
    frozen = [w for key, w in parameters.items() if key in needed and not w.requires_grad]
    record = Observations()
    sums = _Sums(units)
    with removing_hooks() as handles, _unfrozen(frozen) as dropping:
        handles.extend(dropping)
        handles.append(model.register_forward_pre_hook(lambda module, args: sums.end()))
        for key, w in parameters.items():
            if w.requires_grad:
                handles.append(w.register_hook(sums.adder(key, w)))
        yield record
    sums.end()
    if missing := sorted(needed & parameters.keys() - sums.seen) if sums.batches else []:
        raise ScoreError(f"{name}: no backward reached {quoted(missing)}: train them, or lock their groups.")
    if sums.batches:
        record.values[name] = (sums.squares / sums.batches).sqrt().cpu()


@contextmanager
def _unfrozen(parameters: Sequence[Tensor]) -> Iterator[list[Any]]:
    """Let frozen parameters require gradients, without keeping any. Yield the handles of the hooks that do it."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = kept.get(id(parameter))

    kept = {id(parameter): parameter.grad for parameter in parameters}
    try:
        for parameter in parameters:
            parameter.requires_grad_()
        yield [parameter.register_post_accumulate_grad_hook(drop) for parameter in parameters]
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


class _Sums:
    """Running sum over batches b, Σ_b (Σ_s ⟨∇_s L_b, w_s,u⟩)², for each unit."""

    def __init__(self, units: Units) -> None:
        self.squares = torch.zeros(units.n_units, dtype=torch.float64, device=units.device)
        self.batches = 0
        self.seen: set[str] = set()
        self._units = units
        self._batch: Tensor | None = None

    def adder(self, name: str, weight: Tensor) -> Callable[[Tensor], None]:
        """Return the gradient hook of one parameter."""

        @torch.no_grad()
        def add(gradient: Tensor) -> None:
            found = self._units.reduce({name: weight.detach().double() * gradient.double()})
            self._batch = found if self._batch is None else self._batch + found
            self.seen.add(name)

        return add

    def end(self) -> None:
        """Add the squares of the current batch to the sum, and begin a new batch."""
        if self._batch is not None:
            self.squares += self._batch.square()
            self.batches += 1
            self._batch = None


def watch(model: nn.Module, plan: Plan, criterion: str) -> AbstractContextManager[Observations]:
    """Return the collector of one criterion: :func:`gradients` for ``taylor``, else :func:`activations`."""
    record = gradients if OBSERVED.find(criterion) == "gradients" else activations
    return record(model, plan, criterion)
