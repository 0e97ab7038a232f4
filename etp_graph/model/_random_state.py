"""Save and restore the states of the global random number generators as tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from etp_graph.errors import CheckpointError

from ._undone import undone


@contextmanager
def preserved_rng(model: nn.Module) -> Iterator[None]:
    """Restore the random generators of PyTorch (CPU, the model's devices), NumPy and Python after this context."""
    before = generator_states(model)
    with undone(lambda: restore_generators_(before)):
        yield


_GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch": (torch.default_generator.get_state, torch.default_generator.set_state),
    "numpy": (partial(np.random.get_state, legacy=False), np.random.set_state),
    "python": (random.getstate, random.setstate),
}
"""Name of a global generator -> how its state is read and set."""


def _generator(name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    if name in _GENERATORS:
        return _GENERATORS[name]
    own = torch.cuda.default_generators[int(name.removeprefix("cuda."))]
    return own.get_state, own.set_state


def generator_states(model: nn.Module) -> dict[str, Any]:
    """Return the states of the global generators: PyTorch's (CPU, the model's CUDA devices), NumPy's and Python's."""
    cuda = sorted({f"cuda.{p.device.index}" for p in model.parameters() if p.device.type == "cuda"})
    return {name: _generator(name)[0]() for name in (*_GENERATORS, *cuda)}


def restore_generators_(states: Mapping[str, Any]) -> None:
    """Set the state of every generator that has another one; nothing is written to the others."""
    for name, before in states.items():
        read, write = _generator(name)
        if not _same_state(read(), before):
            write(before)


def changed_generators(states: Mapping[str, Any]) -> set[str]:
    """Return the names of the generators whose states differ from these."""
    return {name for name, before in states.items() if not _same_state(_generator(name)[0](), before)}


def _same_state(now: Any, before: Any) -> bool:
    if isinstance(before, dict):
        return all(_same_state(now[key], value) for key, value in before.items())
    return torch.equal(now, before) if isinstance(before, Tensor) else bool(np.all(now == before))


SEEDED = frozenset(("numpy", "python"))
"""Names of the generators that no dispatch mode can redirect."""


def seed_numpy_and_python_(seed: int) -> None:
    """Set the seeds of NumPy's and Python's global generators."""
    np.random.seed(seed)  # noqa: NPY002 - models use the global generator
    random.seed(seed)


RNG = "rng."
"""Prefix that marks generator states among other tensors."""

_WORDS = 624  # size of the state of the Mersenne Twister, which Python and NumPy both use


def capture_rng() -> dict[str, Tensor]:
    """Return the states of the global generators of PyTorch, Python and NumPy.

    PyTorch's are those of the CPU and, if CUDA is in use, of every CUDA device.
    """
    found = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found |= {f"cuda.{i}": state.cpu() for i, state in enumerate(torch.cuda.get_rng_state_all())}
    _, words, gauss = random.getstate()
    found["python"] = torch.tensor(words, dtype=torch.int64, device="cpu")
    found["python.gauss"] = torch.tensor([] if gauss is None else [gauss], dtype=torch.float64, device="cpu")
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002  # users' training loops use the global generator
    if isinstance(numpy, dict) and numpy["bit_generator"] == "MT19937":
        words = [*numpy["state"]["key"].tolist(), int(numpy["state"]["pos"]), int(numpy["has_gauss"])]
        found["numpy"] = torch.tensor(words, dtype=torch.int64, device="cpu")
        found["numpy.gauss"] = torch.tensor([numpy["gauss"]], dtype=torch.float64, device="cpu")
    return found


def restore_rng_(tensors: Mapping[str, Tensor]) -> None:
    """Set every generator whose state is in ``tensors``, named as in :func:`capture` with the prefix :data:`RNG`.

    Raises:
        CheckpointError: a state is missing or damaged, or belongs to a CUDA device that this machine lacks.
    """
    states = {name.removeprefix(RNG): state for name, state in tensors.items() if name.startswith(RNG)}
    try:
        torch.set_rng_state(states["torch"])
        random.setstate((3, tuple(states["python"].tolist()), _only(states["python.gauss"])))
        if "numpy" in states:
            _set_numpy(states["numpy"].tolist(), _only(states["numpy.gauss"]) or 0.0)
        for name, state in states.items():
            if name.startswith("cuda."):
                torch.cuda.set_rng_state(state, int(name.removeprefix("cuda.")))
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"the saved state of the random number generators cannot be used here ({error!r}): continue on the kind "
            "of machine that wrote it, or begin anew in another folder."
        ) from error


def _only(values: Tensor) -> float | None:
    return float(values[0]) if values.numel() else None


def _set_numpy(words: list[int], gauss: float) -> None:
    key = np.array(words[:_WORDS], dtype=np.uint32)
    state = {"key": key, "pos": words[_WORDS]}
    np.random.set_state(  # noqa: NPY002
        {"bit_generator": "MT19937", "state": state, "has_gauss": words[_WORDS + 1], "gauss": gauss}
    )
