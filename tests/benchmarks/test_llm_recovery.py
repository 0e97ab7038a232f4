"""Training of a pruned language model: every way trains, the rate is chosen by validation, and a series continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common.records import read_records
from benchmarks.llm import recovery, texts
from benchmarks.llm.training import RECOVERIES

VOCABULARY = 64


def tokenize(text: str, **options: Any) -> dict[str, Tensor]:
    """One token for each character."""
    return {"input_ids": torch.tensor([[ord(c) % VOCABULARY for c in text]])}


def build() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(chr(33 + (i * i + i // 7) % 60) for i in range(4000))
    monkeypatch.setattr(texts, "read_text", lambda part: text)
    monkeypatch.setattr(texts, "LENGTH", 16)
    monkeypatch.setattr(recovery, "load_smollm2", lambda: (build(), tokenize))
    monkeypatch.setattr(recovery, "TUNING_STEPS", 2)


def start(folder: Path, *words: str) -> list[dict[str, Any]]:
    recovery.main([*words, "--results", str(folder / "lines.jsonl"), "--out", str(folder / "page.md")])
    return read_records(folder / "lines.jsonl")


def test_every_way_trains_a_model_of_the_right_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    records = start(tmp_path, "--steps", "8", "--share", "0.7")
    rows = [one for one in records if "how" in one["config"]]
    assert [(one["config"]["method"], one["config"]["how"]) for one in rows] == list(recovery.RUNS)
    target = recovery.units_target(build(), 0.7)
    for one in rows:
        how = one["config"]["how"]
        tuned = [line for line in records if line["config"].get("tuned") == how]
        tried = {line["config"]["rate"]: line["valid"] for line in tuned}
        assert set(tried) == set(RECOVERIES[how].rates)
        assert one["rate"] == min(tried, key=tried.__getitem__)
        if one["before"] is None or one["config"]["method"] != "dense":
            assert one["params"] <= target + 32 * 4  # flap adds biases
        if one["before"] is not None:
            assert one["perplexity"]["ptb"] < one["before"]["ptb"]
    page = (tmp_path / "page.md").read_text(encoding="utf8")
    assert all(f"`{how}`" in page for how in RECOVERIES)
    monkeypatch.setattr(recovery, "load_smollm2", lambda: pytest.fail("nothing is missing"))
    start(tmp_path, "--steps", "8", "--share", "0.7")
    assert (tmp_path / "page.md").read_text(encoding="utf8") == page
