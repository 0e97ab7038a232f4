"""Remove residual blocks in place, and check the result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph.errors import EquivalenceError, PlanError
from etp_graph.model import (
    Outputs,
    eval_mode,
    is_sharded,
    named_tensors,
    private_random,
    require_bare,
    restored_state,
    run_outputs,
)
from etp_graph.surgery import Optimizers, prepare_block_removal
from etp_graph.verification import TOLERANCE, as_real, relative_error

from ._find import Block
from ._skip import skipped


def remove_blocks_(
    model: nn.Module,
    blocks: Iterable[Block | str],
    example_inputs: Any,
    *,
    optimizer: Optimizers = None,
    outputs: Outputs = None,
) -> float:
    """Remove residual blocks from a model, in place.

    The later blocks move up and get new names: after ``layers.3`` is gone, ``layers.4`` is ``layers.3``. Numbers of
    layers follow: ``layer_idx`` of modules, and ``num_hidden_layers`` and lists with an entry for each layer in the
    configuration, which is replaced by a changed copy. Trace the model again afterwards: plans know the old names.

    The outputs must be those of the model in which the blocks return their input; otherwise nothing changes. Removal is
    all or nothing, as for :func:`etp_graph.prune_`.

    Args:
        model: the model, before or after other surgery.
        blocks: the blocks, or their names. At least one entry of each container stays.
        example_inputs: as for :func:`etp_graph.trace`; the model runs on them twice, in eval mode.
        optimizer: the optimizer that trains the model, or several. It forgets the parameters of the blocks.
        outputs: what is compared, as for :func:`etp_graph.trace`.

    Returns:
        The largest relative difference of an output.

    Raises:
        PlanError: a name is no entry of an ``nn.ModuleList`` or ``nn.Sequential``, all entries would go, a block shares
            tensors with what stays, or parameters are sharded (FSDP2).
        EquivalenceError: the outputs are others, or the model does not run without the blocks.
    """
    require_bare(model)
    if shared := [name for name, tensor in named_tensors(model) if is_sharded(tensor)]:
        raise PlanError(f"{shared[0]} is shared among processes (FSDP2): remove blocks before the model is sharded.")
    names = [block if isinstance(block, str) else block.name for block in blocks]
    surgery = prepare_block_removal(model, names, optimizer=optimizer)
    with skipped(model, names):
        want = _outputs(model, example_inputs, outputs)
    try:
        surgery.commit()
        error = _error(model, example_inputs, outputs, want, names)
    except BaseException:
        surgery.undo()
        raise
    return error


def _error(model: nn.Module, inputs: Any, outputs: Outputs, want: dict[str, Tensor], names: list[str]) -> float:
    """Return the largest relative difference of an output, or raise :class:`EquivalenceError`."""
    text = ", ".join(names)
    try:
        got = _outputs(model, inputs, outputs)
    except MemoryError:
        raise
    except Exception as error:
        raise EquivalenceError(
            f"{type(model).__name__} does not run without {text} ({type(error).__name__}: {error}): keep these blocks."
        ) from error
    same = got.keys() == want.keys()
    worst = relative_error(list(got.values()), list(want.values())) if same else float("inf")
    if not worst <= TOLERANCE.get(next(model.parameters()).dtype, TOLERANCE[torch.float32]):
        raise EquivalenceError(
            f"without {text} the outputs differ by {worst:.1e} from those of the model that skips these blocks: "
            "other blocks depend on them. Keep them.",
            error=worst,
        )
    return worst


def _outputs(model: nn.Module, inputs: Any, outputs: Outputs) -> dict[str, Tensor]:
    with torch.no_grad(), restored_state(model), eval_mode(model), private_random(model, 0):
        return {name: as_real(value) for name, value in run_outputs(model, inputs, outputs).tensors.items()}
