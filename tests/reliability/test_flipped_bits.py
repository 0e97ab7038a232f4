"""One flipped bit anywhere in a file that is read back is one documented error, or changes nothing that counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from etp_graph import fsdp
from etp_graph.checkpoint import load, save
from etp_graph.compression import JOURNAL_FILE, compress
from etp_graph.errors import CheckpointError
from etp_graph.integrations._state import read_state, write_state
from etp_graph.regularizer import Regularizer
from etp_graph.report import page
from etp_graph.report._story import read_report_data
from tests.support import sharded
from tests.support.faults.damage import each_flip, regions
from tests.support.faults.interrupted import ROUNDS, Loop, Power, X, facts, run, seed, toy
from tests.support.models.toy import Toy, toy_plan
from tests.support.pruned_toy import state, trained_toy, values

FEW, MANY = 30, 2_000
"""Bits that are flipped in each file, by default and in the slow tests."""

COUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]


Tell = Callable[[str], None]


def refused_or_equal(
    files: list[Path], count: int, read: Callable[[], object], tell: Tell
) -> dict[str, tuple[int, int]]:
    """Read after each flip; return for each file how many were refused, and how many changed nothing."""
    want = read()
    outcome: dict[str, tuple[int, int]] = {}
    for file in files:
        refused = equal = 0
        for bit in each_flip(file, count):
            found, error = attempt(read)
            if error:
                assert str(file.parent) in error, f"bit {bit} of {file.name}: {error}"
                assert len(error) < 2000
                refused += 1
            else:
                assert found == want, f"bit {bit} of {file.name} was accepted"
                equal += 1
        before = outcome.get(file.name, (0, 0))
        outcome[file.name] = before[0] + refused, before[1] + equal
    refused, equal = (sum(numbers) for numbers in zip(*outcome.values()))
    tell(f"{refused + equal} flipped bits, {refused} refused, {equal} changed nothing")
    return outcome


def attempt(read: Callable[[], object]) -> tuple[object, str]:
    """Return what a function returns, and an empty text; or ``None`` and the text of its documented error."""
    try:
        return read(), ""
    except CheckpointError as error:
        return None, str(error)


def test_every_region_of_a_file_is_reached() -> None:
    assert regions(3, 24) == regions(3, 100) == list(range(24))
    bits = regions(1000, 60)
    assert {bit % 8 for bit in bits} == set(range(8))
    assert max(b - a for a, b in pairwise([0, *bits, 8000])) <= 8 * 1000 // 60 + 16


@pytest.mark.parametrize("count", COUNTS)
def test_a_saved_model(count: int, tmp_path: Path, tell: Tell) -> None:
    folder = save(trained_toy(1), tmp_path / "m")

    def read() -> object:
        model = Toy()
        before = state(model)
        try:
            return values(load(folder, build=model))
        except CheckpointError:
            assert state(model) == before
            raise

    found = refused_or_equal(sorted(folder.iterdir()), count, read, tell)
    assert found["model.safetensors"][1] == 0


@pytest.fixture(scope="module")
def half_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died in the second round."""
    folder = tmp_path_factory.mktemp("half") / "run"
    seed()
    with pytest.raises(Power):
        run(toy(), Loop(8), folder)
    return folder


def went_on(folder: Path) -> Any:
    """What the first new step of a run sees: the weights and the generators."""
    model, seen = toy(), []

    class Seen(Exception):
        pass

    def train(network: torch.nn.Module, phase: object) -> None:
        seen.append((values(network), torch.rand(3).tolist()))
        raise Seen

    def evaluate(network: torch.nn.Module) -> float:
        train(network, None)
        return 0.0

    before = state(model)
    try:
        compress(model, X[:1], train=train, evaluate=evaluate, checkpoint=folder, speed_up=2.5, schedule=ROUNDS)
    except Seen:
        return seen
    except CheckpointError:
        assert state(model) == before
        raise
    raise AssertionError("the run is finished")


@pytest.mark.parametrize("count", [2, pytest.param(150, marks=pytest.mark.slow)])
def test_a_run_that_goes_on(count: int, half_run: Path, tell: Tell) -> None:
    steps = json.loads((half_run / JOURNAL_FILE).read_text())["steps"]
    last = half_run / steps[-1]["step"]
    weights = half_run / next(step["step"] for step in reversed(steps) if step["weights"])
    files = [half_run / JOURNAL_FILE, last / "state.safetensors", *sorted((weights / "model").iterdir())]
    found = refused_or_equal(files, count, lambda: went_on(half_run), tell)
    assert all(equal == 0 for name, (_, equal) in found.items() if name != JOURNAL_FILE)  # 1e5 and 1E5 are equal


@pytest.mark.parametrize("count", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_the_report_of_a_run(count: int, half_run: Path, tell: Tell) -> None:
    files = [file for file in sorted(half_run.rglob("*")) if file.is_file()]
    title = page(read_report_data(half_run))
    assert "<html" in title
    refused_or_equal(files, count, lambda: page(read_report_data(half_run)), tell)


@pytest.fixture
def one_rank() -> Iterator[None]:
    with sharded.alone():
        yield


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("count", [8, pytest.param(500, marks=pytest.mark.slow)])
def test_a_sharded_model(count: int, tmp_path: Path, tell: Tell) -> None:
    folder = fsdp.save(sharded.pruned(), tmp_path / "m")

    def read() -> object:
        return {name: value.tolist() for name, value in sharded.load(folder).items()}

    assert all(equal == 0 for _, equal in refused_or_equal(sorted(folder.iterdir()), count, read, tell).values())


def test_a_finished_run_gives_the_same_result_or_none(half_run: Path) -> None:
    """An altered metric in the journal is never returned."""
    journal = half_run / JOURNAL_FILE
    text = journal.read_text()
    metric = json.loads(text)["steps"][0]["metric"]
    for other in (repr(metric + 1), "NaN", "1e999", "-Infinity", "true", '"x"'):
        journal.write_text(text.replace(repr(metric), other, 1))
        with pytest.raises(CheckpointError, match=JOURNAL_FILE):
            run(toy(), Loop(), half_run)
    journal.write_text(text)
    assert facts(run(toy(), Loop(), half_run))["metric_dense"] == metric


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_the_state_of_a_callback(count: int, tmp_path: Path, tell: Tell) -> None:
    model, plan = toy(), toy_plan()
    force = Regularizer(model, plan, beta=0.1, order="random").state_dict()
    write_state({"format": 1, "begun": 0, "cut": "", "regularizer": force}, tmp_path)

    def read() -> object:
        found = read_state(tmp_path)
        found["regularizer"] = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in found["regularizer"].items()}
        return found

    found = refused_or_equal(list(tmp_path.iterdir()), count, read, tell)
    assert sum(refused for refused, _ in found.values()) > count * 0.9
