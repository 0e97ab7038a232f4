"""Choose the blocks that matter least one after the other, score the others anew each time, and remove them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from etp_graph._config import require, require_choice, require_count
from etp_graph.errors import PlanError
from etp_graph.surgery import Optimizers

from ._find import Block, find_blocks
from ._remove import remove_blocks_
from ._score import Loss, block_influence, loss_increase

Criterion = Literal["influence", "loss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortened:
    """Result of :func:`shorten_`.

    Attributes:
        removed: names of the removed blocks, as they were called before, in the order of choice.
        scores: score of each of them when it was chosen.
        error: largest relative difference of an output to the model that skips the blocks.
    """

    removed: tuple[str, ...]
    scores: tuple[float, ...]
    error: float


def shorten_(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    n_blocks: int,
    criterion: Criterion = "influence",
    loss: Loss | None = None,
    optimizer: Optimizers = None,
) -> Shortened:
    """Remove the ``n_blocks`` residual blocks that matter least, in place.

    Blocks are chosen one after the other. After each choice the others are scored again, with the chosen ones skipped,
    because two blocks may do the same work. All chosen blocks are then removed at once by :func:`remove_blocks_`.

    Args:
        model: the model.
        batches: inputs that score the blocks, each as for :func:`etp_graph.trace`; the first is the example input.
        n_blocks: number of blocks to remove. At least one entry of each container stays.
        criterion: ``influence`` is :func:`block_influence` (one run of the batches for each choice), ``loss`` is
            :func:`loss_increase` (one run for each choice and block).
        loss: for ``loss``, a function of the model and a batch; default: the ``loss`` of the output.
        optimizer: as for :func:`remove_blocks_`.

    Raises:
        PlanError: there are no batches, the number is out of range, or fewer blocks can be removed.
        ScoreError: a score is not finite.
        EquivalenceError: as for :func:`remove_blocks_`.
    """
    chosen, scores = choose_blocks(model, batches, n_blocks=n_blocks, criterion=criterion, loss=loss)
    error = remove_blocks_(model, chosen, batches[0], optimizer=optimizer)
    return Shortened(removed=tuple(block.name for block in chosen), scores=tuple(scores), error=error)


def choose_blocks(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    n_blocks: int,
    criterion: Criterion = "influence",
    loss: Loss | None = None,
) -> tuple[list[Block], list[float]]:
    """Choose the residual blocks that :func:`shorten_` removes, and change nothing.

    The first ones are those that are chosen for a smaller number.

    Returns:
        The blocks in the order of choice, and the score of each of them when it was chosen.

    Raises:
        PlanError, ScoreError: as :func:`shorten_`.
    """
    require(bool(batches), "no batches: give inputs that score the blocks.", PlanError)
    require_count("n_blocks", n_blocks, 1, PlanError)
    require_choice("criterion", criterion, ("influence", "loss"), PlanError)
    blocks = list(find_blocks(model, batches[0]))
    chosen: list[Block] = []
    scores: list[float] = []
    while len(chosen) < n_blocks:
        free = [block for block in blocks if block not in chosen and not _is_last(model, block, chosen)]
        require(
            bool(free),
            f"n_blocks={n_blocks}: {type(model).__name__} has {len(blocks)} residual blocks, of which {len(chosen)} "
            "can be removed, because one entry of each container stays.",
            PlanError,
        )
        gone = [block.name for block in chosen]
        found = (
            block_influence(model, free, batches, without=gone)
            if criterion == "influence"
            else loss_increase(model, free, batches, loss=loss, without=gone)
        )
        least = int(found.argmin())
        chosen.append(free[least])
        scores.append(float(found[least]))
    return chosen, scores


def _is_last(model: nn.Module, block: Block, chosen: Sequence[Block]) -> bool:
    """Return whether the other entries of the container are chosen already."""
    taken = sum(other.container == block.container for other in chosen)
    return taken + 1 >= len(model.get_submodule(block.container)._modules)
