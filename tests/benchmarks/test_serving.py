"""The record of serving: engines in processes without the library, other tokens with their reason, speed in turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import etp_graph as etp
from benchmarks.serving import worker
from benchmarks.serving.folders import DENSE, Setting, differences, settings
from benchmarks.serving.page import page
from benchmarks.serving.run import run_engine

PROMPTS, TOKENS = 3, 6
LINE = "w1 w2 w3 w5 w8 w13 w21 w34 w5 w9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned Llama as a plain folder, and what it writes in this process beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(64, (4, 16)), "use_cache": False} for _ in range(2)]
    etp.oneshot_(model, batches, budget=etp.Budget(params=0.8, uniform=True), progress=False)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    place = tmp_path_factory.mktemp("served")
    etp.export.huggingface(model, place / "model", tokenizer)
    (place / "text.txt").write_text("\n".join([LINE, "short", LINE[::-1].replace("w", " w"), LINE, LINE, *[LINE] * 9]))
    starts = worker.prompts_of(tokenizer, (place / "text.txt").read_text(), PROMPTS)
    tokens = worker.continue_greedily(model, starts, TOKENS)
    (place / "tokens.json").write_text(json.dumps({"prompts": starts, "tokens": tokens}))
    return place / "model"


def test_an_engine_without_the_library_writes_the_same_tokens(folder: Path) -> None:
    task = worker.Task(
        engine="transformers", folders=[str(folder), str(folder)], text=str(folder.parent / "text.txt"),
        prompts=PROMPTS, tokens=TOKENS, rounds=2, timed=2, sites=[],
    )  # fmt: skip
    found = run_engine(task)
    assert found["class"] == "LlamaForCausalLM"
    assert differences(folder, found["tokens"]) == []
    assert [len(turn) for turn in found["seconds"]] == [2, 2]


def test_an_engine_that_fails_says_why(folder: Path) -> None:
    task = worker.Task(
        engine="llama.cpp", folders=[str(folder)], text=str(folder.parent / "text.txt"), prompts=1, tokens=1, rounds=0,
        timed=1, sites=["/nowhere"],
    )  # fmt: skip
    assert "Error" in run_engine(task)["error"]


def test_other_tokens_are_told_from_ties(folder: Path) -> None:
    held = json.loads((folder.parent / "tokens.json").read_text())
    changed = [list(tokens) for tokens in held["tokens"]]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*held["prompts"][1], *changed[1][:3]]])).logits[0, -1]
    changed[1][3] = int(logits.argmin())
    (one,) = differences(folder, changed)
    assert (one["prompt"], one["place"]) == (1, 3)
    assert one["gap"] == pytest.approx(float(logits.max() - logits.min()))
    assert one["gap"] > 1e3 * one["rounding"] > 0


def test_settings_begin_with_the_dense_model() -> None:
    names = [setting.name for setting in settings([0.8], ["width", "both"])]
    assert names == [DENSE, "width-0.8", "both-0.8"]


def test_the_page_divides_turn_by_turn() -> None:
    def line(setting: Setting, **more: Any) -> dict[str, Any]:
        sizes = {"num_hidden_layers": 2, "intermediate_size": 40, "num_attention_heads": 6}
        counts = {"prompts": 20, "tokens": 64, "rounds": 3, "timed": 8}
        given = {"share": setting.share, "way": setting.way}
        return {"setting": given, "engine": "llama.cpp", "version": "1", "differences": [], **sizes, **counts, **more}

    other = {"prompt": 3, "place": 4, "tokens": [1, 2], "gap": 1e-6, "rounding": 2e-5}
    seconds = [[2.0, 1.0], [30.0, 10.0], [4.0, 1.0]]  # the machine was busy in the second turn
    records = [
        line(Setting(share=1.0, way=DENSE)),
        line(Setting(share=0.8, way="width"), error="of an earlier run"),
        line(Setting(share=0.8, way="width"), seconds=seconds, differences=[other]),
    ]
    text = page(records)
    assert "| 20% by width | llama.cpp 1 | 19 of 20 | 3.00 (2.00 to 4.00) |" in text
    assert "| 20% by width | llama.cpp | 5 | 1.0e-06 | 2.0e-05 |" in text
    assert "earlier" not in text
    assert "None: every engine" in page(records[:1])
