"""How each kind of contestant goes from the checkpoint to the small network, under one training recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

import etp_graph as etp
from benchmarks.common.contestant_names import CONTROLS, DISTILLED, FRESH, ONESHOT, SMALL, UNPRUNED, bare_name
from benchmarks.contest import torch_pruning
from benchmarks.contest.counting import Counter
from benchmarks.contest.strength import reference
from benchmarks.contest.training import train
from benchmarks.contest.variants import CONTROLS as CONTROL_METHODS
from benchmarks.contest.variants import STUDY
from benchmarks.tasks.base import Task
from etp_graph import methods
from etp_graph.methods import Method
from etp_graph.recovery import Distillation

Stage = Literal["dense", "sparse", "pruned", "finetuned"]
Watch = Callable[[Stage, nn.Module], None]
RATES = (0.3, 1.0, 3.0, 9.0)
"""Learning rates that `small-dense` tries, as multiples of the one of the wide network."""
CALIBRATION = 4
"""Batches that a criterion sees which needs data."""
TEMPERATURE, DISTANCE = 4.0, 0.5
"""Of distillation: what logits are divided by, and what the distance is multiplied with as a part of the loss."""


def known() -> tuple[str, ...]:
    """Every name that a run may have: this library's presets, the peers, the controls; each also distilled.

    The methods of this library also begin with random weights.
    """
    own = dict.fromkeys([*methods.METHODS, *CONTROL_METHODS, *STUDY])
    names = [*dict.fromkeys([*own, *torch_pruning.PEERS, *CONTROLS, ONESHOT]), *(name + FRESH for name in own)]
    return (*names, *(name + DISTILLED for name in names))


def library_method(name: str) -> Method | None:
    """The preset or variant of this library; ``None`` for the others."""
    name = bare_name(name)
    return STUDY.get(name) or CONTROL_METHODS.get(name) or methods.METHODS.get(name)


def tunable(name: str) -> bool:
    """Whether the contestant has a strength (or, with fresh weights, a learning rate) that somebody has to choose."""
    if bare_name(name) == SMALL:
        return True
    method = library_method(name)
    return bare_name(name) in torch_pruning.PEERS or (
        method is not None and method.force is not None and not method.steered
    )


def _distance(teacher: Distillation | None) -> Callable[[], torch.Tensor] | None:
    """What distillation adds to the loss of a step."""
    return None if teacher is None else lambda: DISTANCE * teacher.distance()


def initialise_(model: nn.Module) -> None:
    """Draw the weights again for the widths that the network has now, not for those it was cut from.

    Layers of transformers have a spread that does not depend on the width, and stay.
    """
    if hasattr(model, "_init_weights"):
        return
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


class Start:
    """The checkpoint of a task, its plan and what it costs; nothing of it is changed by a contestant."""

    def __init__(self, task: Task, dense: nn.Module) -> None:
        self.dense = dense
        self.example: Any = task.example()
        self.plan = etp.trace(dense, self.example, prune=task.prune, ignore=task.ignore)
        self.count = Counter(task, dense, self.plan)
        self.macs = self.count(dense)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What a contestant made.

    Attributes:
        model: the network.
        strength: what the push came to.
        macs: of the network, as this library counts them; ``None`` where it did not cut it.
    """

    model: nn.Module
    strength: float | None = None
    macs: int | None = None


