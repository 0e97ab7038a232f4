"""Choose the tensors of a model's output that have to stay as they are; what is left out may change its width.

By default caches, the states that recurrent layers hand on, and by-products of the models of transformers are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from etp_graph.errors import PlanError

from ._run import run_model

Outputs = str | Sequence[str] | Callable[[Any], Any] | None
"""The outputs of a model: names or patterns, a function of what it returns, or ``None`` for the default."""

WHOLE = "output"
"""Name of the output of a model that returns one tensor."""


class UnknownFunction:
    """The function that a plan was traced with, after the plan was read from a file, which cannot hold functions.

    Args:
        name: name of the function.
    """

    def __init__(self, name: str) -> None:
        self.__qualname__ = name

    def __call__(self, out: Any) -> Any:
        raise PlanError(
            f"the plan was traced with outputs={self.__qualname__}, a function, which a file cannot hold: pass "
            "outputs= again."
        )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ChosenOutputs:
    """The tensors that count as outputs, by name, and the names of what was left out.

    Attributes:
        tensors: the outputs.
        left_out: names of the largest entries that hold no output.
        cached: keys and values [batch, heads, tokens, size] in caches, whether they are outputs or not.
    """

    tensors: dict[str, Tensor]
    left_out: tuple[str, ...] = ()
    cached: tuple[Tensor, ...] = ()


def run_outputs(
    model: nn.Module, example_inputs: Any, outputs: Outputs = None, *, every_mode: bool = True
) -> ChosenOutputs:
    """Run a model and return the tensors that count as its outputs.

    Args:
        model, example_inputs: as of :func:`run_model`.
        outputs: names, patterns or a function, as of :func:`etp_graph.trace`.
        every_mode: names that match nothing are an error. Otherwise all tensors count then: in training mode a model
            may return something else.

    Raises:
        PlanError: a name matches nothing, or the function raises or returns no tensor.
    """
    if outputs is not None:
        out = run_model(model, example_inputs)
        return dataclasses.replace(choose_outputs(out, outputs, strict=every_mode), cached=_cached(out))
    with _states_of_recurrence(model) as states:
        out = run_model(model, example_inputs)
    found = dict(_named_tensors(out))
    left = _leave_out(out, states, _asked_for(model, example_inputs))
    tensors = {name: tensor for name, tensor in found.items() if not any(_is_inside(name, at) for at in left)}
    chosen = _chosen(found, tensors) if tensors else ChosenOutputs(found)
    return dataclasses.replace(chosen, cached=_cached(out))


def choose_outputs(out: Any, outputs: str | Sequence[str] | Callable[[Any], Any], *, strict: bool) -> ChosenOutputs:
    """Return the tensors of what a model returned that names, patterns or a function choose; raises as above."""
    if callable(outputs):
        return ChosenOutputs(_tensors_of_function(out, outputs))
    found = dict(_named_tensors(out))
    chosen: dict[str, Tensor] = {}
    for pattern in [outputs] if isinstance(outputs, str) else outputs:
        hits = {name: t for name, t in found.items() if _matches(name, pattern)}
        if not hits and strict:
            raise PlanError(
                f"outputs={pattern!r} matches no tensor that the model returns; names are {', '.join(found) or 'none'}."
            )
        chosen |= hits
    return _chosen(found, chosen) if chosen else ChosenOutputs(found)


def check_outputs(outputs: object) -> Outputs:
    """Return the choice with a tuple of names, or raise :class:`PlanError` if it is no choice of outputs."""
    if outputs is None or callable(outputs):
        return outputs
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs) if isinstance(outputs, Sequence) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise PlanError(
            f"outputs={outputs!r}: give names of what the model returns ('logits', '0', or '*' for every tensor), or a "
            "function of it that returns tensors."
        )
    return names


def output_entry(name: str) -> str:
    """Return the entry of the model's output that holds a tensor: the first part of its name."""
    return name.partition(".")[0]


