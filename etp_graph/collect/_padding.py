"""Leave padding out of statistics: positions that an ``attention_mask`` excludes are no data."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_KEEPS = "attention_mask"
"""Argument whose positive entries mark data."""

_EXCLUDES = ("tgt_key_padding_mask", "src_key_padding_mask", "key_padding_mask")
"""Arguments of PyTorch's transformer layers that mark padding by True, or by minus infinity."""


class PaddingMasks:
    """Masks [samples, tokens] that the modules of a model get while it runs.

    The tokens at a watch point are those of the innermost module around it that gets a mask. So the encoder and the
    decoder of one model may have different masks.
    """

    def __init__(self) -> None:
        self._masks: dict[str, Tensor | None] = {}

    def register(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Register hooks on the modules that get a mask, and yield their handles."""
        for name, module in model.named_modules():
            argument = _mask_argument(module)
            if argument is not None:
                hook = self._noter(name, argument)
                yield module.register_forward_pre_hook(hook, with_kwargs=True)

    def clear(self) -> None:
        """Forget the masks of the last forward."""
        self._masks.clear()

    def _noter(self, name: str, argument: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                given = signature(module.forward).bind_partial(*args, **kwargs).arguments.get(argument)
            except TypeError:  # the forward itself will say what is wrong with its arguments
                return
            if given is None or (isinstance(given, Tensor) and given.ndim == 2):
                self._masks[name] = None if given is None else _data_of(given, argument)
            else:
                self._masks.pop(name, None)  # a mask of pairs of tokens; the module around this one knows the tokens

        return note

    def mask_at(self, module: str) -> Tensor | None:
        """Return the mask at a module, bool [samples, tokens]; ``None`` if all positions are data."""
        parts = module.split(".")
        for n in range(len(parts), -1, -1):
            name = ".".join(parts[:n])
            if name in self._masks:
                return self._masks[name]
        return None

    def without_padding(self, module: str, values: Tensor, labels: Tensor | None) -> Iterator[tuple[Tensor, Any]]:
        """Yield activations at a module without padding, and the labels of their samples.

        Samples are divided by their number of tokens. Activations that are not one for each token are left as they are.

        Args:
            module: name of the module.
            values: the activations, [samples, positions, tokens], or [samples * tokens, positions, 1].
            labels: int64 [samples], or ``None``.
        """
        mask = self.mask_at(module)
        if mask is None or bool(mask.all()):
            yield values, labels
            return
        mask = mask.to(values.device)
        if values.ndim == 3 and (values.shape[0], values.shape[2]) == tuple(mask.shape):
            counts = mask.sum(1)
            for count in counts.unique().tolist():
                rows = (counts == count).nonzero().flatten()
                tokens = mask[rows].nonzero()[:, 1].view(len(rows), 1, count)
                if count:
                    chosen = values[rows].gather(2, tokens.expand(-1, values.shape[1], -1))
                    yield chosen, None if labels is None else labels[rows.to(labels.device)]
        elif values.ndim == 3 and values.shape[0] == mask.numel() and values.shape[2] == 1:
            yield values[mask.flatten()], labels
        else:
            yield values, labels


def _data_of(mask: Tensor, argument: str) -> Tensor:
    """Return a mask of the data, bool [samples, tokens]."""
    if argument == _KEEPS:
        return mask > 0
    return ~mask if mask.dtype == torch.bool else mask == 0


def _mask_argument(module: nn.Module) -> str | None:
    """Return the name of the argument of a module's forward that is a mask of tokens, or ``None``.

    Layers whose tokens come before the samples are left out: their masks have another order.
    """
    if any(isinstance(part, nn.MultiheadAttention) and not part.batch_first for part in module.modules()):
        return None
    try:
        known = signature(module.forward).parameters
    except (TypeError, ValueError):  # a forward without a signature
        return None
    return next((name for name in (_KEEPS, *_EXCLUDES) if name in known), None)
