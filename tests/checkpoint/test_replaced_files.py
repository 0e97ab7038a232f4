"""A file that is replaced has its old or its new content, whichever step of the disk fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from etp_graph.checkpoint import replace_file, storage_errors
from etp_graph.errors import CheckpointError
from etp_graph.integrations._state import read_state, write_state
from tests.support.pruned_toy import names


def fail_at(patch: pytest.MonkeyPatch, owner: Any, name: str, number: int) -> None:
    """Let the call with this number, counted from 0, of a function that changes the disk fail."""
    function: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def failing(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **options)

    patch.setattr(owner, name, failing)


STEPS = [(Path, "write_bytes"), (os, "fsync"), (os, "replace"), (Path, "replace")]


@pytest.mark.parametrize(("owner", "name"), STEPS, ids=lambda step: getattr(step, "__name__", step))
def test_a_failing_step_leaves_the_old_content(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, failed = tmp_path / "file", False
    replace_file(file, b"old")
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, 0)
        try:
            replace_file(file, b"new")
        except OSError:
            failed = True
    assert file.read_bytes() == (b"old" if failed else b"new")
    assert failed or (owner, name) == (os, "replace")  # pathlib may call the system without it
    assert names(tmp_path) == ["file"]


def test_the_state_of_a_callback_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old: dict[str, Any] = {"regularizer": None, "format": 1, "done": 3}
    write_state(old, tmp_path)
    with monkeypatch.context() as patch:
        fail_at(patch, os, "fsync", 0)
        with pytest.raises(CheckpointError, match=f"{tmp_path}: cannot be written .*No space"):
            write_state({**old, "done": 4}, tmp_path)
    assert read_state(tmp_path) == old
    assert len(names(tmp_path)) == 1
    write_state({**old, "done": 4}, tmp_path)
    assert read_state(tmp_path)["done"] == 4


def test_only_the_named_failures_become_errors_of_checkpoints(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"x: cannot be read \(short\)\. Copy it\."),
        storage_errors(Path("x"), action="read", remedy="Copy it.", failures=(EOFError,)),
    ):
        raise EOFError("short")
    with pytest.raises(KeyError), storage_errors(tmp_path):
        raise KeyError("a bug")