def _tensors_of_function(out: Any, function: Callable[[Any], Any]) -> dict[str, Tensor]:
    label = getattr(function, "__qualname__", repr(function))
    try:
        found = dict(_named_tensors(function(out)))
    except PlanError:
        raise
    except Exception as error:  # whatever the user's function raises, the remedy is the same
        names = ", ".join(name for name, _ in _named_tensors(out))
        raise PlanError(
            f"outputs={label} raises {error!r} on what the model returns, a {type(out).__name__} with {names}: correct "
            "the function, or give names."
        ) from error
    if not found:
        raise PlanError(f"outputs={label} returns no tensor: return those that have to stay as they are.")
    return found


def _matches(name: str, pattern: str) -> bool:
    return _is_inside(name, pattern) or fnmatchcase(name, pattern)


def _is_inside(name: str, entry: str) -> bool:
    return name == entry or name.startswith(entry + ".")


def _chosen(found: Mapping[str, Tensor], chosen: Mapping[str, Tensor]) -> ChosenOutputs:
    """Return the chosen tensors in the order of the output, and the largest entries in which no tensor is chosen."""
    used = {prefix for name in chosen for prefix in _prefixes(name)}
    left = (prefix for name in found for prefix in _prefixes(name) if prefix not in used)
    tops = dict.fromkeys(prefix for prefix in left if prefix.rpartition(".")[0] in {"", *used})
    return ChosenOutputs({name: tensor for name, tensor in found.items() if name in chosen}, tuple(tops))


def _prefixes(name: str) -> list[str]:
    """Return the names of the entries around a tensor and its own, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _named_tensors(out: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors in an output with their names, also inside tuples, dicts, dataclasses and objects."""
    if isinstance(out, Tensor):
        yield WHOLE, out
    else:
        yield from ((entry.name, entry.value) for entry in _walk(out) if isinstance(entry.value, Tensor))


class _Entry(NamedTuple):
    """Entry of an output: its name from the outermost container on, its own key, what holds it, and its value."""

    name: str
    key: str
    holder: Any
    value: Any


def _walk(holder: Any, prefix: str = "", seen: frozenset[int] = frozenset()) -> Iterator[_Entry]:
    """Yield every value inside a container or an object, outermost first."""
    seen |= {id(holder)}
    for key, value in _entries(holder):
        if isinstance(value, Tensor) or id(value) not in seen:
            yield _Entry(prefix + key, key, holder, value)
            yield from _walk(value, f"{prefix}{key}.", seen)


def _entries(value: Any) -> list[tuple[str, Any]]:
    """Return the entries of a container or an object by name; nothing for a value that holds none."""
    if isinstance(value, Tensor):
        return []
    if isinstance(value, Mapping):
        return [(str(key), inside) for key, inside in value.items()]
    if isinstance(value, (tuple, list)):
        return list(zip(getattr(value, "_fields", map(str, range(len(value)))), value, strict=False))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, (type, nn.Module)):
        return []
    leaves = tree_leaves(value)
    if not (len(leaves) == 1 and leaves[0] is value):  # a container that is registered with PyTorch
        return [(str(number), leaf) for number, leaf in enumerate(leaves)]
    return list(getattr(value, "__dict__", {}).items())


_CACHES = ("past_key_value", "past_key_values", "*_past_key_values", "cache", "*_cache", "cache_params", "mems",
           "presents", "present_key_values", "past_buckets_states")  # fmt: skip
"""Names under which models return what the next call gets."""

_KEYS_AND_VALUES = ("keys", "values", "key_cache", "value_cache", "key", "value", "k", "v")
"""Names of the tensors in a cache that grow with the number of tokens."""

_PREDICTIONS = ("*logits*", "pred_*", "predicted_*", "prediction_*", "*_score")
"""Names of what a model of transformers is called for."""

_BESIDE_PREDICTIONS = ("*last_hidden_state", "*pooler_output", "*_embeds", "*_output", "*_outputs", "state")
"""Names of what models of transformers return beside predictions. Predictions are none of these."""

_BY_PRODUCTS = ("encoder_last_hidden_state", "*hidden_states", "*attentions", "*router_logits", "extract_features",
                "state")  # fmt: skip
"""Names of what models of transformers return beside anything else."""

_NEVER_ASKED = ("image_*", "audio_*", "video_*", "intermediate_*")

_FLAGS = {
    "*hidden_states": "output_hidden_states",
    "*attentions": "output_attentions",
    "*router_logits": "output_router_logits",
}
"""By-products that a user asks for -> the argument, or attribute of the configuration, that does it."""


