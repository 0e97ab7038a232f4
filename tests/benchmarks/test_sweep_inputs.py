"""Small configurations of transformers that keep every part, and inputs that run every part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.coverage.measure import measure
from benchmarks.coverage.sources import Case
from benchmarks.coverage.sources._common import first_that_runs, share_run
from benchmarks.coverage.sources._transformers import build
from benchmarks.coverage.sources._transformers_seams import _at_depth
from benchmarks.coverage.sources._transformers_sizes import shrunken
from benchmarks.coverage.sweep_page import write_sweep_page

_MULTIMODAL = (
    "gemma3", "vipllava", "llava_next", "mllama", "paddleocr_vl", "lfm2_vl", "kosmos-2.5", "molmo2", "kimi_k25", "aria",
    "deepseek_vl_hybrid", "qwen3_vl", "qwen2_5_vl", "muse_glimmer", "minicpmv4_6", "unlimited_ocr", "inkling2", "flava",
    "voxtral", "granite_speech", "qwen2_audio", "phi4_multimodal", "video_llava", "t5gemma2", "evolla", "luke",
    "instructblip", "blip-2", "got_ocr2", "internvl", "idefics3", "aya_vision", "smolvlm", "llava",
)  # fmt: skip


@pytest.mark.parametrize("name", _MULTIMODAL)
def test_inputs_run_every_part(name: str) -> None:
    pytest.importorskip("transformers")
    model, inputs = build(name)
    assert share_run(model, inputs) > 0.9
    assert sum(p.numel() for p in model.parameters()) < 2_000_000


@pytest.mark.parametrize("name", ["vipllava", "voxtral", "video_llava"])
def test_towers_are_pruned_and_the_plan_is_exact(name: str) -> None:
    pytest.importorskip("transformers")
    line = measure(Case(source="transformers", name=name, family="none"))
    assert line["outcome"] == "exact"
    assert line["not_run"] < 0.05
    assert line["in_no_group"] < 0.05
    assert line["prunable"] > 0.5


class _TwoTowers(nn.Module):
    """Add what a tower makes of an image to what another one makes of text; either may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image, self.attention = nn.Linear(4, 4), nn.Linear(4, 4), nn.MultiheadAttention(4, 2)

    def forward(self, text: Tensor, image: Tensor | None = None) -> Tensor:
        x: Tensor = self.text(text)
        return x if image is None else x + self.attention(self.image(image), x, x)[0]


def test_the_share_that_runs_counts_what_a_module_does_itself() -> None:
    model, x = _TwoTowers().eval(), torch.ones(3, 4)
    whole = sum(p.numel() for p in model.parameters())
    assert share_run(model, {"text": x}) == pytest.approx(20 / whole)
    assert share_run(model, {"text": x, "image": x}) == 1  # the output projection is a child that is not called


def test_inputs_that_run_more_parts_are_preferred() -> None:
    x = torch.ones(3, 4)
    _, inputs = first_that_runs([_TwoTowers], lambda model: [{"text": x}, {"text": x, "image": x}, {"image": x}])
    assert set(inputs) == {"text", "image"}
    _, inputs = first_that_runs([_TwoTowers], lambda model: [{"text": x}, {"text": x + 1}])
    assert inputs["text"].equal(x)


def test_the_page_names_what_the_inputs_do_not_run(tmp_path: Path) -> None:
    line = {"key": "smp:A", "family": "smp", "seconds": 1.0, "outcome": "exact", "trace_seconds": 0.5, "groups": 1}
    line |= {"prunable": 0.2, "in_no_group": 0.75, "not_run": 0.7, "locked": {"feeds the model's output": 0.05}}
    write_sweep_page([line, {**line, "key": "smp:B", "not_run": 0.0}], tmp_path / "page.md")
    rows = (tmp_path / "page.md").read_text(encoding="utf8").splitlines()
    assert "| in modules that these inputs do not run | 1 | 35.0% |" in rows
    assert "| in no group | 2 | 40.0% |" in rows  # 5 % of A, 75 % of B
    assert [row for row in rows if row.startswith("| smp:A |") and "70% in modules that these inputs do not run" in row]


@pytest.mark.parametrize(("before", "now"), [(24, 2), (24, 3), (6, 2), (4, 4)])
def test_layers_of_a_short_tower_keep_their_depth(before: int, now: int) -> None:
    found = [_at_depth(number, before, now) for number in range(1, before + 1)]
    assert found == sorted(found)
    assert {found[0], found[-1]} == {1, now}
    states = range(now + 1)
    assert [states[_at_depth(number - before - 1, before, now)] for number in range(1, before + 1)] == found


def test_parts_keep_what_is_not_a_size() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlavaOnevisionConfig()
    assert config.vision_config.vision_use_head is False
    small = shrunken(config, "parts")
    assert small.vision_config.vision_use_head is False
    assert small.vision_config.num_hidden_layers == 2
    assert all(side % small.vision_config.image_size == 0 for size in small.image_grid_pinpoints for side in size)
