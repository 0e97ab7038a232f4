"""The folder of a run: what is in it, what damage it notices, and the states of the random number generators."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from etp_graph import trace
from etp_graph.compression import JOURNAL_FILE
from etp_graph.compression._journal import weights_digest
from etp_graph.errors import CheckpointError
from etp_graph.model import RNG, capture_rng, restore_rng_
from tests.support.faults.interrupted import Loop, Power, X, facts, run, seed, toy
from tests.support.faults.journals import read_body, write_body
from tests.support.models.toy import toy_plan
from tests.support.pruned_toy import state, values


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        run(toy(), Loop(), tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        run(toy(), Loop(), tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "damage",
    ["", "[]", "{}", "null", '{"format": 2, "arguments": {}, "steps": []}',
     '{"format": 1, "arguments": {}, "steps": [{"step": "00-../../x", "weights": true}]}',
     '{"format": 1, "arguments": {}, "steps": [{"step": "01-sparse-0", "weights": true}]}',
     '{"format": 1, "arguments": {}, "steps": [3]}'],
)  # fmt: skip
def test_a_damaged_journal_is_refused(damage: str, tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).write_text(damage)
    model = toy()
    before = state(model)
    with pytest.raises(CheckpointError, match=JOURNAL_FILE):
        run(model, Loop(), tmp_path)
    assert state(model) == before


@pytest.mark.parametrize("victim", ["model/model.safetensors", "model/manifest.json", "state.safetensors"])
@pytest.mark.parametrize("gone", [True, False])
def test_damaged_steps_are_refused_and_change_nothing(victim: str, gone: bool, tmp_path: Path) -> None:
    with pytest.raises(Power):
        run(toy(), Loop(2), tmp_path)  # the step finished last is the sparse training
    file = tmp_path / "01-sparse-0" / victim
    if gone:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-7])
    model = toy()
    before = state(model)
    with pytest.raises(CheckpointError):
        run(model, Loop(), tmp_path)
    assert state(model) == before


def test_a_step_that_was_not_written_down_is_done_again(tmp_path: Path) -> None:
    seed()
    with pytest.raises(Power):
        run(toy(), Loop(2), tmp_path)
    early = (tmp_path / JOURNAL_FILE).read_bytes()
    model = toy()
    result = run(model, Loop(), tmp_path)
    (tmp_path / JOURNAL_FILE).write_bytes(early)  # as if the machine had died after the files, before the journal
    other = toy()
    assert facts(run(other, Loop(), tmp_path)) == facts(result)
    assert values(other) == values(model)


def test_a_first_step_that_died_does_not_block_its_folder(tmp_path: Path) -> None:
    (tmp_path / "00-evaluate-dense-0").mkdir()
    (tmp_path / "00-evaluate-dense-0" / "state.safetensors").write_bytes(b"half")
    run(toy(), Loop(), tmp_path)
    shutil.rmtree(tmp_path / "00-evaluate-dense-0")
    run(toy(), Loop(0), tmp_path)  # only the last step's state is needed


def test_a_given_plan_and_a_traced_one_are_told_apart_by_their_fingerprint(tmp_path: Path) -> None:
    seed()
    plan = trace(toy(), X[:1])
    with pytest.raises(Power):
        run(toy(), Loop(3), tmp_path)
    run(toy(), Loop(), tmp_path, plan=plan)  # the same plan: goes on
    with pytest.raises(CheckpointError, match="plan"):
        run(toy(), Loop(), tmp_path, plan=toy_plan().lock({"conv2": "mine"}))


def draw() -> list[float]:
    numpy = [float(np.random.normal()), float(np.random.normal())]  # noqa: NPY002
    return [*torch.rand(3).tolist(), random.random(), random.gauss(0, 1), *numpy]


def prefixed(states: dict[str, Tensor]) -> dict[str, Tensor]:
    return {RNG + name: value for name, value in states.items()}


@pytest.mark.parametrize("warm", [0, 1])
def test_generators_continue_where_they_were(warm: int) -> None:
    seed()
    for _ in range(warm):
        random.gauss(0, 1)  # leaves a second value waiting
        np.random.normal()  # noqa: NPY002
    states = capture_rng()
    expected = [draw(), draw()]
    restore_rng_(prefixed(states))
    assert [draw(), draw()] == expected


@pytest.mark.parametrize("name", ["torch", "python", "numpy"])
def test_damaged_generator_states_are_refused(name: str, tmp_path: Path) -> None:
    states = capture_rng()
    with pytest.raises(CheckpointError, match="generators"):
        restore_rng_(prefixed({**states, name: states[name][:-3]}))
    restore_rng_(prefixed(states))


def test_the_digest_sees_every_value_and_every_tie() -> None:
    model = toy()
    digest = weights_digest(model)
    assert weights_digest(toy()) == digest
    model.norm.running_mean[3] += 1
    assert weights_digest(model) != digest
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].load_state_dict(tied[0].state_dict())
    before = weights_digest(tied)
    tied[1].weight = tied[0].weight
    assert weights_digest(tied) != before


def test_tensors_without_a_generator_state_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Power):
        run(toy(), Loop(2), tmp_path)
    save_file({"distance": torch.zeros(3)}, tmp_path / "01-sparse-0" / "state.safetensors")
    write_body(tmp_path, read_body(tmp_path), files=False)
    with pytest.raises(CheckpointError, match="generators"):
        run(toy(), Loop(), tmp_path)
