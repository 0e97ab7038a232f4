"""Remove whole residual blocks of a network, such as transformer layers."""

from __future__ import annotations

from ._find import Block, find_blocks
from ._remove import remove_blocks_
from ._score import block_influence, loss_increase
from ._shorten import Shortened, choose_blocks, shorten_

__all__ = [
    "Block",
    "Shortened",
    "block_influence",
    "choose_blocks",
    "find_blocks",
    "loss_increase",
    "remove_blocks_",
    "shorten_",
]
