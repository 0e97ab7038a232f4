"""Record the inputs of the layers that read units, over batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from etp_graph._config import require
from etp_graph.collect import naming_batch
from etp_graph.errors import ScoreError
from etp_graph.model import without_attention_fast_path, without_autocast

from ._readers import Place, Reader, RecordReaders

Call = tuple[Tensor | None, Callable[[], object]]
"""Mask of the tokens of a batch [samples, tokens], zero at padding, or ``None``; and what runs the model on it."""


@dataclass(frozen=True, slots=True)
class InputMoments:
    """Means and products of the inputs of all layers that read units; :func:`input_moments` records them.

    Attributes:
        readers: what was recorded of each layer, by the rows of its weight.
        others: parameters that another operator reads, too, and the name of that operator.
    """

    readers: Mapping[Place, Reader] = field(repr=False)
    others: Mapping[str, str] = field(repr=False)


def record_inputs(
    lossy: Mapping[str, Collection[int]], tensors: Mapping[str, Tensor], calls: Iterable[Call], *, places: int = 4096
) -> InputMoments:
    """Run calls, and record the inputs of the operators that read units.

    Args:
        lossy: the axes of each parameter along which units may go, by name.
        tensors: all tensors among which these parameters and their biases are, by name.
        calls: one for each batch.
        places: as for :func:`compensate_`.

    Raises:
        ScoreError: there are no calls, one fails, or inputs are not finite.
    """
    parameters = {name: tensors[name] for name in lossy}
    biases = {name: tensor for name, tensor in tensors.items() if name not in lossy}
    mode, number = RecordReaders(parameters, biases, axes=lossy, places=places), 0
    with without_autocast(), without_attention_fast_path():
        for number, (mask, run) in enumerate(calls, start=1):
            mode.begin_batch(mask)
            with naming_batch(number), mode:
                run()
    mode.begin_batch(None)  # which forgets the last input
    require(number > 0, "batches is empty: pass at least one batch of example inputs.", ScoreError)
    for place, reader in mode.readers.items():
        require(
            reader.moments.finite,
            f"the inputs of {place.parameter} hold NaN or infinite values: check the model and the batches.",
            ScoreError,
        )
    return InputMoments(mode.readers, mode.others)
