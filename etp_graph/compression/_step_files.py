"""Read the folder of a run: the journal, and the files of its steps, each checked before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from torch import Tensor

from etp_graph._json import JsonReader, shorten
from etp_graph.checkpoint import MANIFEST_FILE, FileSum, read_file, require_folder, unsealed
from etp_graph.errors import CheckpointError, EtpError
from etp_graph.plan import Cost, LatencyFit, Plan, parse_selection

FORMAT = 1

JOURNAL_FILE = "journal.json"

STATE_FILE = "state.safetensors"

MODEL_FOLDER = "model"

FILES = "files"
"""Key of a step: name of a file in its folder -> size and SHA-256."""

_MAX_BYTES = 2**30

_READER = JsonReader(CheckpointError, "Restore it from a copy, or use another folder.")

_OUTCOMES = ("metric", "cost", "selection", "latency", "steps", "steps_done", "seconds")

StepResult = dict[str, Any]
"""Results of one step, as values that JSON can store."""


def files_of(step: StepResult) -> tuple[str, ...]:
    """Return the names of the files whose SHA-256 the journal holds; the manifest holds that of the weights."""
    return (STATE_FILE, f"{MODEL_FOLDER}/{MANIFEST_FILE}") if step["weights"] else (STATE_FILE,)


def model_folder(folder: Path, step: StepResult) -> Path:
    """Return the folder with the model of a finished step.

    Raises:
        CheckpointError: it is a link, or its manifest is not the one that was written.
    """
    home = folder / str(step["step"])
    found = home / MODEL_FOLDER
    for place in (home, found):
        require_folder(place)
    known = step.get(FILES, {}).get(f"{MODEL_FOLDER}/{MANIFEST_FILE}")
    if known is not None:
        FileSum(**_fields(known)).check(found / MANIFEST_FILE)
    return found


def _fields(known: Mapping[str, Any]) -> dict[str, Any]:
    return {"n_bytes": known["bytes"], "sha256": known["sha256"]}


def read_tensors(folder: Path, step: StepResult) -> dict[str, Tensor]:
    """Return the tensors of a finished step of the run in ``folder``.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    home = folder / str(step["step"])
    file = home / STATE_FILE
    require_folder(home)
    known = step.get(FILES, {}).get(STATE_FILE)
    content = read_file(file, limit=_MAX_BYTES) if known is None else FileSum(**_fields(known)).read(file)
    try:
        return parse_tensors(content)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        cause = shorten(str(error), quote=False)
        raise CheckpointError(f"{file}: not a safetensors file ({cause}). Restore the folder from a copy.") from error


def read_plan(folder: Path, step: StepResult) -> Plan | None:
    """Return the plan that a finished step stored, or ``None`` if it stored none (steps of older versions).

    Raises:
        CheckpointError: the file is missing or damaged, or does not hold a plan.
    """
    packed = read_tensors(folder, step).get("plan")
    if packed is None:
        return None
    try:
        return Plan.from_json(packed.numpy().tobytes().decode(errors="replace"))
    except (EtpError, TypeError, RuntimeError) as error:
        file = folder / str(step["step"]) / STATE_FILE
        raise CheckpointError(f"{file}: holds no plan ({error}) Restore the folder from a copy.") from error


def read_journal(file: Path) -> tuple[dict[str, Any], list[StepResult]]:
    """Return the arguments of a run and its finished steps.

    A journal of version 0.1.0 has no digest. It is read, too, but damage that leaves sound values shows only in a
    journal with a digest.

    Raises:
        CheckpointError: the file is not a journal, is damaged, or is of another format.
    """
    where = f"{file}: not a journal"
    body = _READER.require_object(_READER.parse(read_file(file, limit=_MAX_BYTES), where), where)
    if type(body.get("format")) is not int or body["format"] != FORMAT:
        found = shorten(body.get("format"))
        raise CheckpointError(f"{file}: format {found}, not a journal of format {FORMAT}. Use another folder.")
    _READER.require_object(body, where, ("format", "arguments", "steps"), optional=("digest",))
    sealed = "digest" in body
    if sealed:
        unsealed(body, where, _READER)
    arguments = _READER.require_object(body["arguments"], f"{where}: arguments")
    steps = _READER.list_items(body["steps"], f"{where}: steps")
    return arguments, [_step(step, number, place, sealed=sealed) for number, (place, step) in enumerate(steps)]


def _step(value: Any, number: int, where: str, *, sealed: bool) -> StepResult:
    """Check and return one step. Without a digest, a step has no other keys than those that version 0.1.0 wrote."""
    step = _READER.require_object(value, where, ("step", "weights"), optional=None if sealed else _OUTCOMES)
    name = _READER.require_text(step["step"], f"{where}: step")
    if not name.startswith(f"{number:02d}-") or not name.replace("-", "").isalnum() or not name.isascii():
        _READER.refuse(where, f"{shorten(name)} is not the name of step {number}")  # it is used as a path
    _READER.require_boolean(step["weights"], f"{where}: weights")
    if FILES in step:  # steps of version 0.1.0 in a run that goes on have none
        files = _READER.require_object(step[FILES], f"{where}: {FILES}", files_of(step))
        for file, known in files.items():
            FileSum.from_json(known, f"{where}: {FILES}: {file}")
    _check_outcome(step, where)
    return step


def _check_outcome(step: StepResult, where: str) -> None:
    """Raise unless the outcome of a step has what its kind says, with finite numbers."""
    kind = step["step"].split("-")[1]
    needed = {"evaluate": ("metric",), "prune": ("cost", "selection")}.get(kind, ())
    _READER.require_object(step, where, (*needed, "seconds"), optional=None)
    _READER.require_number(step["seconds"], f"{where}: seconds", low=0)
    if "metric" in step:
        _READER.require_number(step["metric"], f"{where}: metric")
    for key in ("steps", "steps_done"):
        if step.get(key) is not None:
            _READER.require_integer(step[key], f"{where}: {key}")
    if "selection" in step:
        parse_selection(_READER, step["selection"], f"{where}: selection")
    for key, read in (("cost", Cost.from_json), ("latency", LatencyFit.from_dict)):
        if step.get(key) is not None:
            try:
                read(step[key])
            except EtpError as error:
                _READER.refuse(f"{where}: {key}", str(error).rstrip("."), error)
