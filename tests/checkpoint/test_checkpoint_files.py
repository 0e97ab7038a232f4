"""Saving is all or nothing: after a failure or a crash at any moment the old or the new checkpoint loads."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from etp_graph.checkpoint import MANIFEST_FILE, WEIGHTS_FILE, load, read_manifest, save
from etp_graph.checkpoint import _checkpoint as checkpoint
from etp_graph.checkpoint._files import backup_of
from etp_graph.errors import CheckpointError
from tests.support.models.toy import Toy
from tests.support.pruned_toy import assert_same, names, trained_toy


def test_where_a_model_may_be_written(tmp_path: Path) -> None:
    path = save(trained_toy(1), tmp_path / "deep" / "er")
    assert path == tmp_path / "deep" / "er"
    assert {f.name for f in path.iterdir()} == {WEIGHTS_FILE, MANIFEST_FILE}
    with pytest.raises(CheckpointError, match="overwrite=True"):
        save(Toy(), path)
    assert_same(load(path, build=Toy), trained_toy(1))
    new = Toy()
    save(new, path, overwrite=True)
    assert_same(load(path, build=Toy), new)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        save(Toy(), path, overwrite=True)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "empty").mkdir()
    for name in ("file", "link", "file/below"):
        with pytest.raises(CheckpointError, match=name):
            save(Toy(), tmp_path / name, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"
    assert (path / "notes.txt").exists()
    save(new, tmp_path / "empty")
    assert_same(load(tmp_path / "empty", build=Toy), new)
    assert names(tmp_path) == ["deep", "empty", "file", "link"]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = save(trained_toy(1), tmp_path / "m")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, 3500):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError, match=str(path)):
                save(trained_toy(0), path, overwrite=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(tmp_path) == ["m"]
        assert_same(load(path, build=Toy), trained_toy(1))


STEPS = ("rename", "fsync", "mkdir", "unlink", "rmdir")


@contextmanager
def intercepted(step: Callable[[], None]) -> Iterator[None]:
    """Call ``step`` before every call that changes the disk."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            step()
            return function(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, wrap(getattr(os, name)))
        patch.setattr(checkpoint, "save_file", wrap(checkpoint.save_file))
        patch.setattr(Path, "write_bytes", wrap(Path.write_bytes))
        yield


def loadable(path: Path) -> str:
    """Which of the two models of the tests below a folder holds."""
    manifest = read_manifest(path)
    rounds = len(manifest.record.selections)
    assert_same(load(path, build=Toy), trained_toy(rounds))
    return {1: "old", 3: "new"}[rounds]


@pytest.mark.filterwarnings("ignore:.*being overwritten")
def test_a_crash_at_any_moment_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    disk, snapshots = tmp_path / "disk", tmp_path / "snapshots"
    path, new = save(trained_toy(1), disk / "m"), trained_toy(3)
    busy = False

    def snapshot() -> None:
        nonlocal busy
        if not busy:
            busy = True  # taking the picture makes folders too
            shutil.copytree(disk, snapshots / f"{len(list(snapshots.glob('*'))):03}")
            busy = False

    snapshots.mkdir()
    with intercepted(snapshot):
        save(new, path, overwrite=True)
    found = []
    for folder in sorted(snapshots.iterdir()):
        found.append(loadable(folder / "m"))
        save(new, folder / "m", overwrite=True)  # and the next save works whatever the crash left
        assert loadable(folder / "m") == "new"
        assert not backup_of(folder / "m").exists()
    assert found == sorted(found, reverse=True)  # old, ..., old, new, ..., new
    assert found[0] == "old"
    assert found[-1] == "new"
    assert len(found) >= 8
    assert names(disk) == ["m"]


@pytest.mark.filterwarnings("ignore:.*being overwritten")
@pytest.mark.parametrize("forever", [False, True])
def test_a_failing_disk_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, forever: bool) -> None:
    model, outcomes = trained_toy(3), []
    for fail_at in range(30):
        path = save(trained_toy(1), tmp_path / str(fail_at) / "m")
        calls = 0

        def step(fail_at: int = fail_at) -> None:
            nonlocal calls
            calls += 1
            if calls > fail_at if forever else calls == fail_at + 1:
                raise OSError(errno.ENOSPC, "No space left on device")

        message = None
        with intercepted(step):
            try:
                save(model, path, overwrite=True)
            except CheckpointError as error:
                message = str(error)
        outcomes.append(loadable(path))
        if message is None:
            assert outcomes[-1] == "new"
        else:
            assert str(path) in message
        if message is not None and not forever:
            assert outcomes[-1] == "old"
            assert {f for f in names(path.parent) if not f.endswith(".tmp")} == {"m"}
        if calls <= fail_at:
            break
    assert "old" in outcomes
    assert outcomes[-1] == "new"
    assert calls <= fail_at  # every step failed once


def test_the_former_checkpoint_is_found_with_a_warning(tmp_path: Path) -> None:
    path = save(trained_toy(1), tmp_path / "m")
    path.rename(backup_of(path))
    with pytest.warns(UserWarning, match="overwritten"):
        assert_same(load(path, build=Toy), trained_toy(1))
    with pytest.raises(CheckpointError, match="overwrite=True"):
        save(Toy(), path)
