"""DepGraph baseline (Fang et al. 2023) with the pruner, importance and regularizer of Torch-Pruning.

It uses none of this library's tracing, criteria or surgery, so that the demo compares two independent implementations.
The recipe and its numbers are those of ``reproduce/main.py`` (method ``group_sl``) in Torch-Pruning 1.6.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph.errors import BudgetError, EtpError

from .models import PaddedShortcut

Attach = Callable[[torch.optim.Optimizer], object]

Train = Callable[[nn.Module, Attach], object]
"""Function that trains the model. It passes its optimizer to the second argument before the first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineReport:
    """Costs before and after pruning by the baseline.

    Attributes:
        base_macs: MACs before pruning, for one example input.
        macs: MACs after pruning.
        base_params: parameters before pruning.
        params: parameters after pruning.
        steps: number of pruning steps.
    """

    base_macs: int
    macs: int
    base_params: int
    params: int
    steps: int


class ChannelSelect(nn.Module):
    """A padded shortcut from which any input or output channel can be removed.

    Computes ``out[:, target] = x[:, source, ::s, ::s]``; all other output channels are zero. Before pruning, the output
    equals that of :class:`PaddedShortcut`.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        before: channel i of the input becomes channel ``before + i`` of the output.
        stride: keep every ``stride``-th row and column.
    """

    source: Tensor
    target: Tensor

    def __init__(self, *, channels_in: int, channels_out: int, before: int, stride: int) -> None:
        super().__init__()
        self.channels_in = channels_in
        self.channels_out = channels_out
        self.stride = stride
        self.register_buffer("source", torch.arange(channels_in), persistent=False)
        self.register_buffer("target", torch.arange(channels_in) + before, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, channels_in, h, w] to [n, channels_out, h / stride, w / stride]."""
        small = x[:, :, :: self.stride, :: self.stride].index_select(1, self.source)
        out = small.new_zeros(len(x), self.channels_out, *small.shape[2:])
        return out.index_add(1, self.target, small)

    def drop_inputs(self, channels: Sequence[int]) -> None:
        """Remove these input channels. The output channels that they were copied to become zero."""
        self.source, self.target = _drop(self.source, self.target, channels, self.channels_in)
        self.channels_in -= len(channels)

    def drop_outputs(self, channels: Sequence[int]) -> None:
        """Remove these output channels. The input channels that were copied to them are no longer read."""
        self.target, self.source = _drop(self.target, self.source, channels, self.channels_out)
        self.channels_out -= len(channels)


def _drop(index: Tensor, partner: Tensor, channels: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """Remove ``channels`` of 0..size-1 from ``index``, renumber the rest, and keep the partners of the rest."""
    keep = torch.ones(size, dtype=torch.bool, device=index.device)
    keep[torch.as_tensor(channels, dtype=torch.int64, device=index.device)] = False
    renumbered = keep.cumsum(0) - 1
    stays = keep[index]
    return renumbered[index[stays]], partner[stays]


def depgraph_compress(
    model: nn.Module,
    example_inputs: Tensor,
    *,
    target_macs: int,
    train: Train,
    reg: float = 5e-4,
    normalizer: str | None = "max",
    iterative_steps: int = 400,
    max_pruning_ratio: float = 1.0,
    ignored_layers: Sequence[nn.Module] = (),
    count: Callable[[nn.Module], int] | None = None,
) -> BaselineReport:
    """Run DepGraph's group sparsity learning and progressive global pruning, in place, without fine-tuning.

    ``train`` runs the sparse phase. Between backward and step, ``GroupNormPruner.regularize`` adds ``reg`` times
    2^(4 (I_max - I) / (I_max - I_min)) times the weight to the gradient of every unit. The authors turn off the
    optimizer's weight decay in this phase, and ``train`` should do the same. Then ``GroupNormPruner.step`` removes the
    units with the lowest ``GroupMagnitudeImportance`` across all groups, 1 / ``iterative_steps`` of them at a time,
    until the MACs are at or below ``target_macs``. As in the original, groups of width one are not pruned.

    **Option-A shortcuts need special handling.** Torch-Pruning 1.6.1 treats the zero padding as an element-wise
    operation. When it removes channel i of the first stage, it also removes channel i of the later stages, although the
    data of that channel lies in channel ``before + i`` there, and four inputs of the classifier (64 / 16). The pruned
    network then raises a shape error. Here, every :class:`PaddedShortcut` is replaced by a :class:`ChannelSelect`,
    which computes the same output, and is registered in ``customized_pruners``, Torch-Pruning's interface for such
    layers. Its input and output channels can be removed independently, so that all channels are prunable and pruning is
    exact. To prune only within the blocks, as is common for these networks, ignore the first layer that writes to each
    stage: ``conv1``, ``layer2.0.conv2``, ``layer3.0.conv2``.

    Args:
        model: trained network. It is pruned in place, and in eval mode afterwards.
        example_inputs: [n, c, h, w], on the model's device; MACs are counted for one of them.
        target_macs: largest allowed number of MACs of the pruned model.
        train: runs the sparse phase, given the model and a function to call with the optimizer. Not called if ``reg``
            is 0.
        reg: strength of the regularizer; the authors use 5e-4 for ResNet-56 on CIFAR-10 and 2e-4 on CIFAR-100.
        normalizer: normalization of the importance within a group; the authors use ``"max"`` on CIFAR.
        iterative_steps: number of pruning steps that would remove everything.
        max_pruning_ratio: largest share of a layer's channels that may be removed.
        ignored_layers: layers whose outputs are not pruned. Linear layers as wide as the network's output are added.
        count: function that counts the MACs of a model; default: ``torch_pruning.utils.count_ops_and_params``, which
            also counts norms, activations and pooling.

    Raises:
        EtpError: Torch-Pruning is not installed.
        BudgetError: the target is not above 0 and below the present MACs (the model is unchanged), or it is out of
            reach (the message gives the MACs that pruning reached).
    """
    tp = _torch_pruning()
    counter = count or (lambda net: int(tp.utils.count_ops_and_params(net, example_inputs[:1])[0]))
    base_macs, base_params = counter(model), _parameters(model)
    if not 0 < target_macs < base_macs:
        raise BudgetError(f"target_macs={target_macs}: the model has {base_macs} MACs; ask for fewer, and more than 0.")
    replace_padded_shortcuts(model, example_inputs)
    pruner = _pruner(
        tp, model, example_inputs, reg=reg, iterative_steps=iterative_steps, max_pruning_ratio=max_pruning_ratio,
        importance=tp.importance.GroupMagnitudeImportance(p=2, normalizer=normalizer),
        ignored_layers=[*ignored_layers, *_classifiers(model, example_inputs)],
    )  # fmt: skip
    if reg > 0:
        pruner.update_regularizer()
        train(model, lambda optimizer: optimizer.register_step_pre_hook(lambda *_: pruner.regularize(model)))
    macs = _prune_until(pruner, model, target_macs, counter)
    return BaselineReport(
        base_macs=base_macs, macs=macs, base_params=base_params, params=_parameters(model), steps=pruner.current_step
    )


def _torch_pruning() -> ModuleType:
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise EtpError("the DepGraph baseline runs Torch-Pruning's own code: pip install torch-pruning.") from error
    module: ModuleType = torch_pruning
    return module


def _pruner(tp: Any, model: nn.Module, example_inputs: Tensor, **options: Any) -> Any:
    """Return Torch-Pruning's group norm pruner over all groups of the model, with a final pruning ratio of 1."""
    model.eval()
    return tp.pruner.GroupNormPruner(
        model,
        example_inputs,
        global_pruning=True,
        pruning_ratio=1.0,
        customized_pruners={ChannelSelect: select_pruner(tp)},
        # The defaults of these arguments are dictionaries that all pruners of a process share and write to.
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        **options,
    )


