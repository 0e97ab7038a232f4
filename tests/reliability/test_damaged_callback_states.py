"""States of callbacks that are damaged or mixed: one documented error before the model changes, or the true state."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import etp_graph as etp
from etp_graph.integrations._state import STATE_FILE, read_state, write_state
from tests.support.faults.injected_faults import describe
from tests.support.models.toy import Toy, toy_plan

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from etp_graph.integrations.transformers import PruningCallback  # noqa: E402

X = torch.randn(1, 3, 8, 8)
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 10**30, 1.5, "", "0" * 64, "x" * 5000, [], {}, [[]], {"a": 1}, {"settings": {}}, float("nan"),
)  # fmt: skip


def dense() -> Toy:
    torch.manual_seed(0)
    return Toy()


def callback() -> PruningCallback:
    return PruningCallback(X, speed_up=2, prune_at=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint from before surgery and one from after it, as the callback writes them."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("before", "after")}
    plan, model = toy_plan(), dense()
    force = etp.Regularizer(model, plan).state_dict()
    write_state({"format": 1, "begun": 0, "cut": "", "regularizer": force}, made["before"])
    etp.prune_(model, plan, etp.Selection({"conv1": torch.arange(8) < 5, "conv2": torch.arange(6) < 4}))  # type: ignore[dict-item]
    etp.checkpoint.save_into(model, made["after"])
    write_state({"format": 1, "begun": 0, "cut": plan.fingerprint, "regularizer": None}, made["after"])
    return made


def copied(folder: Path, to: Path) -> Path:
    to.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def resume(folder: Path, sound: dict[str, Any]) -> bool:
    """Resume from a folder. Return whether it was accepted; assert that nothing changed otherwise."""
    model, pruning = dense(), callback()
    before = describe(model)
    said = None
    try:
        pruning.resume(model, folder)
    except etp.CheckpointError as error:
        said = str(error)
    if said is not None:
        assert len(said) < 2000
        assert describe(model) == before
        assert not pruning.resumed
        return False
    assert pruning._saved is not None
    assert str(pruning._saved) == str(sound)
    return True


def test_sound_states_are_resumed(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        assert resume(folder, read_state(folder))


@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["before", "after"])
def test_flipped_bits(name: str, count: int, folders: dict[str, Path], tmp_path: Path) -> None:
    source, sound = random.Random(count), read_state(folders[name])
    content = (folders[name] / STATE_FILE).read_bytes()
    folder, accepted = copied(folders[name], tmp_path / "run"), 0
    for _ in range(count):
        changed = bytearray(content)
        changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
        (folder / STATE_FILE).write_bytes(changed)
        accepted += resume(folder, sound)
    assert accepted < count / 20, "a flipped bit of a space in the header may change nothing"


@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["before", "after"])
def test_changed_values(name: str, count: int, folders: dict[str, Path], tmp_path: Path) -> None:
    """Without a digest, as version 0.1.0 wrote them."""
    source = random.Random(count)
    with safe_open(folders[name] / STATE_FILE, framework="pt") as stream:
        text = json.loads(stream.metadata()["etp_graph"])
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    folder = copied(folders[name], tmp_path / "run")
    for _ in range(count):
        state, held = copy.deepcopy(text), dict(tensors)
        place = state if source.random() < 0.7 or not isinstance(state["regularizer"], dict) else state["regularizer"]
        key = source.choice([*place, "more"])
        if source.random() < 0.3:
            place.pop(key, None)
        else:
            place[key] = source.choice(VALUES)
        if held and source.random() < 0.3:
            held[source.choice(list(held))] = torch.zeros(source.randrange(30))
        save_file(held, folder / STATE_FILE, metadata={"etp_graph": json.dumps(state)})
        try:
            sound = read_state(folder)
        except etp.CheckpointError:
            sound = {}
        resume(folder, sound)


def test_files_of_two_checkpoints_are_not_mixed(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["after"], tmp_path / "mixed")
    write_state({"format": 1, "begun": 0, "cut": "ab" * 32, "regularizer": None}, folder)
    assert not resume(folder, {})
    (folder / "manifest.json").unlink()
    write_state(read_state(folders["after"]), folder)
    assert not resume(folder, {})


def test_a_file_that_no_state_can_fill_is_refused_before_it_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["before"], tmp_path / "large")
    with (folder / STATE_FILE).open("r+b") as stream:
        stream.truncate(2**41)  # a hole, which takes no space on the disk
    with pytest.raises(etp.CheckpointError, match="2199023255552 bytes where at most"):
        read_state(folder)


def test_a_resume_that_is_refused_leaves_a_linear_model_alone(folders: dict[str, Path]) -> None:
    model = nn.Linear(3, 3)
    before = describe(model)
    with pytest.raises(etp.CheckpointError):
        callback().resume(model, folders["after"])
    assert describe(model) == before
