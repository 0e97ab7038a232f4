"""Steps of one compression. Each finished step is recorded in the journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph._config import quoted
from etp_graph.budget import Budget, allocate
from etp_graph.collect import Observations, needs_backward, unwatched_groups, watch
from etp_graph.errors import CheckpointError, EtpError, PlanError
from etp_graph.methods import Method
from etp_graph.plan import Cost, CostModel, LatencyFit, Plan, Selection
from etp_graph.regularizer import Regularizer
from etp_graph.surgery import prune_

from ._calibration import WeightsUnchanged
from ._journal import Journal
from ._phase import Phase, PhaseName
from ._progress import Bar
from ._result import CompressResult, Round
from ._step_files import StepResult
from ._training_state import TrainingState

Train = Callable[[nn.Module, Phase], object]

Evaluate = Callable[[nn.Module], float]


def n_steps(method: Method) -> int:
    """Return the number of steps of a run with this method."""
    return method.rounds * (5 + 2 * method.sparse + method.collected)


class Compression:
    """One call of :func:`etp_graph.compress`, whose steps run through the journal.

    ``expected`` is the cost of the model that surgery would give if it took place before training. During training its
    MACs replace a target in time, because time cannot be measured there.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        method: Method,
        budget: Budget,
        inputs: Any,
        *,
        journal: Journal,
        bar: Bar,
        expected: Cost,
        train: Train,
        evaluate: Evaluate,
        start: TrainingState,
        also: Sequence[nn.Module] = (),
    ) -> None:
        self.model, self.plan, self.method, self.budget = model, plan, method, budget
        self.inputs, self.journal, self.bar = inputs, journal, bar
        self.train, self.evaluate, self.start, self.also = train, evaluate, start, also
        self.dense, self.expected = CostModel(plan).dense, expected
        self.dense_amount = plan.amount(budget.counted)
        self.regularizer: Regularizer | None = None
        self.record: Observations | None = None
        self.round = 0

    def compress(self, retrace: Callable[[], Plan]) -> CompressResult:
        """Run all steps and return the result. ``retrace`` traces the model anew at the start of later rounds."""
        metric, seconds = self._measure("dense", {"cost": self.dense.to_json()}, {"plan": _packed(self.plan)})
        rounds = []
        for number in range(self.method.rounds):
            self.round = number
            if number:
                self._retrace(retrace)
            rounds.append(self._one_round())
        result = CompressResult(
            method=self.method, budget=self.budget, dense=self.dense, metric_dense=metric, rounds=tuple(rounds),
            seconds_dense=seconds,
        )  # fmt: skip
        result.warn_if_diverging()
        return result

    def _one_round(self) -> Round:
        seconds: dict[str, float] = {}
        evaluating = 0.0
        sparse, metric_sparse = None, None
        if self.method.sparse:
            sparse = self._step("sparse", lambda: self._train("sparse"), changes=True)
            seconds["sparse"] = sparse["seconds"]
            metric_sparse, evaluating = self._measure("sparse")
        if self.method.collected:
            seconds["calibrate"] = self._calibrate()
        pruned = self._step("prune", lambda: self._prune(sparse), changes=True)
        metric_pruned, spent = self._measure("pruned")
        evaluating += spent
        finetuned = self._step("finetune", lambda: self._train("finetune"), changes=True)
        metric_finetuned, spent = self._measure("finetuned")
        seconds |= {"prune": pruned["seconds"], "finetune": finetuned["seconds"], "evaluate": evaluating + spent}
        return Round(
            metric_sparse=metric_sparse, metric_pruned=metric_pruned, metric_finetuned=metric_finetuned,
            cost=Cost.from_json(pruned["cost"]), selection=Selection.from_json(pruned["selection"]),
            fingerprint=self.plan.fingerprint, seconds=seconds,
            latency=None if pruned.get("latency") is None else LatencyFit.from_dict(pruned["latency"]),
        )  # fmt: skip

    def _step(
        self, name: str, action: Callable[[], tuple[StepResult, Mapping[str, Tensor]]], *, changes: bool = False
    ) -> StepResult:
        """Run one step, or read its outcome from the journal. ``changes``: the step changes the model."""

        def timed() -> tuple[StepResult, Mapping[str, Tensor]]:
            start = perf_counter()
            outcome, tensors = action()
            outcome = {**outcome, "seconds": perf_counter() - start}
            if not changes:
                return outcome, tensors
            state, buffers = self.start.describe(self.model)
            return {**outcome, "training_state": state}, {**tensors, **buffers}

        self.bar.begin(name if self.method.rounds == 1 else f"{name} {self.round + 1}/{self.method.rounds}")
        found = self.journal.step(f"{name}-{self.round}", timed, model=self.model if changes else None)
        self.bar.end()
        return found

    def _measure(
        self, stage: str, outcome: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> tuple[float, float]:
        """Evaluate the model; return the metric and the seconds of the evaluation.

        ``outcome`` and ``tensors`` are stored with the step; the report reads them.
        """

        def action() -> tuple[StepResult, Mapping[str, Tensor]]:
            self.model.eval()
            return {"metric": _number(self.evaluate(self.model), stage), **(outcome or {})}, tensors or {}

        found = self._step(f"evaluate-{stage}", action)
        return float(found["metric"]), float(found["seconds"])

    def _phase(self, name: PhaseName, **extra: Any) -> Phase:
        """Call ``train`` with a new phase, and check the parameters and the force afterwards.

        Raises:
            PlanError: ``train`` replaced a parameter.
            ForceError: the method's force never acted.
        """
        before = dict(self.model.named_parameters())
        shapes = {key: tensor.shape for key, tensor in before.items()}
        phase = Phase(
            name, model=self.model, plan=self.plan, method=self.method, budget=self._aim(), bar=self.bar,
            round=self.round, rounds=self.method.rounds, **extra,
        )  # fmt: skip
        self.model.zero_grad(set_to_none=True)
        try:
            self.train(self.model, phase)
        finally:
            phase.close()
        after = dict(self.model.named_parameters())
        for key in {**before, **after}:
            if before.get(key) is not after.get(key) or shapes[key] != after[key].shape:
                raise PlanError(
                    f"train replaced the parameter {key} in the {name} phase: train the parameters that are there "
                    "(load_state_dict without assign=True keeps them, and so does an optimizer)."
                )
        phase.check_used()
        return phase

    def _train(self, name: PhaseName) -> tuple[StepResult, Mapping[str, Tensor]]:
        self.model.train()
        phase = self._phase(name)
        _check_finite(self.model, name)
        self.regularizer = phase.regularizer
        if self.regularizer is None:
            return {}, {}
        state = self.regularizer.state_dict()
        outcome = {"steps": phase.steps, "steps_done": state["steps_done"]}
        return outcome, {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def _calibrate(self) -> float:
        """Record the data that the criterion needs; return the seconds that this took."""

        def action() -> tuple[StepResult, Mapping[str, Tensor]]:
            name = self.method.criterion_name
            self.model.train(
                needs_backward(self.method.observes)
            )  # cuDNN computes gradients of recurrent layers in training mode only
            with WeightsUnchanged(self.model) as kept, watch(self.model, self.plan, name) as record:
                self._phase("calibrate", record=record, kept=kept)
            self.model.zero_grad(set_to_none=True)
            record.read(name, self.plan)
            self.record = record
            return {}, {"record": record.values[name]}

        replayed = self.journal.replaying
        found = self._step("calibrate", action)
        if replayed:
            kept = self.journal.tensors(found).get("record")
            if kept is None:
                raise CheckpointError(f"step {found['step']!r} of the checkpoint lost its record: use another folder.")
            self.record = Observations({self.method.criterion_name: kept}, unwatched_groups(self.plan, kept))
        return float(found["seconds"])

    def _prune(self, sparse: StepResult | None) -> tuple[StepResult, Mapping[str, Tensor]]:
        if sparse is not None and self.regularizer is None:
            self.regularizer = self._regularizer_after(sparse)
        scores = self.method.scores(self.model, self.plan, regularizer=self.regularizer, record=self.record)
        selection = allocate(self.model, self.plan, scores, budget=self._share(), example_inputs=self.inputs)
        self.regularizer, self.record = None, None  # they do not fit the pruned model
        prune_(self.model, self.plan, selection, also=self.also)
        cost = CostModel(self.plan).evaluate(selection.flat(self.plan))
        fit = None if selection.latency is None else selection.latency.to_dict()
        return {"selection": selection.to_json(), "cost": cost.to_json(), "latency": fit}, {}

    def _regularizer_after(self, sparse: StepResult) -> Regularizer | None:
        """Rebuild the regularizer at the end of a sparse phase that an earlier run finished."""
        found = self.method.regularizer(self.model, self.plan, steps=sparse.get("steps"), budget=self._aim())
        if found is not None:
            state, kept = found.state_dict(), self.journal.tensors(sparse)
            vectors = {name: kept.get(name) for name, value in state.items() if isinstance(value, Tensor)}
            found.load_state_dict({**state, **vectors, "steps_done": sparse["steps_done"]})
        return found

    def _share(self) -> Budget:
        """Return the budget of this round. The schedule says which share of the cost reduction it asks for."""
        if self.method.rounds == 1:
            return self.budget
        dense = self.dense_amount
        target = self.budget.largest_amount(dense)
        share = self.method.schedule((self.round + 1) / self.method.rounds)
        goal = target if share == 1 or target >= dense else dense - int(share * (dense - target))
        return self.budget.with_count(goal)

    def _aim(self) -> Budget:
        """Return the budget of the sparse phase of this round, in a quantity that is counted."""
        return self.budget.with_cost(self.expected) if self.budget.measured else self._share()

    def _retrace(self, retrace: Callable[[], Plan]) -> None:
        """Trace the pruned model and use this plan from now on. Groups that were locked stay locked."""

        def action() -> tuple[StepResult, Mapping[str, Tensor]]:
            plan = retrace()
            names = {group.name for group in plan.groups}
            locked = {g.name: g.locked for g in self.plan.groups if g.locked is not None and g.name in names}
            self.plan = plan.lock(locked)
            return {}, {"plan": _packed(self.plan)}

        replayed = self.journal.replaying
        found = self._step("trace", action)
        if replayed:
            self.plan = self.journal.plan(found)


def _packed(plan: Plan) -> Tensor:
    """Return the plan's JSON as bytes, uint8 [length], so that it can be stored in the safetensors file of a step."""
    return torch.frombuffer(bytearray(plan.to_json().encode()), dtype=torch.uint8)


def _check_finite(model: nn.Module, name: str) -> None:
    """Raise :class:`EtpError` if a parameter has NaN or infinite values, so that no checkpoint stores them."""
    spoiled = [key for key, value in model.named_parameters() if not bool(value.isfinite().all())]
    if spoiled:
        raise EtpError(
            f"training in the {name} phase left NaN or infinite values in {quoted(spoiled)}: lower the learning rate, "
            "or the method's beta. A checkpoint stays at the step before."
        )


def _number(value: object, stage: str) -> float:
    try:
        metric = float(value)  # type: ignore[arg-type]  # accepts numbers of NumPy and tensors of one element
    except (TypeError, ValueError, RuntimeError) as error:
        raise EtpError(
            f"evaluate gave {value!r} for the {stage} model: return one number, such as float(...)."
        ) from error
    if not isfinite(metric):
        raise EtpError(
            f"evaluate gave {metric} for the {stage} model: return a finite number. If the training diverged, lower "
            "the learning rate, or the method's beta."
        )
    return metric
