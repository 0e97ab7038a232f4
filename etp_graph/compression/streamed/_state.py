"""Finished steps of a streamed run and their files, so that a killed run continues with the same result.

The files lie in a hidden folder beside the output. ``journal.json`` lists the finished steps and the SHA-256 of every
file; it is replaced atomically after each step. A step that was killed runs again and replaces its files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save_file
from torch import Tensor

from etp_graph._config import quoted
from etp_graph._json import JsonReader, shorten
from etp_graph.checkpoint import (
    FileSum,
    move_into_place,
    read_file,
    replace_file,
    require_folder,
    sealed,
    storage_errors,
    unsealed,
)
from etp_graph.errors import CheckpointError

_FORMAT = 1

_JOURNAL = "journal.json"

_MAX_BYTES = 2**28

_OWN = ("hidden", "gradient", "scores-", "size-", f".{_JOURNAL}", ".scores-")
"""Beginnings of the names that a run gives."""

_READER = JsonReader(CheckpointError, "Remove the folder to begin anew.")


Action = Callable[[], tuple[Any, list[str]]]
"""What a step does: it returns its result, as JSON can store it, and the files that no later step reads."""

Step = Callable[[str, Action], None]
"""Runs a step of this name, unless it is finished."""


class RunState:
    """Folder with the state of a run.

    Args:
        folder: the folder, which may hold the state of the same run.
        arguments: what the result depends on, as values that JSON can store.
        targets: names of the subfolders that become folders of their own at the end, and where.

    Attributes:
        is_new: whether no earlier run left anything.

    Raises:
        CheckpointError: the folder belongs to a run with other arguments, or a file is damaged.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, Any], targets: Mapping[str, Path]) -> None:
        self._folder, self._targets = folder, dict(targets)
        self._arguments: dict[str, Any] = json.loads(json.dumps(arguments))
        self._steps: dict[str, Any] = {}
        self._sums: dict[str, FileSum] = {}
        self._moved: set[str] = set()
        require_folder(folder)
        self.is_new = not (folder / _JOURNAL).is_file()
        if not self.is_new:
            self._read()
        else:
            _remove_rest(folder)

    def __contains__(self, step: str) -> bool:
        """Return True if the step is finished."""
        return step in self._steps

    def result(self, step: str) -> Any:
        """Return what a finished step stored in the journal."""
        return self._steps[step]

    def _read(self) -> None:
        file = self._folder / _JOURNAL
        where = f"{file}: not a journal"
        keys = ("format", "arguments", "steps", "files")
        found = _READER.require_object(_READER.parse(read_file(file, limit=_MAX_BYTES), where), where)
        body = unsealed(found, where, _READER)
        body = _READER.require_object(body, where, keys)
        before, now = body["arguments"], self._arguments
        differ = [
            key
            for key in dict.fromkeys([*now, *before])
            if body["format"] != _FORMAT or before.get(key) != now.get(key)
        ]
        if differ:
            said = "; ".join(f"{key} was {shorten(before.get(key))}, is {shorten(now.get(key))}" for key in differ)
            raise CheckpointError(
                f"{self._folder}: the run that began there had other arguments ({said}). Call it with the same "
                "arguments, or remove this folder to begin anew."
            )
        self._steps = _READER.require_object(body["steps"], f"{where}: steps")
        self._sums = {name: FileSum.from_json(value, f"{where}: {name}") for name, value in body["files"].items()}
        for name, known in self._sums.items():
            self._check(name, known)

    def _check(self, name: str, known: FileSum) -> None:
        """Raise unless a file is sound. It may have been moved to its target just before the run was killed."""
        top, _, rest = name.partition("/")
        try:
            known.check(self._folder / name)
        except CheckpointError:
            if top not in self._targets or not self._is_moved(self._targets[top] / rest, known):
                raise CheckpointError(
                    f"{self._folder / name}: is missing or damaged. Remove {self._folder} to begin anew."
                ) from None
            self._moved.add(top)

    def _is_moved(self, file: Path, known: FileSum) -> bool:
        try:
            known.check(file)
        except CheckpointError:
            return False
        return True

    def write(self, name: str, tensors: Mapping[str, Tensor], *, plain: bool = False) -> None:
        """Write tensors to a file of the step that is running; ``plain`` as transformers writes its own."""
        kept = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        file = self._folder / name
        temporary = file.with_name(f".{file.name}.new")  # a killed run leaves it, and the next one replaces it
        with self._errors(file):
            save_file(kept, temporary, metadata={"format": "pt"} if plain else None)
            if plain:
                shutil.copymode(self._folder / _JOURNAL, temporary)  # safetensors makes its files private
            self._sums[name] = FileSum.of_file(temporary)
            temporary.replace(file)

    @contextmanager
    def _errors(self, file: Path) -> Iterator[None]:
        with storage_errors(file, remedy="Free space there, and call it again: it continues."):
            file.parent.mkdir(parents=True, exist_ok=True)
            yield

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file of the step that is running."""
        file = self._folder / name
        with self._errors(file):
            replace_file(file, content)
        self._sums[name] = FileSum.of_bytes(content)

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        return self._sums[name].n_bytes

    def read(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a file."""
        try:
            return parse_tensors(self._sums[name].read(self._folder / name))
        except (CheckpointError, SafetensorError, KeyError) as error:
            raise CheckpointError(
                f"{self._folder / name}: is missing or damaged. Remove {self._folder} to begin anew."
            ) from error

    def finish(self, step: str, result: Any = None, *, drop: Iterable[str] = ()) -> None:
        """Note that a step is finished, and remove files that no later step reads."""
        gone = [name for name in drop if name in self._sums]
        self._steps[step] = result
        for name in gone:
            del self._sums[name]
        self._store()
        for name in gone:
            (self._folder / name).unlink(missing_ok=True)

    def publish(self, top: str) -> None:
        """Move a subfolder to its target, complete or not at all, unless that is done."""
        target, step = self._targets[top], f"publish-{top}"
        if step in self:
            return
        if top in self._moved:
            shutil.rmtree(self._folder / top, ignore_errors=True)  # what was there before, if anything
        else:
            with storage_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                move_into_place(self._folder / top, target)
        for name in [name for name in self._sums if name.startswith(f"{top}/")]:
            del self._sums[name]
        self._steps[step] = None
        self._store()

    def remove(self) -> None:
        """Remove the folder at the end of the run."""
        (self._folder / _JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _store(self) -> None:
        body = {
            "format": _FORMAT, "arguments": self._arguments, "steps": self._steps,
            "files": {name: known.to_json() for name, known in self._sums.items()},
        }  # fmt: skip
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._folder / _JOURNAL, json.dumps(sealed(body)).encode())


def _remove_rest(folder: Path) -> None:
    """Remove what a run left that was killed in its first step, or as it cleaned up.

    Raises:
        CheckpointError: the folder holds something else.
    """
    held = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    if others := [name for name in held if not name.startswith(_OWN)]:
        raise CheckpointError(f"{folder}: holds {quoted(others)}, but no run. Choose another folder for out=.")
    shutil.rmtree(folder, ignore_errors=True)
