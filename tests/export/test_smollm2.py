"""A real language model, pruned and exported, computes the same in a process that cannot import this library."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.serving import worker
from benchmarks.serving.folders import Folders, Setting, differences
from benchmarks.serving.run import run_engine
from etp_graph.demo.zoo.data import data_root

pytest.importorskip("gguf")


@pytest.mark.slow
def test_smollm2_at_two_sizes(tmp_path: Path) -> None:
    text = data_root() / "ptb" / "ptb.test.txt"
    if not text.is_file():
        pytest.skip("no Penn Treebank")
    folders = Folders(tmp_path, text.read_text(encoding="utf8")[:60_000], prompts=2, tokens=8, round_to=32)
    for share, way in ((0.8, "width"), (0.8, "depth"), (0.6, "both")):
        folder = folders.make(Setting(share=share, way=way))
        task = worker.Task(
            engine="transformers", folders=[str(folder)], text=str(text), prompts=2, tokens=8, rounds=0, timed=1,
            sites=[],
        )  # fmt: skip
        found = run_engine(task)
        assert found["class"] == "LlamaForCausalLM"
        assert 0.95 * share < found["parameters"] / 134_515_008 <= share
        assert differences(folder, found["tokens"]) == []
