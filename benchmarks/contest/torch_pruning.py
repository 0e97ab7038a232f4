"""Torch-Pruning's own pruners, as ``reproduce/main.py`` of Torch-Pruning 1.6.1 runs them.

Nothing here uses this library's tracing, criteria or surgery. In the sparse phase the optimizer's weight decay is off,
as there; units go in 400 steps, ranked over all groups or in each, until the target is met.

What its authors ran (github.com/VainF/Torch-Pruning, commit e80127d): ``reproduce/scripts/prune/cifar/group_pruner.sh``
and the options in the logs under ``reproduce/run``. For ``group_sl`` on ResNet-56 (2.11x and 2.55x) and on VGG-19
(8.84x): ``--reg 5e-4 --global-pruning``, SGD with momentum 0.9 at ``--sl-lr 0.01``, batches of 128, 100 epochs with
milestones 60 and 80, then the same again to fine-tune, with weight decay 5e-4 then only. ``readme.md`` gives ``slim``
with ``--reg 1e-5``, and ``growing_reg`` with ``--reg 1e-4 --delta_reg 1e-5``; ``main.py`` has 5e-4 and 1e-4 where
nothing is given. :data:`COMMITTED` holds them, and :func:`committed_push` says which push they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertSelfAttention

from benchmarks.contest.strength import drift, gradients_of, normalised
from benchmarks.tasks.base import Task
from etp_graph.demo.zoo.models import PaddedShortcut
from etp_graph.demo.zoo.torch_pruning import ChannelSelect, replace_padded_shortcuts, select_pruner
from etp_graph.errors import BudgetError

Attach = Callable[[torch.optim.Optimizer], object]
STEPS = 400
UPDATES = 100
"""How often the growing regularization grows: once in each of its authors' 100 epochs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A pruner of Torch-Pruning.

    Attributes:
        method: its name in ``reproduce/main.py``.
        pruner: name of its class.
        importance: makes its importance from the module ``torch_pruning.importance``.
        pull: what its regularizer multiplies the strength with for a typical unit, on average over the phase.
        scales: the force acts on the sign of batch norm scales, and not on weights in proportion to them.
        everywhere: units are ranked over all groups (``--global-pruning``); else each group loses the same share.
    """

    method: str
    pruner: str
    importance: Callable[[Any], Any]
    pull: float
    scales: bool = False
    everywhere: bool = True


PEERS: Mapping[str, Peer] = {
    "tp-groupnorm": Peer(  # DepGraph (Fang et al. 2023): 2^(4 x), x in [0, 1]
        method="group_sl", pruner="GroupNormPruner", pull=4.0,
        importance=lambda tp: tp.GroupMagnitudeImportance(p=2, normalizer="max"),
    ),
    "tp-groupnorm-local": Peer(  # the same, every group at the same ratio
        method="group_sl", pruner="GroupNormPruner", pull=4.0, everywhere=False,
        importance=lambda tp: tp.GroupMagnitudeImportance(p=2, normalizer="max"),
    ),
    "tp-bnscale": Peer(  # Network Slimming (Liu et al. 2017)
        method="slim", pruner="BNScalePruner", importance=lambda tp: tp.BNScaleImportance(), pull=1.0, scales=True,
    ),
    "tp-growing": Peer(  # growing regularization (Wang et al. 2021): reg, and 100 increments of reg / 5 times x
        method="growing_reg", pruner="GrowingRegPruner", pull=1.0 + UPDATES / 5 / 4,
        importance=lambda tp: tp.GroupMagnitudeImportance(p=2),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedRecipe:
    """The sparse phase that the authors of Torch-Pruning ran on CIFAR, as their options say it.

    Attributes:
        reg: strength of the regularizer.
        delta_reg: what is added to it after an epoch; ``None``: it does not grow.
        epochs, milestones, rate, decay, momentum, batch_size: of SGD; the rate falls by ``decay`` at each milestone.
    """

    reg: float
    delta_reg: float | None = None
    epochs: int = 100
    milestones: tuple[int, ...] = (60, 80)
    rate: float = 0.01
    decay: float = 0.1
    momentum: float = 0.9
    batch_size: int = 128


COMMITTED: Mapping[str, CommittedRecipe] = {
    "tp-groupnorm": CommittedRecipe(reg=5e-4),
    "tp-bnscale": CommittedRecipe(reg=1e-5),
    "tp-growing": CommittedRecipe(reg=1e-4, delta_reg=1e-5),
}


def committed_push(name: str, *, n_train: int = 50_000) -> float:
    """The push (:mod:`benchmarks.contest.strength`) of the committed recipe on a training set of this size.

    It is reg · pull · Σ_t η(t) / (1 − momentum): the share of its norm that a weight with a typical importance would
    lose if nothing opposed it. For ``tp-bnscale`` it is what a scale loses, in units of scale 1.
    """
    recipe, peer = COMMITTED[name], PEERS[name]
    epochs = [
        recipe.rate * recipe.decay ** sum(epoch >= m for m in recipe.milestones) for epoch in range(recipe.epochs)
    ]
    steps = n_train // recipe.batch_size
    pull = peer.pull
    if recipe.delta_reg is not None:  # grows by x · delta after each epoch, x in [0, 1] being 1/2 for a typical unit
        grown = [1 + epoch * recipe.delta_reg / recipe.reg / 2 for epoch in range(recipe.epochs)]
        return recipe.reg * steps * sum(r * g for r, g in zip(epochs, grown, strict=True)) / (1 - recipe.momentum)
    return recipe.reg * pull * steps * sum(epochs) / (1 - recipe.momentum)


def customized(model: nn.Module, example: Any) -> dict[type[nn.Module], Any]:
    """Replace layers that Torch-Pruning reads wrongly by equal ones that it has a pruning function for, in place."""
    import torch_pruning as tp

    if not any(isinstance(module, PaddedShortcut) for module in model.modules()):
        return {}
    replace_padded_shortcuts(model, example)
    return {ChannelSelect: select_pruner(tp)}


def heads(model: nn.Module) -> dict[nn.Module, int]:
    """How many heads each projection of an attention has: the hint that Torch-Pruning's example for BERT gives."""
    return {
        getattr(attention, name): attention.num_attention_heads
        for attention in _attentions(model)
        for name in ("query", "key", "value")
    }


