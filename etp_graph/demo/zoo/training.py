"""Training loop on tensors in memory, with the same data in the same order for every method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, isfinite

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Split

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Function that maps a batch [n, c, h, w] to a batch of the same shape, with random numbers of the generator only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """State of training after an optimizer step.

    Attributes:
        number: number of the step, from 1.
        total: number of steps of the whole training.
        epoch: number of the epoch, from 1.
        loss: loss of the batch before the step, a detached scalar tensor (reading its value waits for the device).
        lr: learning rate of the step.
    """

    number: int
    total: int
    epoch: int
    loss: Tensor
    lr: float


def train_epochs(
    model: nn.Module,
    split: Split,
    *,
    epochs: int,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    seed: int = 0,
    augment: Augment | None = None,
    warmup: float = 0.1,
    attach: Callable[[torch.optim.Optimizer], object] | None = None,
    on_step: Callable[[Step], object] | None = None,
    progress: Callable[[int, int, float], object] | None = None,
) -> list[float]:
    """Train with cross-entropy and SGD with Nesterov momentum. The learning rate rises linearly, then falls linearly.

    The order of the images and their augmentation depend only on ``seed``, ``epochs`` and ``batch_size``, not on the
    model or on random numbers drawn by ``attach``. A last batch of a single image is skipped, because BatchNorm needs
    two.

    Args:
        model: trained in place, on its own device; it is in train mode afterwards.
        split: ``train_x`` and ``train_y`` are used. Images that are already on the device are not copied.
        epochs: number of passes over the training images.
        lr: peak learning rate. It is reached after the share ``warmup`` of all steps, and then falls to 1 % of ``lr``.
        momentum: momentum of SGD; 0 turns Nesterov momentum off.
        weight_decay: weight decay of SGD, on every parameter.
        batch_size: number of images in a batch.
        seed: seed of the data order and the augmentation.
        augment: augmentation of the images, such as :func:`crop_flip` or :func:`shift`.
        warmup: see ``lr``.
        attach: called with the optimizer before the first step. The optimizer is used in this call only.
        on_step: called after every optimizer step.
        progress: called after every epoch with (finished epochs, epochs, mean loss of the epoch).

    Returns:
        The mean training loss of each epoch.

    Raises:
        ValueError: there are fewer than two images, or a number is out of its range.
        FloatingPointError: the loss of an epoch is not finite.
    """
    n = len(split.train_x)
    _check(n, epochs=epochs, batch_size=batch_size, warmup=warmup)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0
    )
    if attach is not None:
        attach(optimizer)
    total = epochs * steps_per_epoch(n, batch_size)
    batches = _batches(model, split, batch_size=batch_size, seed=seed, augment=augment)
    model.train()
    losses: list[float] = []
    for epoch in range(1, epochs + 1):
        seen: list[Tensor] = []
        for number, (x, y) in enumerate(batches(), start=(epoch - 1) * total // epochs):
            rate = _triangle(number / max(total - 1, 1), lr, warmup)
            seen.append(_step(model, optimizer, x, y, lr=rate))
            if on_step is not None:
                on_step(Step(number=number + 1, total=total, epoch=epoch, loss=seen[-1], lr=rate))
        losses.append(float(torch.stack(seen).mean()))
        if not isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of epoch {epoch} is {losses[-1]}; lower lr={lr} or the regularization.")
        if progress is not None:
            progress(epoch, epochs, losses[-1])
    return losses


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Return the number of optimizer steps of :func:`train_epochs` for one pass over ``n`` images."""
    return ceil(n / batch_size) - (n % batch_size == 1)


def _check(n: int, *, epochs: int, batch_size: int, warmup: float) -> None:
    if epochs < 0 or batch_size < 2 or n < 2 or not 0 <= warmup < 1:
        raise ValueError(
            f"train_epochs: epochs={epochs}, batch_size={batch_size}, images={n}, warmup={warmup}; "
            "need epochs >= 0, batch_size >= 2, two images or more, 0 <= warmup < 1."
        )


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, *, lr: float) -> Tensor:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), y)
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.detach()


def _triangle(done: float, peak: float, warmup: float) -> float:
    """Return the learning rate at the share ``done`` of the steps: up to ``peak`` at ``warmup``, then down to 1 %."""
    if done < warmup:
        return peak * (0.1 + 0.9 * done / warmup)
    return peak * (1 - 0.99 * (done - warmup) / (1 - warmup))


def _batches(
    model: nn.Module, split: Split, *, batch_size: int, seed: int, augment: Augment | None
) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """Return a function that yields one shuffled pass over the training images, on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device

    def one_pass() -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(split.train_x), generator=generator)
        for chosen in torch.split(order, batch_size):
            if len(chosen) < 2:
                return
            x, y = _take(split.train_x, chosen), _take(split.train_y, chosen)
            if augment is not None:
                x = augment(x, generator)
            yield _to_device(x, device), y.to(device, non_blocking=True)

    return one_pass


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.index_select(0, index.to(tensor.device))


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """Move images to the device, in channels-last format if there are several channels, for faster convolutions."""
    x = x.to(device, non_blocking=True)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 and x.shape[1] > 1 else x


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, *, batch: int = 512) -> float:
    """Return the share of images [n, ...] whose largest logit is at the label [n].

    The model runs in eval mode; the mode of every module is restored afterwards.

    Raises:
        ValueError: there are no images, or their number differs from that of the labels.
    """
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(f"accuracy: {len(x)} images and {len(y)} labels; need one label for each of one or more.")
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        right = [
            (model(_to_device(images, device)).argmax(1) == labels.to(device)).sum()
            for images, labels in zip(torch.split(x, batch), torch.split(y, batch), strict=True)
        ]
    finally:
        for module, mode in modes.items():
            module.training = mode
    return int(torch.stack(right).sum()) / len(x)


def shift(x: Tensor, generator: torch.Generator, *, pad: int = 1) -> Tensor:
    """Move every image by up to ``pad`` pixels in each direction, and fill with the pixels of the border."""
    n, _, height, width = x.shape
    offsets = torch.randint(-pad, pad + 1, (2, n), generator=generator).to(x.device)
    rows = (torch.arange(height, device=x.device) + offsets[0, :, None]).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) + offsets[1, :, None]).clamp(0, width - 1)
    images = torch.arange(n, device=x.device)[:, None, None]
    # The result of indexing is [n, h, w, c]: dimensions of advanced indices separated by a slice come first.
    return x[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def crop_flip(x: Tensor, generator: torch.Generator, *, pad: int = 4) -> Tensor:
    """Pad by ``pad`` zeros, crop at random to the original size, and mirror with probability 1/2 (He et al. 2016).

    The zeros are added to normalised images, so the border has the mean colour.
    """
    n, _, height, width = x.shape
    padded = F.pad(x, (pad, pad, pad, pad))
    offsets = torch.randint(0, 2 * pad + 1, (2, n), generator=generator).to(x.device)
    mirrored = (torch.rand(n, generator=generator) < 0.5).to(x.device)
    along = torch.arange(width, device=x.device).expand(n, -1)
    along = torch.where(mirrored[:, None], along.flip(1), along)
    rows = torch.arange(height, device=x.device) + offsets[0, :, None]
    columns = along + offsets[1, :, None]
    images = torch.arange(n, device=x.device)[:, None, None]
    return padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
