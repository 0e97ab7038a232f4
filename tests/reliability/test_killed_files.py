"""``save`` and ``load`` are whole or not at all, whatever stops them, and a reader never sees a half of two models."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from etp_graph.checkpoint import _files as files
from etp_graph.checkpoint import load, read_manifest, save, save_into
from etp_graph.checkpoint._temporary import _machine, temporary_beside
from etp_graph.compression import JOURNAL_FILE
from etp_graph.errors import CheckpointError
from tests.support.faults.interrupted import Loop, Power, run, toy
from tests.support.faults.interrupting import Interrupting, count_lines
from tests.support.models.toy import Toy
from tests.support.pruned_toy import names, state, trained_toy, values
from tests.test_compatibility import DATA, encoder

Tell = Callable[[str], None]
ERRORS = [KeyboardInterrupt, MemoryError]
WRITING = ("checkpoint/_checkpoint.py", "checkpoint/_files.py", "checkpoint/_temporary.py", "checkpoint/_exchange.py")
CHANGING = ("checkpoint/_restore.py", "standins/_swap.py", "surgery/_record.py")


def whole(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that loading may change."""
    found = state(model)
    for name, module in model.named_modules():
        found[f"{name}!"] = type(module), sorted(module.__dict__)
    return found


def places(lines: int, count: int | None) -> list[int]:
    """Return every place to interrupt, or ``count`` of them, evenly spaced, and the last one."""
    step = 1 if count is None else max(1, lines // count)
    return sorted({*range(0, lines, step), lines - 1})


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("source", ["toy", "encoder"])
def test_load_changes_all_of_a_model_or_nothing(
    source: str, error: type[BaseException], tmp_path: Path, tell: Tell
) -> None:
    build: Callable[[], nn.Module] = Toy if source == "toy" else encoder
    folder = save(trained_toy(1), tmp_path / "m") if source == "toy" else DATA / "encoder"
    lines = count_lines(lambda: load(folder, build=build()), CHANGING)
    tell(interrupt_load(folder, build, error, places(lines, 80 if source == "toy" else 40), CHANGING))


def interrupt_load(
    folder: Path,
    build: Callable[[], nn.Module],
    error: type[BaseException],
    lines: list[int],
    parts: Sequence[str] = ("",),
) -> str:
    """Interrupt loading at each of these lines; the model is unchanged, or loaded if the last change was made."""
    loaded, finished = values(load(folder, build=build())), []
    for at in lines:
        model = build()
        before = whole(model)
        with pytest.raises(error), Interrupting(error, at, parts):
            load(folder, build=model)
        finished.append(whole(model) != before)
        assert not finished[-1] or values(model) == loaded, f"line {at}"
    assert (finished[0], finished[-1]) == (False, True)
    assert sum(finished) <= 8  # the last lines, in which nothing is left to do but to return
    return f"{len(finished)} interrupts, {len(finished) - sum(finished)} left the model unchanged, the others loaded it"


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("source", ["toy", "encoder"])
def test_load_at_every_line_of_the_library(source: str, error: type[BaseException], tmp_path: Path, tell: Tell) -> None:
    build: Callable[[], nn.Module] = Toy if source == "toy" else encoder
    folder = save(trained_toy(1), tmp_path / "m") if source == "toy" else DATA / "encoder"
    load(folder, build=build())  # fills the caches of functions, whose lines then run no more
    lines = count_lines(lambda: load(folder, build=build()))
    tell(interrupt_load(folder, build, error, places(lines, None)))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("atomic", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("count", [14, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*being overwritten")
def test_save_leaves_one_whole_model(
    error: type[BaseException],
    atomic: bool,
    count: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tell: Tell,
) -> None:
    if not atomic:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    path, old, new = tmp_path / "m", trained_toy(1), trained_toy(3)
    save(old, path)
    both = [values(load(save(model, path, overwrite=True), build=Toy)) for model in (old, new)]
    parts = WRITING if count is not None else ("",)
    lines = count_lines(lambda: save(new, path, overwrite=True), parts)
    seen = []
    for at in places(lines, count):
        save(old, path, overwrite=True)
        with pytest.raises(error), Interrupting(error, at, parts):
            save(new, path, overwrite=True)
        seen.append(both.index(values(load(path, build=Toy))))
        save(new, path, overwrite=True)
        assert names(tmp_path) == ["m"], f"line {at}"
    assert (seen[0], seen[-1]) == (0, 1)
    tell(f"{len(seen)} interrupts, {seen.count(0)} left the old model, {seen.count(1)} the new one")


WRITER = """
import sys
from pathlib import Path
from tests.support.models.toy import Toy
from tests.support.pruned_toy import trained_toy
from etp_graph.checkpoint import save
models, path, count = [trained_toy(1), trained_toy(3)], Path(sys.argv[1]), 0
while True:
    save(models[count % 2], path, overwrite=True)
    count += 1
    print(count, flush=True)
"""


def writer(path: Path) -> subprocess.Popen[str]:
    """Begin a process that overwrites a folder all the time; return when it has written it once."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_what_a_killed_process_left_is_removed(rounds: int, tmp_path: Path, tell: Tell) -> None:
    path = tmp_path / "m"
    for number in range(rounds):
        process = writer(path)
        time.sleep(0.01 * (number % 20))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert read_manifest(path).record.selections
        save(Toy(), path, overwrite=True)
        assert names(tmp_path) == ["m"]
    tell(f"{rounds} killed writers")


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("count", [30, pytest.param(1_000, marks=pytest.mark.slow)])
def test_a_reader_beside_a_writer_reads_whole_models(count: int, tmp_path: Path, tell: Tell) -> None:
    process = writer(tmp_path / "m")
    try:
        found = {len(read_manifest(tmp_path / "m").record.selections) for _ in range(count)}
        for _ in range(count):
            found.add(len(values(load(tmp_path / "m", build=Toy))))
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL  # it wrote until the end
    assert found >= {1, 3} or count < 1_000
    tell(f"{2 * count} reads beside a writer")


def test_two_renames_do_not_disturb_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is away for a moment where the system cannot exchange two folders."""
    path = save(trained_toy(1), tmp_path / "m")
    calls: list[int] = []

    def exists_late(at: os.PathLike[str]) -> bool:
        calls.append(1)
        if len(calls) == 1:
            path.rename(files.backup_of(path))
            return False
        if len(calls) == 2:
            files.backup_of(path).rename(path)
            return True
        return os.path.exists(at)  # noqa: PTH110

    monkeypatch.setattr(files.os.path, "lexists", exists_late)
    assert files.locate_folder(path) == path


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    """Names of living processes, of other machines and of other files stay."""
    ended = multiprocessing.get_context("spawn").Process(target=os.getpid)
    ended.start()
    ended.join()
    machine, living = _machine(), os.getppid()
    other = "00000000" if machine != "00000000" else "11111111"
    kept = [f".m.{machine}-{living}-0-aaaaaaaa.tmp", f".m.{other}-{ended.pid}-5-aaaaaaaa.tmp", ".m.notes.tmp",
            f".n.{machine}-{ended.pid}-5-aaaaaaaa.tmp", f".m.{machine}-{ended.pid}-5-aaaaaaaa.txt",
            ".m.0123456789abcdef.tmp"]  # fmt: skip
    gone = [f".m.{machine}-{ended.pid}-5-aaaaaaaa.tmp", f".m.{other}-{ended.pid}-5-bbbbbbbb.tmp"]
    for name in (*kept, *gone):
        (tmp_path / name).mkdir()
    long_ago = time.time() - 48 * 3600
    os.utime(tmp_path / gone[1], (long_ago, long_ago))
    with temporary_beside(tmp_path / "m") as mine:
        mine.mkdir()
        save(Toy(), tmp_path / "m")  # another thread of this process writes the same folder
        assert mine.exists()
    assert names(tmp_path) == sorted([*kept, "m"])


def test_files_beside_others_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for _ in range(2):
        save_into(trained_toy(1), tmp_path)
    assert names(tmp_path) == ["config.json", "manifest.json", "model.safetensors"]


@pytest.mark.parametrize("inner", [False, True], ids=["step", "model"])
def test_links_in_the_place_of_steps_are_not_followed(inner: bool, tmp_path: Path) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside"
    with pytest.raises(Power):
        run(toy(), Loop(2), folder)
    step = folder / "01-sparse-0"
    victim = step / "model" if inner else step
    victim.rename(outside)
    victim.symlink_to(outside)
    before = {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match=victim.name):
        run(toy(), Loop(), folder)
    (folder / JOURNAL_FILE).unlink()  # the run begins anew, and would write into the step
    with pytest.raises(CheckpointError):
        run(toy(), Loop(), folder)
    assert before == {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()}
