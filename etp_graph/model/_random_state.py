"""Save and restore the states of the global random number generators as tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from etp_graph.errors import CheckpointError


@contextmanager
def preserved_rng(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """All random generators of PyTorch (CPU, the model's devices), NumPy and Python are afterwards what they were."""
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda), _numpy_and_python_rng(seed):
        if seed is not None:
            # Not torch.manual_seed: it would reseed, or schedule the seed of, devices that are none of ours.
            torch.default_generator.manual_seed(seed)
            for index in cuda:
                torch.cuda.default_generators[index].manual_seed(seed)
        yield


@contextmanager
def _numpy_and_python_rng(seed: int | None) -> Iterator[None]:
    numpy, python = np.random.get_state(), random.getstate()  # noqa: NPY002 - the global one is what models use
    try:
        if seed is not None:
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
        yield
    finally:
        np.random.set_state(numpy)  # noqa: NPY002
        random.setstate(python)


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
