"""Every family of transformers loads what was exported, with equal outputs, or says why its class cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.export.families import DIFFERS, EQUAL, FAMILIES, KINDS, outcome, page

# What each class can say about neurons, heads, the stream and depth: equal outputs, or a part of the reason why not.
TABLE: dict[str, tuple[str, str, str, str]] = {
    "llama_gqa": (EQUAL, EQUAL, EQUAL, EQUAL),
    "gpt2": (EQUAL, "one n_embd", "one n_embd", EQUAL),
    "bert": (EQUAL, "one hidden_size", "one hidden_size", EQUAL),
    "t5": (EQUAL, EQUAL, "model_dim", EQUAL),
}
SLOW: dict[str, tuple[str, str, str, str]] = {
    "qwen2": (EQUAL, EQUAL, EQUAL, EQUAL),
    "qwen3": (EQUAL, EQUAL, EQUAL, EQUAL),
    "mistral": (EQUAL, EQUAL, EQUAL, EQUAL),
    "gemma2": (EQUAL, EQUAL, "embed_scale", EQUAL),
    "gemma3": (EQUAL, EQUAL, "embed_scale", EQUAL),
    "phi3": (EQUAL, EQUAL, EQUAL, EQUAL),
    "gpt_neox": (EQUAL, "one hidden_size", "one hidden_size", EQUAL),
    "opt": (EQUAL, "one hidden_size", "one hidden_size", EQUAL),
    "olmo2_wide": (EQUAL, EQUAL, EQUAL, EQUAL),
    "granite": (EQUAL, EQUAL, EQUAL, EQUAL),
    "smollm3": (EQUAL, EQUAL, EQUAL, EQUAL),
    "mixtral": (EQUAL, EQUAL, EQUAL, EQUAL),
    "bart": (EQUAL, "one d_model", "one d_model", EQUAL),
    "whisper": (EQUAL, "one d_model", "one d_model", EQUAL),
    "roberta": (EQUAL, "one hidden_size", "one hidden_size", EQUAL),
    "distilbert": (EQUAL, "one dim", "one dim", EQUAL),
    "modernbert": (EQUAL, "one hidden_size", "one hidden_size", EQUAL),
    "vit": (EQUAL, EQUAL, EQUAL, EQUAL),
    "clip": (EQUAL, "one text_config.hidden_size", "one text_config.hidden_size", EQUAL),
    "t5_gated": (EQUAL, EQUAL, EQUAL, EQUAL),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TABLE)
def test_a_class_loads_what_was_exported_or_the_reason_is_told(name: str, kind: str, tmp_path: Path) -> None:
    assert TABLE[name][KINDS.index(kind)] in outcome(name, kind, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SLOW)
def test_every_family_loads_what_was_exported_or_the_reason_is_told(name: str, kind: str, tmp_path: Path) -> None:
    assert SLOW[name][KINDS.index(kind)] in outcome(name, kind, tmp_path / "out")


def test_the_page_numbers_reasons_and_names_what_differs() -> None:
    outcomes = [EQUAL, "one hidden_size", "one hidden_size", f"{DIFFERS} 1.0e-01"]
    body = {"families": {"bert": dict(zip(KINDS, outcomes))}, "conditions": {"torch": "2"}}
    text = page(body)
    assert f"| {EQUAL} | 1 | 1 | {DIFFERS} 1.0e-01 |" in text
    assert "1. one hidden" in text
    assert "- Loads and differs: bert (depth)." in text
    assert "- Loads and differs: none." in page({"families": {"bert": dict.fromkeys(KINDS, EQUAL)}, "conditions": {}})


def test_every_asserted_family_is_on_the_page() -> None:
    assert {*TABLE, *SLOW} <= {name for names in FAMILIES.values() for name in names}
