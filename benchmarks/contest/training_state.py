"""Keep the state of training while a run goes on, so that a killed run continues at the last pass over the data.

A run is a fixed sequence of trainings (its phases) with computations between them that depend on the weights and the
seed alone. So the state of the trainings is all that has to be kept: a run that begins again replays what is between
them, skips the finished trainings and continues the one that was interrupted, with the same bits as without the
interruption. The folder has one file for each training, and each is replaced as a whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from etp_graph.checkpoint import replace_file, storage_errors
from etp_graph.model import RNG, capture_rng, restore_rng_

LEAST_SECONDS = 30.0
"""States are written no more often; a pass over a graph takes a single step."""


class RunStates:
    """The states of one run.

    Args:
        folder: is created with the first state.
        least_seconds: shortest time between two states of one training; default :data:`LEAST_SECONDS`.

    Attributes:
        seconds_before: seconds that earlier processes spent on the trainings that were continued or skipped.
    """

    def __init__(self, folder: Path, *, least_seconds: float | None = None) -> None:
        self.folder = folder
        self.least_seconds = LEAST_SECONDS if least_seconds is None else least_seconds
        self.seconds_before = 0.0
        self._trainings = 0

    def next_training(self) -> TrainingState:
        """The state of the training that begins now."""
        self._trainings += 1
        return TrainingState(self, self.folder / f"{self._trainings:02d}.pt")

    def clear(self) -> None:
        """Remove the folder: the run has its line."""
        shutil.rmtree(self.folder, ignore_errors=True)


class TrainingState:
    """The state of one training: model, optimizer, force, random generators and the number of steps that are done.

    A force of this library continues in the middle of a training. What another library attached has a state that
    nobody knows: there only finished trainings are kept. Where a part of ours says nothing about its state, nothing is.
    """

    def __init__(self, run: RunStates, file: Path) -> None:
        self.run, self.file = run, file
        self._begin = self._last = perf_counter()
        self._seconds = 0.0

    def restore_(
        self, model: nn.Module, optimizer: Optimizer, attached: object, generator: torch.Generator, *, steps: int
    ) -> int:
        """Bring everything to the state that was kept; return the number of steps that are done, 0 without a state."""
        if not self.file.is_file():
            return 0
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if _has_state(attached):
            attached.load_state_dict(state["attached"])  # type: ignore[attr-defined]
        generator.set_state(state["generator"])
        restore_rng_(state["random"])
        self._seconds = state["seconds"]
        self.run.seconds_before += self._seconds
        done = int(state["done"])
        if done == steps and getattr(getattr(attached, "settings", None), "mode", None) == "loss":
            attached.penalty()  # type: ignore[attr-defined]  # compress checks at the end that somebody asked for it
        return done

    def keep(
        self, model: nn.Module, optimizer: Optimizer, attached: object, generator: torch.Generator, *,
        done: int, steps: int, pass_ends: bool,
    ) -> None:  # fmt: skip
        """Write the state after ``done`` of ``steps`` steps, if it is the last one or ``pass_ends`` with this step."""
        last, now = done == steps, perf_counter()
        due = pass_ends and now - self._last >= self.run.least_seconds and _continues(attached)
        if not (due or last) or _is_unknown(attached):
            return
        state = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "attached": attached.state_dict() if _has_state(attached) else {},  # type: ignore[attr-defined]
            "generator": generator.get_state(), "random": {RNG + name: own for name, own in capture_rng().items()},
            "done": done, "seconds": self._seconds + now - self._begin,
        }  # fmt: skip
        content = io.BytesIO()
        torch.save(state, content)
        with storage_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.file, content.getvalue())
        self._last = perf_counter()


def _has_state(attached: object) -> bool:
    return hasattr(attached, "state_dict") and hasattr(attached, "load_state_dict")


def _continues(attached: object) -> bool:
    """Whether a training with this can continue in its middle."""
    return attached is None or _has_state(attached)


def _is_unknown(attached: object) -> bool:
    """Whether nothing may be kept: not a force with a state, nor the hook of another library."""
    return not (_continues(attached) or isinstance(attached, RemovableHandle))


_CURRENT: ContextVar[RunStates | None] = ContextVar("states of the current run", default=None)


@contextmanager
def keeping_states(states: RunStates | None) -> Iterator[None]:
    """Every training inside of this context keeps its state, whatever contestant asks for it."""
    token = _CURRENT.set(states)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def next_training() -> TrainingState | None:
    """The state of the training that begins now; ``None`` outside of :func:`keeping_states`."""
    states = _CURRENT.get()
    return None if states is None else states.next_training()


def folder_of(root: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """The folder of a run's states below ``root``; states of the same run with other settings are removed.

    Args:
        root: where all runs keep their states.
        name: of the run, a plain word.
        settings: everything that its figures depend on, the sources too, as values that JSON can store.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    for old in root.glob(f"{name}@*"):
        if old.name != f"{name}@{digest}":
            shutil.rmtree(old, ignore_errors=True)
    return root / f"{name}@{digest}"
