"""Store the finished steps of a run in a folder, so that an interrupted run can continue with the same result.

``journal.json`` lists the steps with their outcomes. It is replaced atomically after each step. A step that changes
the model saves the weights in ``<step>/model`` (:func:`etp_graph.save`). Every step saves the states of the random
number generators after it in ``<step>/state.safetensors``. The journal holds the SHA-256 of these files, and a digest
of itself. No file in the folder is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

from etp_graph._config import quoted
from etp_graph._json import shorten
from etp_graph.checkpoint import FileSum, load, replace_file, require_folder, save, sealed, storage_errors
from etp_graph.errors import CheckpointError, EtpError
from etp_graph.methods import Method
from etp_graph.model import RNG, all_tensors, capture_rng, first_names, restore_rng_
from etp_graph.plan import Plan
from etp_graph.surgery import SurgeryRecord, get_record

from ._step_files import (
    FILES,
    FORMAT,
    JOURNAL_FILE,
    MODEL_FOLDER,
    STATE_FILE,
    StepResult,
    files_of,
    model_folder,
    read_journal,
    read_plan,
    read_tensors,
)

METHOD = "method."
"""Prefix of the settings of the method among the arguments of a run."""


class Journal:
    """The steps of one run, in their order.

    Args:
        folder: folder for the steps. ``None``: write nothing and run every step.
        arguments: the settings that the run depends on, as values that JSON can store. A run with other arguments is
            refused.

    Raises:
        CheckpointError: the folder belongs to a run with other arguments, holds something else, or is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, arguments: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder).absolute()
        self._arguments = dict(arguments)
        self._steps: list[StepResult] = []
        self._next = 0
        if self._folder is None:
            return
        file = self._folder / JOURNAL_FILE
        if os.path.lexists(file):
            self._steps = _read(file, self._arguments)
        else:
            _prepare(self._folder)

    @property
    def replaying(self) -> bool:
        """True if the next step was finished by an earlier run."""
        return self._next < len(self._steps)

    @property
    def last_change(self) -> StepResult | None:
        """The last finished step that changed the model; ``None`` if there is none."""
        return next((step for step in reversed(self._steps) if step["weights"]), None)

    def restore_(self, model: nn.Module) -> None:
        """Restore the state after the last finished step: the model's weights and the random number generators.

        Args:
            model: the dense model, changed in place.

        Raises:
            CheckpointError: files are missing or damaged, or the model was pruned before.
        """
        if self._folder is None or not self._steps:
            return
        state = self.tensors(self._steps[-1])
        changed = [step for step in self._steps if step["weights"]]
        before = capture_rng()
        try:
            restore_rng_(state)
            if changed:
                load(model_folder(self._folder, changed[-1]), build=model)
        except BaseException:
            restore_rng_({RNG + name: value for name, value in before.items()})
            raise

    def step(
        self,
        name: str,
        action: Callable[[], tuple[StepResult, Mapping[str, Tensor]]],
        *,
        model: nn.Module | None = None,
    ) -> StepResult:
        """Return the outcome of a step: read it if the step was finished before, else run ``action`` and store it.

        Args:
            name: name of the step, a plain word that can name a folder.
            action: runs the step and returns its outcome and the tensors to store with it.
            model: the model, if the step changes it; its weights are saved after the step.

        Raises:
            CheckpointError: the steps in the folder are not those of this run, or the folder cannot be written.
        """
        name = f"{self._next:02d}-{name}"
        if self.replaying:
            found = self._steps[self._next]
            if found["step"] != name:
                raise CheckpointError(
                    f"{self._folder}: step {found['step']!r} was finished where {name!r} is due: the folder was "
                    "written by another version. Use another folder."
                )
        else:
            outcome, tensors = action()
            found = {**outcome, "step": name, "weights": model is not None}
            self._keep(found, model, tensors)
            self._steps.append(found)
        self._next += 1
        return found

    def tensors(self, step: StepResult) -> dict[str, Tensor]:
        """Return the tensors of a finished step: those of its action, and the generator states after it."""
        return {} if self._folder is None else read_tensors(self._folder, step)

    def plan(self, step: StepResult) -> Plan:
        """Return the plan that a finished step stored.

        Raises:
            CheckpointError: the file is missing or damaged, or holds no plan.
        """
        found = None if self._folder is None else read_plan(self._folder, step)
        if found is None:
            raise CheckpointError(f"step {step['step']!r} of the checkpoint lost its plan: use another folder.")
        return found

    def _keep(self, found: StepResult, model: nn.Module | None, tensors: Mapping[str, Tensor]) -> None:
        if self._folder is None:
            return
        home = self._folder / found["step"]
        content = tensor_bytes({**tensors, **{RNG + name: state for name, state in capture_rng().items()}})
        with storage_errors(home):
            require_folder(home)
            home.mkdir(exist_ok=True)
            if model is not None:
                # a run that stopped before it wrote the journal leaves a model
                save(model, home / MODEL_FOLDER, overwrite=True)
            replace_file(home / STATE_FILE, content)
            found[FILES] = {name: FileSum.of_file(home / name).to_json() for name in files_of(found)}
            body = {"format": FORMAT, "arguments": self._arguments, "steps": [*self._steps, found]}
            replace_file(self._folder / JOURNAL_FILE, json.dumps(sealed(body)).encode())


