"""A run that is killed at any moment goes on to the same weights; a full disk and NaN leave what was there."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from etp_graph.compression import Phase
from etp_graph.errors import CheckpointError, EtpError
from etp_graph.integrations._state import write_state
from tests.support.faults.interrupted import Loop, facts, run, seed, toy
from tests.support.faults.killed_runs import compressed, trained
from tests.support.pruned_toy import values

_LIMIT = 120.0
Work = Callable[[Path], None]


def start(work: Work, folder: Path) -> Any:
    """A process that has begun to work: the moment from which its time is counted."""
    method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
    context = mp.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["transformers.trainer", "torch._dynamo", "killed"])
    folder.mkdir(exist_ok=True)
    (folder / "began").unlink(missing_ok=True)
    process = context.Process(target=work, args=(folder,))
    process.start()
    wait(lambda: (folder / "began").exists() or process.exitcode is not None)
    return process


def wait(done: Callable[[], bool]) -> float:
    began = time.monotonic()
    while not done():
        assert time.monotonic() < began + _LIMIT, "a process stands still"
        time.sleep(0.002)
    return time.monotonic() - began


def finish(work: Work, folder: Path) -> tuple[dict[str, Tensor], float]:
    """The weights of a run that nobody disturbs, and the seconds that it took."""
    process = start(work, folder)
    seconds = wait(lambda: process.exitcode is not None)
    assert process.exitcode == 0
    return torch.load(folder / "weights.pt", weights_only=True), seconds


Sleep = Callable[[Path, Any, float], None]
"""Waits until a process that works in a folder shall be killed; it is given the seconds of an undisturbed run."""


def survive(work: Work, folder: Path, kills: int, sleep: Sleep) -> None:
    """Kill one run after the other, let it go on, and compare bit for bit."""
    finish(work, folder / "warm")  # the first process imports what the others find
    expected, seconds = finish(work, folder / "whole")
    alive = 0
    for number in range(kills):
        home = folder / str(number)
        process = start(work, home)
        sleep(home, process, seconds)
        alive += process.exitcode is None
        process.kill()  # kill -9
        process.join()
        found, _ = finish(work, home)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), f"kill {number}"
    assert alive >= kills / 2


def test_compress_survives_two_kills(tmp_path: Path) -> None:
    steps = iter((2, 9))

    def until_steps_are_stored(home: Path, process: Any, seconds: float) -> None:
        least = next(steps)
        wait(lambda: len(list((home / "run").glob("*-*"))) >= least or process.exitcode is not None)

    survive(compressed, tmp_path, 2, until_steps_are_stored)


@pytest.mark.slow
@pytest.mark.parametrize("work", [compressed, trained], ids=["compress", "trainer"])
def test_kills_at_twenty_random_moments(work: Work, tmp_path: Path) -> None:
    if work is trained:
        pytest.importorskip("accelerate")
    generator = random.Random(0)
    survive(work, tmp_path, 20, lambda home, process, seconds: time.sleep(generator.uniform(0, 0.9 * seconds)))


@pytest.mark.parametrize(("code", "word"), [(errno.ENOSPC, "No space"), (errno.EROFS, "Read-only")])
@pytest.mark.parametrize("good", [0, 3, 11])
def test_a_disk_that_takes_no_more_is_an_error_and_the_run_goes_on(
    code: int, word: str, good: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = toy()
    seed()
    result = run(expected, Loop(), None)
    calls, fsync = 0, os.fsync

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > good:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    model = toy()
    seed()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(CheckpointError, match=word):
            run(model, Loop(), tmp_path / "run")
    model = toy()
    if good < 4:  # nothing was finished
        seed()
    assert facts(run(model, Loop(), tmp_path / "run")) == facts(result)
    assert values(model) == values(expected)


def test_a_folder_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, *args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    loop = Loop()
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(CheckpointError, match="Read-only"):
        run(toy(), loop, tmp_path / "run")
    assert loop.calls == []
    state = {"regularizer": None, "format": 1}
    with pytest.raises(CheckpointError, match="Check space"):
        write_state(state, tmp_path / "missing")


class Diverging(Loop):
    """A training whose loss is NaN in one of its calls."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def train(self, model: nn.Module, phase: Phase) -> None:
        super().train(model, phase)
        if len(self.calls) - 1 == self.at:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            (next(model.parameters()).sum() * torch.nan).backward()
            optimizer.step()


@pytest.mark.parametrize("at", [1, 4])
def test_a_nan_loss_is_not_written_down_and_the_run_goes_on(at: int, tmp_path: Path) -> None:
    expected = toy()
    seed()
    result = run(expected, Loop(), None)
    model = toy()
    seed()
    with pytest.raises(EtpError, match=r"NaN or infinite values in 'conv1\.weight'"):
        run(model, Diverging(at), tmp_path / "run")
    model = toy()
    assert facts(run(model, Loop(), tmp_path / "run")) == facts(result)
    assert values(model) == values(expected)