def resize_heads_(model: nn.Module) -> None:
    """Tell attentions how wide their heads are now; Torch-Pruning leaves that to its users."""
    for attention in _attentions(model):
        attention.all_head_size = attention.query.out_features
        attention.attention_head_size = attention.query.out_features // attention.num_attention_heads


def _attentions(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BertSelfAttention)]


@contextmanager
def learning(model: nn.Module) -> Iterator[None]:
    """All parameters require gradients, through which Torch-Pruning finds its way; afterwards as before."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def reference(peer: Peer, task: Task, model: nn.Module) -> float:
    """The strength of the push 1, see :mod:`benchmarks.contest.strength`.

    Raises:
        ValueError: the pruner's force finds nothing to act on.
    """
    named = dict(model.named_modules())
    owners = {name: named[name.rpartition(".")[0]] for name, _ in model.named_parameters()}
    kinds = (nn.modules.batchnorm._BatchNorm,) if peer.scales else (nn.modules.conv._ConvNd, nn.Linear)
    weights = {
        name: p.detach()
        for name, p in model.named_parameters()
        if isinstance(owners[name], kinds) and name.endswith("weight")
    }
    if not weights:
        raise ValueError("the regularizer acts on batch norms, convolutions or linear layers, and there are none")
    adaptive = normalised(task, "gradient")
    gradients = gradients_of(task, model) if adaptive else {}
    if peer.scales:
        value = torch.cat([(gradients[name] if adaptive else w).abs().flatten() for name, w in weights.items()])
    else:
        value = torch.cat(
            [_norms(gradients[name]) / _norms(w) if adaptive else _norms(w) * 0 + 1 for name, w in weights.items()]
        )
    return float(value.median()) / peer.pull / (1.0 if adaptive else drift(task))


def _norms(weight: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return norms.clamp(min=1e-12)


def compress(
    peer: Peer,
    model: nn.Module,
    example: Any,
    *,
    target: int,
    reg: float,
    count: Callable[[nn.Module], int],
    train: Callable[[Attach, Callable[[int], object]], object],
    steps: int,
    trained: Callable[[], object],
) -> None:
    """Sparse training and surgery in place.

    Args:
        peer: the pruner.
        model: trained network; afterwards the pruned one.
        example: inputs for the graph.
        target: MACs that the result may cost.
        reg: strength; the authors use 5e-4 for 100 epochs.
        count: counts MACs.
        train: runs the sparse phase, given what is to be done with the optimizer and after every step.
        steps: of that phase.
        trained: is called between the phase and surgery.

    Raises:
        BudgetError: the target cannot be reached.
        Exception: whatever Torch-Pruning raises.
    """
    with learning(model):
        pruner = _pruner(peer, model, example, reg)
    pruner.update_regularizer()
    every = max(1, steps // UPDATES)

    def grow(step: int) -> None:
        if peer.pruner == "GrowingRegPruner" and step % every == 0:
            pruner.update_reg()

    train(lambda optimizer: optimizer.register_step_pre_hook(lambda *_: pruner.regularize(model)), grow)
    trained()
    _cut(pruner, model, target, count)


def _pruner(peer: Peer, model: nn.Module, example: Any, reg: float) -> Any:
    """The pruner over all groups, from nothing to everything pruned; layers that make the output stay whole."""
    import torch_pruning as tp

    pruners = customized(model, example)
    model.eval()
    graph = tp.DependencyGraph()
    for layer, function in pruners.items():
        graph.register_customized_layer(layer, function)
    graph.build_dependency(model, example, verbose=False)
    last = [layer for layer, node in graph.module2node.items() if not node.outputs and isinstance(layer, nn.Module)]
    more = {"delta_reg": reg / 5} if peer.pruner == "GrowingRegPruner" else {}
    return getattr(tp.pruner, peer.pruner)(
        model, example, importance=peer.importance(tp.importance), reg=reg, global_pruning=peer.everywhere,
        pruning_ratio=1.0, iterative_steps=STEPS, ignored_layers=last, customized_pruners=pruners,
        # The defaults of these are dictionaries shared by all pruners of a process, and filled by each.
        in_channel_groups={}, out_channel_groups={}, num_heads=heads(model), **more,
    )  # fmt: skip


def _cut(pruner: Any, model: nn.Module, target: int, count: Callable[[nn.Module], int]) -> None:
    model.eval()
    macs = count(model)
    while macs > target:
        if pruner.current_step == STEPS:
            raise BudgetError(f"all {STEPS} pruning steps of Torch-Pruning end at {macs} MACs, not at {target}")
        pruner.step()
        resize_heads_(model)
        macs = count(model)
