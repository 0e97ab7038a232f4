"""A real language model, pruned and exported, computes the same in a process that cannot import this library."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

import etp_graph as etp
from benchmarks.serving import run, worker

pytest.importorskip("gguf")


@pytest.mark.slow
def test_smollm2_at_two_sizes(tmp_path: Path) -> None:
    from benchmarks.models.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(["the company said it expects to sell its stake in the unit by the end of the year"] * 60)
    )
    options = argparse.Namespace(prompts=2, tokens=8, site=[])
    starts = worker.prompts_of(tokenizer, text.read_text(), options.prompts)
    for share, way in ((0.8, "width"), (0.8, "depth"), (0.6, "both")):
        pruned = run.pruned_copy(model, tokenizer, text.read_text(), share, way, 32)
        assert 0.95 * share < pruned.num_parameters() / model.num_parameters() <= share
        folder = etp.export.huggingface(pruned, tmp_path / f"{way}-{share}", tokenizer)
        found = run.run_engine(folder, "transformers", text, options)
        assert found["class"] == "LlamaForCausalLM"
        assert found["parameters"] == pruned.num_parameters()
        assert found["tokens"] == worker.continue_greedily(pruned, starts, options.tokens)