def _prune_until(pruner: Any, model: nn.Module, target_macs: int, counter: Callable[[nn.Module], int]) -> int:
    model.eval()
    macs = counter(model)
    while macs > target_macs:
        if pruner.current_step == pruner.iterative_steps:
            raise BudgetError(
                f"target_macs={target_macs}: all {pruner.iterative_steps} pruning steps end at {macs} MACs; "
                "raise the target or max_pruning_ratio, or ignore fewer layers."
            )
        pruner.step()
        macs = counter(model)
    return macs


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _classifiers(model: nn.Module, example_inputs: Tensor) -> list[nn.Module]:
    """Return the linear layers as wide as the network's output."""
    with torch.no_grad():
        classes = model.eval()(example_inputs).shape[-1]
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == classes]


def replace_padded_shortcuts(model: nn.Module, example_inputs: Tensor) -> None:
    """Replace every :class:`PaddedShortcut` of the model by a :class:`ChannelSelect`, in place."""
    widths: dict[nn.Module, int] = {}
    found = {name: module for name, module in model.named_modules() if isinstance(module, PaddedShortcut)}
    hooks = [
        module.register_forward_pre_hook(lambda module, args: widths.update({module: args[0].shape[1]}))
        for module in found.values()
    ]
    try:
        with torch.no_grad():
            model.eval()(example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for name, old in found.items():
        new = ChannelSelect(
            channels_in=widths[old], channels_out=old.before + widths[old] + old.after,
            before=old.before, stride=old.stride,
        )  # fmt: skip
        model.set_submodule(name, new.to(example_inputs.device))


def select_pruner(tp: Any) -> Any:
    """Return the Torch-Pruning functions that remove input and output channels of a :class:`ChannelSelect`."""

    class SelectPruner(tp.function.BasePruningFunc):  # type: ignore[misc]
        def prune_out_channels(self, layer: ChannelSelect, idxs: Sequence[int]) -> nn.Module:
            layer.drop_outputs(idxs)
            return layer

        def prune_in_channels(self, layer: ChannelSelect, idxs: Sequence[int]) -> nn.Module:
            layer.drop_inputs(idxs)
            return layer

        def get_out_channels(self, layer: ChannelSelect) -> int:
            return layer.channels_out

        def get_in_channels(self, layer: ChannelSelect) -> int:
            return layer.channels_in

    return SelectPruner()
