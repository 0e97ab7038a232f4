"""Attributes that count units: which of them surgery lowers, to what, and whether they then agree with the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from etp_graph.errors import PlanError
from etp_graph.model import all_tensors, counting_attributes, held_size
from etp_graph.plan import ACTIVATION, Plan, Positions, SlicedAxis

from ._commit import Change
from ._cuts import Cut
from ._record import Edit, read_attribute

Key = tuple[str, int | None]
"""Name of an attribute, and the index into a tuple."""


def find_edits(model: nn.Module, plan: Plan, keep: Tensor) -> list[Edit]:
    """Return the attributes that shrink, with their new values, given ``keep`` bool [n_units + 1].

    The plan was checked with the model: the attributes are there and count at least the positions in the plan.
    """
    edits = []
    for (module, name, item), layers in Positions(plan).attributes.items():
        if module == ACTIVATION:
            continue
        kept = SlicedAxis(module, 0, tuple(layers)).kept_positions(keep)
        removed = int((~kept).sum())
        if removed:
            before = read_attribute(model, Edit(module=module, name=name, item=item, value=0))
            edits.append(Edit(module=module, name=name, item=item, value=before - removed))
    return edits


def prepare_attributes(model: nn.Module, edits: Sequence[Edit]) -> list[Change]:
    """Return the changes that write the new values; a tuple attribute keeps its type."""
    found: dict[tuple[str, str], list[Edit]] = {}
    for edit in edits:
        found.setdefault((edit.module, edit.name), []).append(edit)
    changes = []
    for (path, name), mine in found.items():
        module = model.get_submodule(path)
        old = getattr(module, name)
        changes.append(_write(module, name, old, _edited(old, mine)))
    return changes


def _edited(old: Any, edits: Sequence[Edit]) -> Any:
    if edits[0].item is None:
        return edits[0].value
    items = list(old)
    for edit in edits:
        assert edit.item is not None
        items[edit.item] = edit.value
    return type(old)(items)


def _write(module: nn.Module, name: str, old: Any, new: Any) -> Change:
    """Return the change of one attribute. Undoing it calls no setter of the user's class, which may have raised."""
    if name not in vars(module):  # a size of the class
        return Change(lambda: setattr(module, name, new), lambda: vars(module).pop(name, None))
    return Change(lambda: setattr(module, name, new), lambda: vars(module).__setitem__(name, old))


def require_agreement(model: nn.Module, cuts: Mapping[str, Cut], edits: Sequence[Edit]) -> None:
    """Raise :class:`PlanError` if an attribute agrees with a weight before surgery, and would not do so afterwards.

    A weight that several modules share has to agree with one of them: the others may never run.
    """
    after = {(edit.module, edit.name, _from_start(model, edit)): edit.value for edit in edits}
    shared: dict[int, list[str]] = {}
    for name, tensor in all_tensors(model).items():
        shared.setdefault(id(tensor), []).append(name)
    for cut in cuts.values():
        found = [_disagreement(model, name, cut, after) for name in shared.get(id(cut.tensor), [])]
        if found and all(found):
            raise PlanError(
                f"surgery would leave {found[0]} of shape {list(cut.shape)}: the plan lacks or miscounts this "
                "attribute. Trace the model again."
            )


def _disagreement(
    model: nn.Module, name: str, cut: Cut, after: Mapping[tuple[str, str, int | None], int]
) -> str | None:
    """Return which attribute would not agree with a weight, and with what value; ``None`` if all would.

    Only layers of PyTorch are looked at, without tables. The forward of another class may not read the attribute, as
    that of ``FalconLinear``, and models read the weight of a table without calling it (``rel_embeddings`` of DeBERTa).
    No plan lowers the attribute then.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if not type(module).__module__.startswith("torch.nn.") or isinstance(module, nn.Embedding):
        return None
    was, becomes = _counted_sizes(module, leaf, tuple(cut.tensor.shape)), _counted_sizes(module, leaf, cut.shape)
    for key, size in was.items():
        now = _value(module, key)
        then = after.get((path, *key), now)
        if now == size and then != becomes[key]:
            return f"{path}.{key[0]} at {then} beside {name}"
    return None


def _from_start(model: nn.Module, edit: Edit) -> int | None:
    """Return the item of an edit, counted from the start of the tuple."""
    return None if edit.item is None else edit.item % len(getattr(model.get_submodule(edit.module), edit.name))


def _value(module: nn.Module, key: Key) -> Any:
    value = held_size(module, key[0])
    if key[1] is None:
        return value
    return value[key[1]] if isinstance(value, (tuple, list)) and len(value) > key[1] else None


def _counted_sizes(module: nn.Module, leaf: str, shape: tuple[int, ...]) -> dict[Key, int]:
    """Return the value that each attribute of a layer has beside a tensor of this shape, as far as it is known."""
    row, last = counting_attributes(module), len(shape) - 1
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {("normalized_shape", axis): size for axis, size in enumerate(shape)}
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        hidden = "proj_size" if getattr(module, "proj_size", 0) else "hidden_size"
        inputs = {"weight_ih_l0": "input_size", "weight_ih": "input_size", "weight_hh_l0": hidden, "weight_hh": hidden}
        return {(inputs[leaf], None): shape[last]} if leaf in inputs else {}
    if row.into and row.out is None:  # norms and others with one number for each channel
        return {(row.into, None): shape[0]} if last == 0 else {}
    if leaf != "weight" or last < 1 or row.out is None:
        return {}
    if row.into is None:
        return {(row.out, None): shape[1]}  # an embedding
    first, second = (row.into, row.out) if getattr(module, "transposed", False) else (row.out, row.into)
    grouped = getattr(module, "groups", 1) != 1
    return {(first, None): shape[0]} if grouped else {(first, None): shape[0], (second, None): shape[1]}
