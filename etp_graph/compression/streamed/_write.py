"""Compensate and cut one block after the other, and write the folders of the pruned models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from etp_graph._config import require
from etp_graph.errors import ExportError
from etp_graph.plan import Plan, Positions, Selection, with_no_unit
from etp_graph.recovery import Compensation, InputMoments, LayerFit, fit_readers, lossy_axes, record_inputs

from ._inputs import mask_of
from ._memory import return_memory
from ._observe import HiddenStates
from ._source import INDEX_FILE
from ._state import Step

_ERROR = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest relative difference of the pruned and the masked block; in half precision 0.1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One of the pruned models.

    Attributes:
        top: name of its folder in the state of the run.
        selection: the units that stay.
        config: the configuration of the pruned model.
    """

    top: str
    selection: Selection
    config: Any


class Writer:
    """Writes the blocks of all sizes.

    Args:
        hidden: the hidden states of the dense model.
        plan: the plan.
        sizes: the models to write.
        read: returns a tensor by its name, in the element type of the model.
        keys: the name in the files of each tensor.
        ridge: as for :func:`etp_graph.recovery.compensate_`; ``None`` to change no weights.
        hand_on: whether the hidden states after a block still have to be computed.
    """

    def __init__(
        self, hidden: HiddenStates, plan: Plan, sizes: Sequence[Size], *, read: Callable[[str], Tensor],
        keys: Mapping[str, str], ridge: float | None, hand_on: bool,
    ) -> None:  # fmt: skip
        self._hidden, self._plan, self._sizes, self._read = hidden, plan, sizes, read
        self._keys, self._ridge, self._hand_on = keys, ridge, hand_on
        self._blockwise, self._state, self._source = hidden.blockwise, hidden.state, hidden.blockwise.source
        self._keeps = [with_no_unit(size.selection.flat(plan).cpu(), True) for size in sizes]
        self._pruned = [self._blockwise.like(size.config) for size in sizes]

    def run(self, step: Step) -> None:
        """Write everything, block by block."""
        for block in range(len(self._blockwise.blocks)):
            step(_step_name(block), partial(self._write_block, block))
        step("rest", self._write_rest)

    def fits(self, number: int) -> Compensation | None:
        """Return what was compensated in one of the models, by what the steps have stored."""
        if self._ridge is None:
            return None
        blocks = range(len(self._blockwise.blocks))
        return fits_from_json([self._state.result(_step_name(block))[number] for block in blocks])

    @torch.no_grad()
    def _write_block(self, block: int) -> tuple[list[Any], list[str]]:
        """Write a block of each size; return what was compensated of each, and the files that go."""
        recorded = self._record(block)
        done = []
        for number, size in enumerate(self._sizes):
            last = number == len(self._sizes) - 1
            values, fits = self._fit(recorded, block, number, release=last)
            new, cuts = {**self._load(block), **values}, self._cuts(number, block)
            cut = {name: _cut(tensor, cuts.get(name, {})) for name, tensor in new.items()}
            for name, kept in cuts.items():
                _silence_(new[name], kept)
            self._check(number, block, new, cut)
            new.clear()
            self._write_shard(size, block, cut)
            done.append(fit_to_json(fits))
        return done, self._hidden.files("hidden", block) if block > 0 and self._hand_on else []

    def _load(self, block: int) -> dict[str, Tensor]:
        return {name: self._read(name) for name in self._blockwise.names_in(block)}

    def _record(self, block: int) -> InputMoments:
        """Run the dense block, and record the inputs of the layers that lose some in the smallest size."""
        batches = self._hidden.batches if self._ridge is not None else self._hidden.batches[:1]
        calls = [(mask_of(batch), partial(self._run, block, number)) for number, batch in enumerate(batches)]
        lossy = self._lossy(block, len(self._sizes) - 1) if self._ridge is not None else {}
        dense = self._load(block)
        with self._blockwise.loaded(dense):
            return record_inputs(lossy, dense, calls)

    def _lossy(self, block: int, number: int) -> dict[str, dict[int, Tensor]]:
        return lossy_axes(self._plan, self._keeps[number], self._blockwise.tensors_in(block))

    def _fit(
        self, recorded: InputMoments, block: int, number: int, *, release: bool
    ) -> tuple[dict[str, Tensor], Compensation]:
        """Return the new weights of a block. It is not in memory meanwhile: each weight is read when it is solved."""
        if self._ridge is None:
            return {}, Compensation((), {})
        return_memory()  # that of the block, before the matrices of least squares
        lossy, names = self._lossy(block, number), self._blockwise.names_in(block)
        return fit_readers(recorded, lossy, _Read(names, self._read), ridge=self._ridge, release=release)

    def _run(self, block: int, number: int) -> None:
        hidden = self._hidden.read("hidden", block, number)
        found = self._blockwise.run_block(block, self._hidden.batches[number], hidden)
        self._hidden.require_finite(found, block, number)
        if self._hand_on:
            self._hidden.write("hidden", block + 1, number, found)

    def _cuts(self, number: int, block: int) -> dict[str, dict[int, Tensor]]:
        """Return the kept positions, bool [size], of each axis of each tensor that loses some."""
        found: dict[str, dict[int, Tensor]] = {}
        names, device = self._blockwise.names_in(block), self._blockwise.device
        for name, parts in Positions(self._plan).axes.items():
            if name in names:
                kept = {part.axis: part.kept_positions(self._keeps[number]).to(device) for part in parts}
                found[name] = {axis: mask for axis, mask in kept.items() if not bool(mask.all())}
        return found

    def _check(self, number: int, block: int, masked: Mapping[str, Tensor], cut: Mapping[str, Tensor]) -> None:
        """Compare the block that the class builds with one in which the removed units are zero, on the first batch.

        Raises:
            ExportError: they differ.
        """
        pruned, batch, name = self._pruned[number], self._hidden.batches[0], self._blockwise.blocks[block]
        hidden = self._hidden.read("hidden", block, 0)
        with self._blockwise.loaded(masked):
            wanted = self._blockwise.run_block(block, batch, hidden)
        with pruned.loaded(cut):
            found = pruned.run_block(block, batch, hidden)
        mask = mask_of(batch)
        wanted, found = ((out - hidden).double() for out in (wanted, found))
        off = (found - wanted).abs() if mask is None else (found - wanted).abs() * (mask > 0).to(found).unsqueeze(-1)
        error = float(off.max()) / max(float(wanted.abs().max()), 1e-12)
        require(
            error <= _ERROR.get(hidden.dtype, 0.1),
            f"{name}: the class {type(pruned.model).__name__} computes something else with the pruned weights (off by "
            f"{error:.1e}): prune fewer kinds of units (prune=), or use etp_graph.oneshot_.",
            ExportError,
        )

    def _write_shard(self, size: Size, block: int, cut: Mapping[str, Tensor]) -> None:
        stored = self._source.stored
        tensors = {self._keys[name]: tensor.to(stored[self._keys[name]].dtype) for name, tensor in cut.items()}
        self._state.write(f"{size.top}/{self._shard(block)}", tensors, plain=True)

    def _shard(self, number: int) -> str:
        total = len(self._blockwise.blocks) + len(self._outside())
        return f"model-{number + 1:05d}-of-{total:05d}.safetensors"

    def _outside(self) -> list[str]:
        """Return the names in the files of the tensors that belong to no block."""
        return sorted({self._keys[name] for name in self._blockwise.names_outside()})

    def _write_rest(self) -> tuple[None, list[str]]:
        """Write the tensors that stay as they are, the configuration, and the files of the tokenizer."""
        blocks = self._blockwise.blocks
        for size in self._sizes:
            places = {
                self._keys[name]: self._shard(n) for n in range(len(blocks)) for name in self._blockwise.names_in(n)
            }
            for number, key in enumerate(self._outside(), start=len(blocks)):
                self._state.write(f"{size.top}/{self._shard(number)}", {key: self._source.read(key)}, plain=True)
                places[key] = self._shard(number)
            total = sum(self._state.size(f"{size.top}/{name}") for name in set(places.values()))
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            self._state.write_bytes(f"{size.top}/{INDEX_FILE}", json.dumps(index, indent=2).encode())
            self._state.write_bytes(f"{size.top}/config.json", self._config_text(size.config))
            for file in self._source.other_files():
                self._state.write_bytes(f"{size.top}/{file.name}", file.read_bytes())
        return None, []

    def _config_text(self, config: Any) -> bytes:
        config.dtype = self._source.dtype
        config.architectures = [self._source.model_class.__name__]
        text: str = config.to_json_string()
        return text.encode()


def _step_name(block: int) -> str:
    return f"write-{block:03d}"


def _cut(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    for axis, mask in kept.items():
        tensor = tensor.index_select(axis, mask.nonzero().flatten())
    return tensor


def _silence_(tensor: Tensor, kept: Mapping[int, Tensor]) -> None:
    """Set the removed positions to zero."""
    for axis, mask in kept.items():
        tensor.index_fill_(axis, (~mask).nonzero().flatten(), 0)


class _Read(Mapping[str, Tensor]):
    """Tensors that are read whenever they are looked up."""

    def __init__(self, names: Sequence[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def fit_to_json(done: Compensation) -> Any:
    """Return what :func:`fits_from_json` reads."""
    return [[[fit.layer, fit.before, fit.after] for fit in done.layers], dict(done.skipped)]


def fits_from_json(blocks: Sequence[Any]) -> Compensation:
    """Return the fits of all blocks as one."""
    layers = [LayerFit(*fit) for fits, _ in blocks for fit in fits]
    return Compensation(tuple(layers), {name: why for _, skipped in blocks for name, why in skipped.items()})
