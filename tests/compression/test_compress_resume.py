"""An interrupted run, continued, equals a run without interruption, bit for bit; and no run continues another one."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from etp_graph import load, methods
from etp_graph.compression import CompressResult, Phase
from etp_graph.errors import CheckpointError
from etp_graph.surgery import SurgeryRecord, get_record
from tests.support.faults.interrupted import Loop, Power, facts, run, seed, toy
from tests.support.models.toy import Toy
from tests.support.pruned_toy import assert_same, state, values


@pytest.fixture(scope="module")
def whole() -> tuple[nn.Module, CompressResult, list[str]]:
    """A run without interruption and without a folder."""
    model, loop = toy(), Loop()
    seed()
    return model, run(model, loop, None), loop.calls


CALLS = [
    "evaluate",
    *(call for r in (0, 1) for call in (f"sparse {r}", "evaluate", "evaluate", f"finetune {r}", "evaluate")),
]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("fail_at", range(len(CALLS)))
def test_interrupted_anywhere_equals_uninterrupted(
    fail_at: int, late: bool, whole: tuple[nn.Module, CompressResult, list[str]], tmp_path: Path
) -> None:
    expected, result, calls = whole
    assert calls == CALLS
    first, second = Loop(fail_at, late=late), Loop()
    model = toy()
    seed()
    with pytest.raises(Power):
        run(model, first, tmp_path / "run")
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    model = toy()
    parameters = {name: id(p) for name, p in model.named_parameters()}
    if fail_at == 0:  # nothing was finished, so nothing is known of the generators
        seed()
    again = run(model, second, tmp_path / "run")
    assert first.calls[:-1] + second.calls == CALLS
    assert facts(again) == facts(result)
    assert values(model) == values(expected)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


@pytest.mark.parametrize("name", sorted(methods.METHODS.keys() - {"network-slimming"}))
def test_every_method_resumes_between_sparse_training_and_surgery(name: str, tmp_path: Path) -> None:
    method = replace(methods.get(name), min_units=None, max_ratio=None)  # the toy is too small for floors
    stop = 2 if method.sparse or method.collected else 1  # the evaluation before, or right after surgery
    expected = toy()
    seed()
    result = run(expected, Loop(), None, method=method, rounds=1)
    started = toy()
    seed()
    with pytest.raises(Power):
        run(started, Loop(stop), tmp_path, method=method, rounds=1)
    model = toy()
    again = run(model, Loop(), tmp_path, method=method, rounds=1)
    assert facts(again) == facts(result)
    assert values(model) == values(expected)


class Reordering(Loop):
    """Training after which other units are the important ones than when the optimizer was attached."""

    def train(self, model: nn.Module, phase: Phase) -> None:
        super().train(model, phase)
        if phase.name == "sparse":
            with torch.no_grad():
                for name, axis in (("conv1.weight", 0), ("conv2.weight", 1)):
                    norms = model.conv1.weight.flatten(1).norm(dim=1) if axis == 0 else torch.ones(8)
                    scale = torch.linspace(9, 1, 8)[norms.argsort(stable=True).argsort()]
                    model.get_parameter(name).mul_(scale.view([-1 if d == axis else 1 for d in range(4)]))


def test_the_distances_are_those_of_the_training_also_after_a_resume(tmp_path: Path) -> None:
    expected, started, model = toy(), toy(), toy()
    seed()
    result = run(expected, Reordering(), None, rounds=1)
    seed()
    with pytest.raises(Power):
        run(started, Reordering(2), tmp_path, rounds=1)
    assert facts(run(model, Reordering(), tmp_path, rounds=1)) == facts(result)
    assert values(model) == values(expected)


def test_a_finished_run_is_read_and_not_repeated(tmp_path: Path) -> None:
    seed()
    model = toy()
    result = run(model, Loop(), tmp_path)
    model.train()
    loop, other = Loop(0), toy()
    again = run(other, loop, tmp_path)
    assert loop.calls == []
    assert again.to_json() == result.to_json()
    assert_same(other, model)


def test_the_weights_of_every_step_are_ordinary_checkpoints(tmp_path: Path) -> None:
    seed()
    model = toy()
    run(model, Loop(), tmp_path)
    folders = sorted(path.parent for path in tmp_path.glob("*/model"))
    assert [f.name.split("-", 1)[1] for f in folders] == [
        f"{step}-{r}" for r in (0, 1) for step in ("sparse", "prune", "finetune")
    ]
    assert_same(load(folders[-1] / "model", build=Toy), model)
    assert len(get_record(load(folders[1] / "model", build=Toy)).selections) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"speed_up": 3}, "budget"), ({"method": "torque"}, r"method\.name"), ({"rounds": 1}, r"method\.rounds"),
    ],
)  # fmt: skip
def test_other_arguments_are_named(arguments: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(Power):
        run(toy(), Loop(3), tmp_path)
    model = toy()
    before = state(model)
    content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=words):
        run(model, Loop(), tmp_path, **arguments)
    assert state(model) == before
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == content


def test_other_weights_and_pruned_models_are_refused(tmp_path: Path) -> None:
    model = toy()
    with pytest.raises(Power):
        run(model, Loop(4), tmp_path)
    assert get_record(model) != SurgeryRecord()
    before = state(model)
    with pytest.raises(CheckpointError, match="pruned before"):
        run(model, Loop(), tmp_path)
    assert state(model) == before
    model = toy()
    with torch.no_grad():
        model.conv2.bias[0] += 1e-6
    with pytest.raises(CheckpointError, match="weights of the dense model"):
        run(model, Loop(), tmp_path)
