"""One seed of the comparison. Every method compresses the same checkpoint with the same data order and epochs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor, nn

from etp_graph.budget import Budget, allocate
from etp_graph.compression import Phase, compress
from etp_graph.demo.zoo.data import Split
from etp_graph.demo.zoo.torch_pruning import depgraph_compress
from etp_graph.demo.zoo.training import Augment, accuracy, steps_per_epoch, train_epochs
from etp_graph.errors import BudgetError
from etp_graph.graph import trace
from etp_graph.methods import Method, get
from etp_graph.surgery import prune_
from etp_graph.units import Units

from ._results import GroupNorms, MethodName, MethodOutcome, Point, Recipe

Attach = Callable[[torch.optim.Optimizer], object]


def count_macs(model: nn.Module, x: Tensor) -> int:
    """Count the MACs of all convolutions and linear layers in one forward, independently of both libraries."""
    total = 0

    def add(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        total += out.numel() * weight[0].numel()

    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(add) for layer in layers]
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
    return total


class Contest:
    """The checkpoint of one seed, and the methods that compress copies of it.

    Args:
        build: function that creates the network. If the recipe has no dense epochs, the network must already have its
            trained weights.
        split: the images; accuracies are those on the test images.
        recipe: training recipe, the same for all methods.
        speed_up: dense MACs over pruned MACs that every method must reach.
        seed: seed of initialisation and data order.
        augment: augmentation of the training images.
        tick: called with a description of the current training and the number of epochs finished since the last call.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        split: Split,
        recipe: Recipe,
        *,
        speed_up: float,
        seed: int,
        augment: Augment | None = None,
        tick: Callable[[str, int], None] = lambda what, epochs: None,
    ) -> None:
        self.split, self.recipe, self.speed_up, self.seed = split, recipe, speed_up, seed
        self.augment, self.tick = augment, tick
        torch.manual_seed(seed)
        self.checkpoint = build()
        self.device = next(self.checkpoint.parameters()).device
        self.example = split.train_x[:1].to(self.device)
        if recipe.dense_epochs:
            self._train(self.checkpoint, "dense checkpoint", epochs=recipe.dense_epochs, lr=recipe.dense_lr, part=0)
        self.checkpoint.eval()
        self.plan = trace(self.checkpoint, self.example)
        self.macs = count_macs(self.checkpoint, self.example)
        self.dense = self.accuracy(self.checkpoint)
        self._curve: tuple[Point, ...] = ()
        self._norms: list[GroupNorms] = []

    def accuracy(self, model: nn.Module) -> float:
        """Return the share of test images that the model classifies correctly."""
        return accuracy(model, self.split.test_x, self.split.test_y)

    def run(self, method: MethodName) -> tuple[MethodOutcome, nn.Module]:
        """Compress a copy of the checkpoint. Return the outcome and the compressed network."""
        self._curve, self._norms = (), []
        model = copy.deepcopy(self.checkpoint)
        torch.manual_seed(self.seed)
        start = perf_counter()
        run = {"dense": self._dense, "depgraph": self._depgraph}.get(method)
        sparse, pruned, finetuned, curve_seconds = run(model) if run else self._compress(model, method)
        seconds = perf_counter() - start - curve_seconds
        macs = count_macs(model, self.example)
        outcome = MethodOutcome(
            method=method, seed=self.seed, dense=self.dense, sparse=sparse, pruned=pruned, finetuned=finetuned,
            macs=macs, params=sum(p.numel() for p in model.parameters()), speed_up=self.macs / macs,
            seconds=seconds, curve=self._curve, norms=tuple(self._norms),
        )  # fmt: skip
        return outcome, model.eval()

    # The methods. Each returns the accuracies before surgery, right after it, and at the end, and the seconds spent on
    # the curve, which do not count as time of the method.

    def _dense(self, model: nn.Module) -> tuple[float, float, float, float]:
        """Train the control that is never pruned, for the same epochs at the same learning rates."""
        self._sparse(model, "dense control")
        sparse = self.accuracy(model)
        self._finetune(model, "dense control")
        return sparse, sparse, self.accuracy(model), 0.0

    def _compress(self, model: nn.Module, name: MethodName) -> tuple[float, float, float, float]:
        """Compress with this library. A method without a sparse phase trains for all its epochs after surgery."""
        preset = replace(get(name), seed=self.seed)
        if preset.steered:
            return self._steered(model, preset, name)
        method, spent = replace(preset, beta=self.recipe.strengths.get(name, preset.beta)), 0.0

        def train(model: nn.Module, phase: Phase) -> None:
            nonlocal spent
            if phase.name == "sparse":
                self._sparse(model, name, attach=phase.attach, watch=phase)
                start = perf_counter()
                scores = phase.method.scores(model, self.plan, regularizer=phase.regularizer)
                self._curve = self._points(
                    name,
                    model,
                    lambda net, s: self._cut(net, scores, phase.method.with_rules(Budget(speed_up=s))),
                )
                spent = perf_counter() - start
                return
            if method.force is None:
                self._sparse(model, name)
            self._finetune(model, name)

        return *self._cycle(model, method, self.speed_up, train), spent

    def _steered(self, model: nn.Module, method: Method, name: MethodName) -> tuple[float, float, float, float]:
        """Compress with a strength that follows from the target. Each point of the curve needs its own sparse phase."""
        steps = self.recipe.sparse_epochs * steps_per_epoch(len(self.split.train_x), self.recipe.batch_size)

        def train(model: nn.Module, phase: Phase) -> None:
            if phase.name == "sparse":
                self._sparse(model, name, attach=lambda optimizer: phase.attach(optimizer, steps=steps), watch=phase)
            else:
                self._finetune(model, name)

        found = self._cycle(model, method, self.speed_up, train)
        start = perf_counter()
        self._curve = tuple(self._own_points(method, name, steps))
        return *found, perf_counter() - start

    def _own_points(self, method: Method, name: MethodName, steps: int) -> Iterator[Point]:
        for speed_up in self.recipe.curve:
            what = f"{name}, curve at {speed_up:g}x"

            def train(model: nn.Module, phase: Phase, what: str = what) -> None:
                if phase.name == "sparse":
                    self._sparse(model, what, attach=lambda optimizer: phase.attach(optimizer, steps=steps))
                else:
                    self._train(model, what, epochs=self.recipe.curve_epochs, lr=self.recipe.finetune_lr, part=3)

            torch.manual_seed(self.seed)
            try:
                _, pruned, finetuned = self._cycle(copy.deepcopy(self.checkpoint), method, speed_up, train)
            except BudgetError:
                continue
            yield Point(speed_up=speed_up, pruned=pruned, finetuned=finetuned)

    def _cycle(
        self, model: nn.Module, method: Method, speed_up: float, train: Callable[[nn.Module, Phase], None]
    ) -> tuple[float, float, float]:
        """Run all phases, in place. Return the accuracies before surgery, right after it, and at the end."""
        result = compress(
            model, self.example, train=train, evaluate=self.accuracy, plan=self.plan, method=method,
            speed_up=speed_up, progress=False,
        )  # fmt: skip
        sparse = result.metric_dense if result.metric_sparse is None else result.metric_sparse
        return sparse, result.metric_pruned, result.metric_finetuned

    def _depgraph(self, model: nn.Module) -> tuple[float, float, float, float]:
        """Compress with Torch-Pruning. As its authors do, turn off weight decay in the sparse phase."""
        sparse, spent = self.dense, 0.0

        def train(model: nn.Module, attach: Attach) -> None:
            nonlocal sparse, spent
            self._sparse(model, "depgraph", attach=attach, weight_decay=0.0)
            sparse = self.accuracy(model)
            start = perf_counter()
            self._curve = self._points("depgraph", model, lambda net, s: self._group_norm(net, s, reg=0.0))
            spent = perf_counter() - start

        self._group_norm(model, self.speed_up, reg=self.recipe.strengths.get("depgraph", 5e-4), train=train)
        pruned = self.accuracy(model)
        self._finetune(model, "depgraph")
        return sparse, pruned, self.accuracy(model), spent

    def _group_norm(
        self,
        model: nn.Module,
        speed_up: float,
        *,
        reg: float,
        train: Callable[[nn.Module, Attach], object] = lambda model, attach: None,
    ) -> None:
        depgraph_compress(
            model, self.example, target_macs=int(self.macs / speed_up), train=train, reg=reg,
            count=lambda net: count_macs(net, self.example),
        )  # fmt: skip

    def _cut(self, model: nn.Module, scores: Tensor, budget: Budget) -> None:
        prune_(model, self.plan, allocate(model, self.plan, scores, budget=budget))

    def _points(self, name: str, model: nn.Module, cut: Callable[[nn.Module, float], None]) -> tuple[Point, ...]:
        """Prune and fine-tune a copy of the sparse-trained model for each reachable speed-up of the curve."""
        points = []
        for speed_up in self.recipe.curve:
            smaller = copy.deepcopy(model)
            try:
                cut(smaller, speed_up)
            except BudgetError:
                continue
            pruned = self.accuracy(smaller)
            epochs = self.recipe.curve_epochs
            self._train(smaller, f"{name}, curve at {speed_up:g}x", epochs=epochs, lr=self.recipe.finetune_lr, part=3)
            points.append(Point(speed_up=speed_up, pruned=pruned, finetuned=self.accuracy(smaller)))
        return tuple(points)

    # Training. The data order depends only on the seed and the part of the training, so all methods have the same.

    def _sparse(
        self,
        model: nn.Module,
        name: str,
        *,
        attach: Attach | None = None,
        watch: Phase | None = None,
        weight_decay: float = 5e-4,
    ) -> None:
        epochs = self.recipe.sparse_epochs
        marks = {round(epochs * share) for share in (0.25, 0.5, 1.0)}

        def begin(optimizer: torch.optim.Optimizer) -> None:
            if attach is not None:
                attach(optimizer)
            self._record(model, watch, 0)

        def after(epoch: int) -> None:
            if epoch in marks:
                self._record(model, watch, epoch)

        self._train(
            model, f"{name}, sparse training" if attach else f"{name}, training", epochs=epochs,
            lr=self.recipe.sparse_lr, part=1, attach=begin, after=after, weight_decay=weight_decay,
        )  # fmt: skip

    def _finetune(self, model: nn.Module, name: str) -> None:
        recipe = self.recipe
        self._train(model, f"{name}, fine-tuning", epochs=recipe.finetune_epochs, lr=recipe.finetune_lr, part=2)

    def _train(
        self,
        model: nn.Module,
        what: str,
        *,
        epochs: int,
        lr: float,
        part: int,
        attach: Attach | None = None,
        after: Callable[[int], None] = lambda epoch: None,
        weight_decay: float = 5e-4,
    ) -> None:
        def progress(done: int, total: int, loss: float) -> None:
            self.tick(what, 1)
            after(done)

        self.tick(what, 0)
        train_epochs(
            model, self.split, epochs=epochs, lr=lr, weight_decay=weight_decay, batch_size=self.recipe.batch_size,
            seed=10 * self.seed + part, augment=self.augment, attach=attach, progress=progress,
        )  # fmt: skip

    @torch.no_grad()
    def _record(self, model: nn.Module, phase: Phase | None, epoch: int) -> None:
        """Record norms and distances of the units of the largest group that is not locked."""
        if phase is None or phase.regularizer is None:
            return
        group, span = max(((g, s) for g, s in self.plan.spans() if g.locked is None), key=lambda pair: pair[0].n_units)
        norms = Units(model, self.plan).square_norms(model).sqrt()[span]
        distance = phase.regularizer.distances()[span]
        self._norms.append(
            GroupNorms(group=group.name, epoch=epoch, distance=tuple(distance.tolist()), norm=tuple(norms.tolist()))
        )