def begun_with(folder: str | os.PathLike[str], methods: Sequence[Method]) -> Method | None:
    """Return the one of these methods with which the run in a folder began; ``None`` if there is none, or no run.

    Its rounds, schedule and source do not count, and the source is that in the folder.

    Raises:
        CheckpointError: the journal is damaged.
    """
    file = Path(folder).absolute() / JOURNAL_FILE
    if not methods or not os.path.lexists(file):
        return None
    arguments, _ = read_journal(file)
    try:
        stored = Method.from_json({k.removeprefix(METHOD): v for k, v in arguments.items() if k.startswith(METHOD)})
    except EtpError:  # the journal then refuses the arguments
        return None
    for method in methods:
        found = replace(method, source=stored.source)
        if replace(found, rounds=stored.rounds, schedule=stored.schedule) == stored:
            return found
    return None


def check_dense(model: nn.Module) -> None:
    """Raise :class:`CheckpointError` if the model was pruned before.

    To continue a run, its saved weights are loaded into the original architecture, which a pruned model does not have.
    """
    if get_record(model) != SurgeryRecord():
        raise CheckpointError(
            "checkpoint: this model was pruned before. Pass the original model as it was when the run began, which "
            "is then brought to the saved state. To prune a pruned model once more, leave checkpoint out."
        )


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    tensors = all_tensors(model)
    for name, first in first_names(tensors, tensors).items():
        tensor = tensors[name].detach()
        digest.update(f"{name}={first} {tensor.dtype} {list(tensor.shape)}".encode())
        if name == first and not tensor.is_meta:
            digest.update(tensor_bytes({"_": tensor.cpu().contiguous().clone()}))
    return digest.hexdigest()


def _prepare(folder: Path) -> None:
    """Create the folder, or raise :class:`CheckpointError` if it holds other files or is not a folder."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder. Choose another path.")
    held = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    # If a run stops in its first step, before the journal is written, only the folder of that step remains.
    if others := [name for name in held if not name.startswith(("00-", f".{JOURNAL_FILE}"))]:
        raise CheckpointError(f"{folder}: holds {quoted(others)}, but no run. Choose an empty folder.")
    with storage_errors(folder, action="made", remedy="Choose another path."):
        folder.mkdir(parents=True, exist_ok=True)


def _read(file: Path, arguments: Mapping[str, Any]) -> list[StepResult]:
    """Return the finished steps, or raise :class:`CheckpointError` if the run had other arguments."""
    before, steps = read_journal(file)
    now = json.loads(json.dumps(arguments))
    differ = [
        f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}"
        for name in dict.fromkeys([*now, *before]) if before.get(name) != now.get(name)
    ]  # fmt: skip
    if differ:
        raise CheckpointError(
            f"{file}: the run that began there had other arguments ({'; '.join(differ)}). Call compress with the same "
            "arguments and the same dense model, or use another folder."
        )
    return steps


def _short(value: Any) -> str:
    return shorten(json.dumps(value), quote=False)
