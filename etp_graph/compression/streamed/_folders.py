"""Prune a folder of transformers to folders, without training and without loading the model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from etp_graph._config import plain_number, require, require_number
from etp_graph.budget import Budget
from etp_graph.collect import OwnLabels, needs_backward
from etp_graph.compression._compress import budget_of
from etp_graph.compression._oneshot import Loss, require_loss, scoring_method
from etp_graph.criteria import Score, find_criterion
from etp_graph.errors import BudgetError

from ._blocks import BlockwiseModel
from ._inputs import read_batches
from ._run import Run, StreamedResult
from ._source import SourceFolder


def oneshot(
    folder: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    budget: Budget | float | Sequence[Budget | float],
    out: str | os.PathLike[str],
    criterion: str | Score | None = None,
    compensate: bool = True,
    ridge: float = 1e-3,
    loss: Loss | None = None,
    prune: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: bool = True,
) -> StreamedResult:
    """Prune a language model in a folder of transformers without training it and without loading it.

    The model is read block by block: the weights and the activations of one block are in memory at once. It does the
    same as :func:`oneshot_` with ``Budget(uniform=True)`` and ``blend=1``. The folder is read twice, three times for a
    criterion that reads gradients: the scores of all blocks are needed before the first one is cut. What each block is
    given and returns lies on the disk, in a hidden folder beside ``out``: for all batches after one block, or for
    criteria that read gradients after all blocks.

    A killed run continues if it is called again in the same way, and gives the same bits. The state in the hidden
    folder is checked by its SHA-256. To begin anew, remove that folder.

    Each block that is written is run once more, by the class of the model and on the first batch, and compared with the
    block in which the removed units are zero.

    Args:
        folder: configuration and weights in safetensors files, as ``save_pretrained`` writes them. A decoder whose
            blocks are one list, and hand on nothing but hidden states.
        batches: token numbers [samples, tokens], or dicts of what the model takes. Tokens whose ``attention_mask`` is
            zero do not count. They are kept in memory.
        budget: the target. A number is the share of the parameters that stay. A sequence, from large to small, gives
            one model for each. Units of each are units of the one before, and scores are computed once.
        out: the folder to write, or for a sequence of budgets the folder of these folders, which are named after their
            targets (``params=0.8``).
        criterion: as for :func:`oneshot_`. A criterion that reads weights is called once for each block.
        compensate: change the weights that read removed units by least squares.
        ridge: as for :func:`etp_graph.recovery.compensate_`. With fewer tokens than inputs of a layer the Gram matrix
            is singular. Ridge makes the solution unique; with ``ridge=0`` it is the smallest change.
        loss: as for :func:`oneshot_`.
        prune, ignore: as for :func:`etp_graph.trace`. Units that several blocks hold stay.
        dtype: element type in which blocks compute. The weights are stored as they were.
        device: where blocks compute.
        overwrite: replace a model in ``out``.
        progress: show a progress bar if stdout is a terminal.

    Raises:
        CheckpointError: the folder holds no such model, or the disk is full.
        PlanError: nothing can be removed, or the blocks cannot run one at a time.
        ScoreError: there are no batches, tokens are not in the vocabulary, or activations are not finite.
        BudgetError: a budget is out of reach, measured, or larger than the one before.
        ExportError: ``out`` is in use, or the class of the model cannot be that small.
    """
    require_number("ridge", ridge, 0)
    goals, targets = _read_budgets(budget, Path(out).absolute())
    source = SourceFolder(Path(folder).absolute())
    blockwise = BlockwiseModel(source, source.config, dtype=dtype, device=torch.device(device))
    if loss is None and (criterion is None or needs_backward(find_criterion(criterion).observes)):
        loss = OwnLabels()
    method = scoring_method(criterion, loss)
    require_loss(method, loss)
    vocabulary = source.config.get_text_config().vocab_size
    found = read_batches(batches, blockwise.model, vocabulary, blockwise.device)
    run = Run(
        blockwise, found, method, loss, budgets=[budget_of(goal, method, {}) for goal in goals], targets=targets,
        ridge=ridge if compensate else None, prune=prune, ignore=ignore,
    )  # fmt: skip
    return run.to_folders(Path(out).absolute(), overwrite=overwrite, progress=progress)


def _read_budgets(budget: Any, out: Path) -> tuple[list[Budget], list[Path]]:
    """Return the budgets, with equal widths, and the folder of each.

    Raises:
        BudgetError: there is none, two are equal, or one is measured.
    """
    several = isinstance(budget, Sequence)
    found = [_read_budget(one) for one in (budget if several else [budget])]
    names = [one.as_given for one in found]
    require(bool(found) and len(set(names)) == len(names), f"budget={budget!r}: give different budgets.", BudgetError)
    return found, [out / name for name in names] if several else [out]


def _read_budget(given: Any) -> Budget:
    budget: Budget = given if isinstance(given, Budget) else Budget(params=plain_number(given))
    require(
        not budget.measured,
        f"{budget.as_given} is measured, which needs the whole model: give a target in parameters or MACs.",
        BudgetError,
    )
    return replace(budget, uniform=True)
