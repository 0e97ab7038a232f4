"""The states of all random number generators that a training loop may draw from, as tensors and back."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .errors import CheckpointError

RNG = "rng."
"""Prefix of the names of generator states among other tensors."""

_WORDS = 624  # of the Mersenne Twister, which both Python and NumPy run


def capture() -> dict[str, Tensor]:
    """States of PyTorch's generators (CPU and, once in use, every CUDA device), Python's and NumPy's global one."""
    found = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found |= {f"cuda.{i}": state.cpu() for i, state in enumerate(torch.cuda.get_rng_state_all())}
    _, words, gauss = random.getstate()
    found["python"] = torch.tensor(words, dtype=torch.int64, device="cpu")
    found["python.gauss"] = torch.tensor([] if gauss is None else [gauss], dtype=torch.float64, device="cpu")
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002  # the global generator is what users' loops draw from
    if isinstance(numpy, dict) and numpy["bit_generator"] == "MT19937":
        words = [*numpy["state"]["key"].tolist(), int(numpy["state"]["pos"]), int(numpy["has_gauss"])]
        found["numpy"] = torch.tensor(words, dtype=torch.int64, device="cpu")
        found["numpy.gauss"] = torch.tensor([numpy["gauss"]], dtype=torch.float64, device="cpu")
    return found


def reinstate(tensors: Mapping[str, Tensor]) -> None:
    """Set every generator whose state is among ``tensors``, under the names of :func:`capture` after :data:`RNG`.

    Raises:
        CheckpointError: a state is damaged, or of a CUDA device that is not there.
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
