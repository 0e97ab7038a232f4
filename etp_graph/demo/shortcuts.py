"""The parameter-free shortcut of CIFAR residual networks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import register_padding


@register_padding
class PaddedShortcut(nn.Module):
    """Shortcut without parameters: subsample space, add zero channels (He et al. 2016, option A).

    Keeps every ``stride``-th row and column and puts ``before`` zero channels in front of the input's channels and
    ``after`` behind them: [n, c, h, w] to [n, before + c + after, ceil(h / stride), ceil(w / stride)].
    """

    def __init__(self, *, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and pad; shapes as in the class."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        """The three integers."""
        return f"stride={self.stride}, before={self.before}, after={self.after}"
