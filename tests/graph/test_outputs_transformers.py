"""On the models of transformers the call that a user makes opens what the logits alone would open."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp


def table(**settings: Any) -> dict[str, Any]:
    return settings


TEXT: dict[str, Any] = table(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                            num_attention_heads=4, max_position_embeddings=24)  # fmt: skip
DECODER: dict[str, Any] = table(**TEXT, num_key_value_heads=2, pad_token_id=0)
PAIR: dict[str, Any] = table(
    vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=24, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=2,
)  # fmt: skip
IMAGE: dict[str, Any] = table(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
                             image_size=16, patch_size=8)  # fmt: skip
CLIP = {"text_config": {**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, "vision_config": IMAGE}
IDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ONE: dict[str, Any] = {"input_ids": IDS}
TWO: dict[str, Any] = {**ONE, "decoder_input_ids": IDS[:, :5]}
BOTH: dict[str, Any] = {**ONE, "pixel_values": PIXELS}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Tensor]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, ONE),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER, ONE),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 8}, ONE),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER, ONE),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "head_dim": 8}, ONE),
    "phi": ("PhiForCausalLM", "PhiConfig", {**DECODER, "num_key_value_heads": 4}, ONE),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", table(vocab_size=40, n_embd=16, n_layer=1, n_head=4), ONE),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, ONE),
    "opt": ("OPTForCausalLM", "OPTConfig", table(vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=1,
            num_attention_heads=4, word_embed_proj_dim=16, max_position_embeddings=24), ONE),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**DECODER, "num_local_experts": 2}, ONE),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           table(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4), TWO),
    "bart": ("BartForConditionalGeneration", "BartConfig", PAIR, TWO),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig",
                table(**{k: v for k, v in PAIR.items() if k != "max_position_embeddings"}, num_mel_bins=8,
                     max_source_positions=10, max_target_positions=16),
                {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": IDS[:, :5]}),
    "clip": ("CLIPModel", "CLIPConfig", {**CLIP, "projection_dim": 8}, BOTH),
    "siglip": ("SiglipModel", "SiglipConfig", CLIP, BOTH),
    "blip": ("BlipForConditionalGeneration", "BlipConfig",
             {**CLIP, "text_config": {**CLIP["text_config"], "encoder_hidden_size": 16, "sep_token_id": 2}}, BOTH),
}  # fmt: skip


class OnlyLogits(nn.Module):
    """What a user would write to hide all but the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        out = self.model(**inputs)
        return out["logits"] if "logits" in out else out["logits_per_image"]


def from_transformers(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    model, config, settings, inputs = FAMILIES[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval(), inputs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prune", [None, "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_default_call_opens_what_the_logits_alone_open(name: str, prune: str | None) -> None:
    model, inputs = from_transformers(name)
    plan = etp.trace(model, inputs, prune=prune, check=False)
    alone = etp.trace(OnlyLogits(model), inputs, prune=prune, check=False)
    kinds = Counter((group.kind, group.n_units) for group in plan.prunable)
    assert kinds == Counter((group.kind, group.n_units) for group in alone.prunable)
    assert any(kind == "heads" for kind, _ in kinds)
    assert plan.left_out
    if prune is None:
        assert etp.verify(model, plan, inputs, ratio=0.4).error < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "inputs", "left"),
    [
        ({}, {"output_hidden_states": True}, 1),
        ({"output_hidden_states": True}, {}, 1),
        ({"output_hidden_states": True}, {"output_hidden_states": False}, 1),
        ({}, {"return_dict": False}, 1),
        ({"use_cache": False}, {}, 0),
    ],
)
def test_what_was_asked_for_is_an_output(settings: dict[str, Any], inputs: dict[str, Any], left: int) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, **settings)).eval()
    plan = etp.trace(model, {**ONE, **inputs}, prune="all", check=False)
    asked = inputs.get("output_hidden_states", settings.get("output_hidden_states", False))
    assert len(plan.left_out) == left
    assert any(group.kind == "heads" for group in plan.prunable)
    assert any(group.kind == "stream" for group in plan.prunable) != asked


@pytest.mark.filterwarnings("ignore")
def test_inputs_of_a_check_may_ask_for_a_cache_that_the_trace_had_not() -> None:
    model, inputs = from_transformers("llama")
    plan = etp.trace(model, {**inputs, "use_cache": False})
    assert etp.verify(model, plan, inputs).error < 1e-12
