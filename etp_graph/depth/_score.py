"""Score residual blocks: how much a block turns the stream, and how much the loss rises without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph.errors import ScoreError
from etp_graph.model import eval_mode, run_model

from ._find import Block, first_tensor
from ._skip import skipped

Loss = Callable[[nn.Module, Any], Tensor]
"""Function of the model and a batch that returns the loss."""

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def block_influence(
    model: nn.Module, blocks: Sequence[Block], batches: Iterable[Any], *, without: Iterable[str] = ()
) -> Tensor:
    """Return the block influence of each block: 1 - cosine of the stream before and after it.

    The mean is over all positions of the stream (tokens, pixels) of all batches. Source: Men et al. 2024, ShortGPT,
    equation 1.

    Args:
        model: the model. It runs in eval mode and without gradients.
        blocks: its blocks.
        batches: inputs, each as for :func:`etp_graph.trace`.
        without: names of blocks that are skipped meanwhile.

    Returns:
        float64 [number of blocks], in [0, 2]; a block with a low influence may be removed.

    Raises:
        ScoreError: there is no batch, or the influence is not finite.
    """
    sums, counts = [0.0] * len(blocks), [0] * len(blocks)

    def hook(number: int) -> Callable[..., None]:
        def measure(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = first_tensor((args, kwargs)), first_tensor(output)
            assert before is not None
            assert after is not None
            axis = _channels(module, before)
            cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=axis)
            sums[number] += float((1 - cosine).double().sum())
            counts[number] += cosine.numel()

        return measure

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(model))
        for number, block in enumerate(blocks):  # before the hooks that skip blocks, which replace the output
            module = model.get_submodule(block.name)
            stack.callback(module.register_forward_hook(hook(number), with_kwargs=True).remove)
        stack.enter_context(skipped(model, without))
        for batch in batches:
            run_model(model, batch)
    return _checked(blocks, [total / count if count else float("nan") for total, count in zip(sums, counts)])


def loss_increase(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Any],
    *,
    loss: Loss | None = None,
    without: Iterable[str] = (),
) -> Tensor:
    """Return by how much the mean loss of the batches rises when each block alone is skipped.

    Args:
        model: the model. It runs in eval mode and without gradients, once for each block and batch.
        blocks: its blocks.
        batches: inputs, each as for :func:`etp_graph.trace`.
        loss: function of the model and a batch. Default: the ``loss`` of the model's output, which models of
            transformers return for batches with labels.
        without: names of blocks that are skipped in all runs.

    Returns:
        float64 [number of blocks]; negative if the loss falls.

    Raises:
        ScoreError: there is no batch, or a loss is not finite.
    """
    measured = loss or _own_loss
    gone = list(without)

    def mean(names: list[str]) -> float:
        with skipped(model, names):
            values = [float(measured(model, batch)) for batch in batches]
        return sum(values) / len(values) if values else float("nan")

    with torch.no_grad(), eval_mode(model):
        base = mean(gone)
        return _checked(blocks, [mean([*gone, block.name]) - base for block in blocks])


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    found = getattr(run_model(model, batch), "loss", None)
    if not isinstance(found, Tensor):
        raise ScoreError(f"{type(model).__name__} returned no loss: put labels into the batches, or give loss=.")
    return found


def _channels(module: nn.Module, stream: Tensor) -> int:
    """Return the axis of the channels: the second one of images in convolutional blocks, else the last one."""
    convolutional = any(isinstance(part, _CONVOLUTIONS) for part in module.modules())
    return 1 if convolutional and stream.ndim >= 4 else -1


def _checked(blocks: Sequence[Block], scores: list[float]) -> Tensor:
    found = torch.tensor(scores, dtype=torch.float64)
    for block, score in zip(blocks, found):
        if not bool(score.isfinite()):
            raise ScoreError(
                f"the score of block {block.name!r} is {float(score)}: give at least one batch, and check the model "
                "and the batches for NaN and infinite values."
            )
    return found
