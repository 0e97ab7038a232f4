"""The SHA-256 of the files of a sharded checkpoint: what is refused, and that folders of version 0.1.0 load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from etp_graph import fsdp
from etp_graph.checkpoint import MANIFEST_FILE, sealed
from etp_graph.errors import CheckpointError, PlanError
from etp_graph.fsdp._sums import INDEX, SUMS_FILE
from tests.support import sharded

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with sharded.alone():
        yield fsdp.save(sharded.pruned(), tmp_path_factory.mktemp("sums") / "m")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "m"))


def test_a_folder_of_before_without_sums_loads(folder: Path, copied: Path) -> None:
    body = json.loads((copied / MANIFEST_FILE).read_text())
    del body["digest"]
    body["weights"]["sha256"] = "0" * 64
    (copied / MANIFEST_FILE).write_text(json.dumps(sealed(body)))
    (copied / SUMS_FILE).unlink()
    found, want = sharded.load(copied), sharded.load(folder)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
    (copied / INDEX).write_bytes((copied / INDEX).read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=str(copied)):
        sharded.load(copied)


def test_files_that_are_gone_added_exchanged_or_links_are_refused(copied: Path) -> None:
    data = next(file for file in copied.iterdir() if file.suffix == ".distcp")
    for file in (copied / SUMS_FILE, data, copied / INDEX):
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(CheckpointError, match=str(copied)):
            sharded.load(copied)
        (copied.parent / "elsewhere").write_bytes(content)
        file.symlink_to(copied.parent / "elsewhere")
        with pytest.raises(CheckpointError, match=str(copied)):
            sharded.load(copied)
        file.unlink()
        file.write_bytes(content)
    (copied / "__7_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="__7_0"):
        sharded.load(copied)
    (copied / "__7_0.distcp").unlink()
    (copied / "notes.txt").write_text("mine")
    assert sharded.load(copied)


def test_the_state_of_an_optimizer_is_checked_too(tmp_path: Path, folder: Path) -> None:
    model = fsdp.load(folder, build=sharded.cnn, shard=sharded.shard)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2, 8, 8)).sum().backward()
    optimizer.step()
    saved = fsdp.save(model, tmp_path / "m", optimizer=optimizer)
    fsdp.load_optimizer_(model, optimizer, saved)
    data = next(file for file in saved.iterdir() if file.suffix == ".distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    with pytest.raises((CheckpointError, PlanError), match=r"\.distcp"):
        fsdp.load_optimizer_(model, optimizer, saved)