def _leave_out(out: Any, states: Mapping[int, Tensor], asked: frozenset[str]) -> list[str]:
    """Return the names of the entries that are no outputs by default."""
    left: list[str] = []
    results = _results_before_states(out, states)
    for entry in _walk(out):
        if any(_is_inside(entry.name, at) for at in left):
            continue
        handed_on = id(entry.value) in states and output_entry(entry.name) not in results
        if handed_on or _is_cache(entry) or _is_by_product(entry.holder, entry.key, asked):
            left.append(entry.name)
    return left


def _cached(out: Any) -> tuple[Tensor, ...]:
    """Return the keys and values in the caches of an output, each once."""
    caches = [entry.name for entry in _walk(out) if _is_cache(entry)]
    found: dict[int, Tensor] = {}
    for entry in _walk(out):
        grows = isinstance(entry.holder, (tuple, list)) or entry.key in _KEYS_AND_VALUES
        inside = any(_is_inside(entry.name, name) for name in caches)
        if grows and inside and isinstance(entry.value, Tensor) and entry.value.ndim == 4:
            found[id(entry.value)] = entry.value
    return tuple(found.values())


def _results_before_states(out: Any, states: Mapping[int, Tensor]) -> set[str]:
    """Return the entries before the first state of a recurrent layer; all entries if a state is the first of them.

    A model that returns nothing but states, or a state first, is called for the state.
    """
    names = [key for key, _ in _entries(out)]
    handed_on = {output_entry(entry.name) for entry in _walk(out) if id(entry.value) in states}
    first = next((number for number, name in enumerate(names) if name in handed_on), 0)
    return set(names[:first] or names)


def _is_cache(entry: _Entry) -> bool:
    """Return True for an object of a class of caches, and for a container that is named like one."""
    if isinstance(entry.value, Tensor) or not _entries(entry.value):
        return False
    named = any(fnmatchcase(entry.key, pattern) for pattern in _CACHES)
    return named or any(cls.__name__.endswith("Cache") for cls in type(entry.value).__mro__)


def _is_by_product(holder: Any, key: str, asked: frozenset[str]) -> bool:
    """Return True for an entry of an output of transformers beside what the model is called for."""
    if not any(cls.__name__ == "ModelOutput" for cls in type(holder).__mro__):
        return False
    flag = next((flag for pattern, flag in _FLAGS.items() if fnmatchcase(key, pattern)), None)
    if any(fnmatchcase(key, pattern) for pattern in _BY_PRODUCTS):
        return flag not in asked or any(fnmatchcase(key, pattern) for pattern in _NEVER_ASKED)
    predicts = any(_is_prediction(name) for name in holder)
    return predicts and not _is_prediction(key) and any(fnmatchcase(key, pattern) for pattern in _BESIDE_PREDICTIONS)


def _is_prediction(key: str) -> bool:
    return any(fnmatchcase(key, name) for name in _PREDICTIONS) and not fnmatchcase(key, "*router_logits")


def _asked_for(model: nn.Module, example_inputs: Any) -> frozenset[str]:
    """Return the flags that are set by the inputs, or else by the model's configuration."""
    given: Mapping[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        given = example_inputs
    elif isinstance(example_inputs, (tuple, list)):
        try:
            given = signature(model.forward).bind(*example_inputs).arguments
        except (TypeError, ValueError):  # the forward was replaced by one without a signature
            given = {}
    config = getattr(model, "config", None)
    said = {flag: given.get(flag) for flag in _FLAGS.values()}
    return frozenset(
        flag for flag, value in said.items() if (getattr(config, flag, False) if value is None else value) is True
    )


@contextmanager
def _states_of_recurrence(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Collect the states that PyTorch's recurrent layers return, by identity."""
    states: dict[int, Tensor] = {}

    def note(module: nn.Module, args: Any, out: Any) -> None:
        made = out[1:] if isinstance(module, nn.RNNBase) else out
        states.update({id(leaf): leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)})

    with ExitStack() as handles:
        for module in model.modules():
            if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
                handles.callback(module.register_forward_hook(note).remove)
        yield states