class Contest:
    """One contestant on one checkpoint.

    Args:
        start: the checkpoint.
        task: loss, data and recipe; the recipe is that of a trial while tuning.
        speed_up: dense over pruned MACs.
        seed: of the data order and of everything random in the method.
        watch: is shown the network of every stage.
    """

    def __init__(self, start: Start, task: Task, *, speed_up: float, seed: int, watch: Watch) -> None:
        self.start, self.task, self.speed_up, self.seed, self.watch = start, task, speed_up, seed, watch
        self.done = 0
        self.distilled = False

    def run(self, name: str, push: float | None) -> Finished:
        """The small network; ``push`` is that of its strength, if it has one (of `small-dense`: of its rate)."""
        torch.manual_seed(self.seed)
        self.distilled = name.endswith(DISTILLED)
        if FRESH in name:
            self._begin_fresh()
        name = bare_name(name)
        if name == UNPRUNED:
            return self._dense()
        if name == SMALL:
            return self._small(1.0 if push is None else push)
        if name == ONESHOT:
            return self._oneshot()
        if name in torch_pruning.PEERS:
            return self._peer(torch_pruning.PEERS[name], push)
        method = library_method(name)
        assert method is not None
        return self._library(method, push)

    def _begin_fresh(self) -> None:
        """Begin with random weights: the steps and the rate of a checkpoint's training belong to the sparse phase."""
        recipe = self.task.recipe
        steps = max(1, recipe.scratch_steps - recipe.finetune_steps)
        self.task = copy.copy(self.task)
        self.task.recipe = replace(recipe, sparse_steps=steps, sparse_rate=recipe.dense_rate)
        dense = self.task.build().to(self.task.device).eval()
        self.start = Start(self.task, dense)

    def _dense(self) -> Finished:
        model = copy.deepcopy(self.start.dense)
        self._phase(model, "sparse")
        self._phase(model, "finetuned")
        self.watch("finetuned", model)
        return Finished(model=model, macs=self.start.macs)

    def _small(self, push: float) -> Finished:
        """Fresh weights, every group narrowed alike until the MACs are met, trained from scratch."""
        model = self.task.build().to(self.task.device).eval()
        plan = etp.trace(model, self.start.example, prune=self.task.prune, ignore=self.task.ignore, check=False)
        scores = etp.criteria.random(model, plan, seed=self.seed)
        budget = etp.Budget(speed_up=self.speed_up, scope="local")
        selection = etp.allocate(model, plan, scores, budget=budget)
        macs = etp.cost(model, plan, selection).macs
        etp.prune_(model, plan, selection)
        initialise_(model)
        recipe, peak = self.task.recipe, push * self.task.recipe.dense_rate
        with self._teacher(model) as teacher:
            train(
                self.task, model, steps=recipe.scratch_steps, peak=peak, seed=self.seed, start=0,
                penalty=_distance(teacher),
            )  # fmt: skip
        self.watch("finetuned", model)
        return Finished(model=model, strength=peak, macs=macs)

    def _oneshot(self) -> Finished:
        """Prune without training by the defaults of ``oneshot_``, then take the steps of both phases."""
        model = copy.deepcopy(self.start.dense)
        calibration = self.task.calibration(torch.Generator().manual_seed(self.seed))
        batches = [self.task.inputs(some) for some in calibration]
        examples = dict(zip(map(id, batches), calibration, strict=True))
        generator = torch.Generator().manual_seed(self.seed)

        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            return self.task.loss(model, examples[id(batch)], generator)

        budget = etp.Budget(speed_up=self.speed_up)
        result = etp.oneshot_(model, batches, budget=budget, plan=self.start.plan, loss=loss, progress=False)
        self.watch("pruned", model)
        self._phase(model, "sparse")
        self._phase(model, "finetuned")
        self.watch("finetuned", model)
        return Finished(model=model, macs=result.pruned.macs)

    def _library(self, method: Method, push: float | None) -> Finished:
        """This library's pipeline, as users call it."""
        model, strength = copy.deepcopy(self.start.dense), None
        method = replace(method, seed=self.seed)
        if method.soft_every:
            method = replace(method, soft_every=self._steps_of_a_pass())
        if push is not None:
            strength = push * reference(self.task, model, self.start.plan, method)
            method = replace(method, beta=strength)
        pending: list[Stage] = ["dense"]

        def loop(model: nn.Module, phase: Any) -> None:
            if phase.name == "calibrate":
                self._calibrate(model, phase)
                return
            if phase.name == "sparse":
                self._phase(model, "sparse", phase=phase)
                pending.append("sparse")
                return
            if "sparse" not in trained:
                self._phase(model, "sparse", phase=phase, forced=False)  # as many steps as the others take
            self._phase(model, "finetuned", phase=phase)
            pending.append("finetuned")

        trained: list[Stage] = []

        def evaluate(model: nn.Module) -> float:
            stage: Stage = pending.pop() if pending else "pruned"
            trained.append(stage)
            self.watch(stage, model)
            return 0.0  # metrics are read afterwards, from what was watched

        result = etp.compress(
            model, self.start.example, train=loop, evaluate=evaluate, plan=self.start.plan, method=method,
            speed_up=self.speed_up, progress=False,
        )  # fmt: skip
        return Finished(model=model, strength=strength, macs=result.pruned.macs)

    def _steps_of_a_pass(self) -> int:
        """The steps of one pass over the data (an epoch), or of the whole phase if that is shorter."""
        return max(1, min(self.task.steps_per_pass, self.task.recipe.sparse_steps))

    def _calibrate(self, model: nn.Module, phase: Any) -> None:
        """A few training batches for criteria that watch data; nothing is learnt, and no step is counted."""
        generator = torch.Generator().manual_seed(self.seed)
        for chosen in self.task.batches(seed=self.seed, start=0, steps=CALIBRATION):
            labels = self.task.labels(chosen)
            if labels is not None:
                phase.labels(labels)
            model.zero_grad(set_to_none=True)
            torch.autograd.backward(self.task.loss(model, chosen, generator))
        model.zero_grad(set_to_none=True)

    def _peer(self, peer: torch_pruning.Peer, push: float | None) -> Finished:
        """Torch-Pruning's pipeline; fine-tuning is ours."""
        assert push is not None
        model = copy.deepcopy(self.start.dense)
        reg = push * torch_pruning.reference(peer, self.task, model)

        def loop(attach: Callable[[torch.optim.Optimizer], object], after_step: Callable[[int], object]) -> None:
            steps, peak = self.task.recipe.sparse_steps, self.task.recipe.sparse_rate
            train(
                self.task, model, steps=steps, peak=peak, seed=self.seed, start=self.done, attach=attach,
                after_step=after_step, weight_decay=0.0,
            )  # fmt: skip
            self.done += steps

        torch_pruning.compress(
            peer, model, self.start.example, target=int(self.start.macs / self.speed_up), reg=reg,
            count=self.start.count, train=loop, steps=self.task.recipe.sparse_steps,
            trained=lambda: self.watch("sparse", model),
        )  # fmt: skip
        self.watch("pruned", model)
        self._phase(model, "finetuned")
        self.watch("finetuned", model)
        return Finished(model=model, strength=reg)

    def _teacher(self, model: nn.Module) -> AbstractContextManager[Distillation | None]:
        """The dense network as a teacher, where the contestant is a distilled one."""
        if not self.distilled:
            return nullcontext()
        compare: Literal["predictions", "values"] = "predictions" if self.task.classes else "values"
        return Distillation(model, self.start.dense, temperature=TEMPERATURE, compare=compare)

    def _phase(self, model: nn.Module, name: Stage, *, phase: etp.Phase | None = None, forced: bool = True) -> None:
        """The steps of one phase, or of a round's share of it."""
        recipe, number, rounds = self.task.recipe, 0, 1
        if phase is not None:
            number, rounds = phase.round, phase.rounds
        total, peak = recipe.finetune_steps, recipe.finetune_rate
        if name == "sparse":
            total, peak = recipe.sparse_steps, recipe.sparse_rate
        steps = total * (number + 1) // rounds - total * number // rounds
        acts = phase if forced and name == "sparse" else None

        def attach(optimizer: torch.optim.Optimizer) -> object:
            return None if acts is None else acts.attach(optimizer, steps=steps) or (acts if acts.forced else None)

        def penalty() -> torch.Tensor:
            assert acts is not None
            assert acts.regularizer is not None
            return acts.regularizer.penalty()

        in_loss = acts is not None and acts.method.mode == "loss"
        with self._teacher(model) if name == "finetuned" else nullcontext() as teacher:
            extra = penalty if in_loss else _distance(teacher)
            train(
                self.task, model, steps=steps, peak=peak, seed=self.seed, start=self.done, attach=attach, penalty=extra
            )
        self.done += steps
