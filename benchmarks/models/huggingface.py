"""Transformers of Hugging Face: the real classes with configurations so small that a forward takes milliseconds.

Widths are different wherever an architecture lets them be, so that no axis is taken for another by its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.entry import Entry, Inputs, entry, noise, tokens

Row = tuple[str, Mapping[str, Any], Inputs]
"""Name of the class, what its configuration sets, example inputs."""

BATCH, LENGTH, TARGET, SIZE, VOCABULARY = 2, 9, 6, 32, 101
"""Sequences, tokens of the (source) text, tokens of the target text, pixels, tokens."""


def _text(**more: Any) -> Inputs:
    return lambda: {"input_ids": tokens(BATCH, LENGTH, vocabulary=VOCABULARY), **more}


def _padded() -> dict[str, Tensor]:
    """The second sequence is two tokens shorter."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, -2:] = 0
    return {"input_ids": tokens(BATCH, LENGTH, vocabulary=VOCABULARY), "attention_mask": mask}


def _source_and_target() -> dict[str, Any]:
    return {**_padded(), "decoder_input_ids": tokens(BATCH, TARGET, vocabulary=VOCABULARY, seed=1), "use_cache": False}


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": noise(BATCH, 3, SIZE, SIZE)}


def _pixels_and_text() -> dict[str, Any]:
    return {**_padded(), **_pixels()}


def _wave() -> dict[str, Tensor]:
    return {"input_values": noise(BATCH, 600)}


def _spectrum_and_text() -> dict[str, Any]:
    text = tokens(BATCH, TARGET, vocabulary=VOCABULARY)
    return {"input_features": noise(BATCH, 20, 60), "decoder_input_ids": text, "use_cache": False}


_DECODE = _text(use_cache=False)
_SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {
    **_SIZES, "vocab_size": VOCABULARY, "intermediate_size": 80, "max_position_embeddings": 40, "type_vocab_size": 2,
    "num_labels": 3,
}  # fmt: skip
_CAUSAL = {
    **_SIZES, "vocab_size": VOCABULARY, "intermediate_size": 92, "max_position_embeddings": 40,
    "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
_GROUPED = {**_CAUSAL, "num_attention_heads": 8, "num_key_value_heads": 2}
_WIDE = {**_GROUPED, "head_dim": 10}
_N = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 2, "eos_token_id": 3}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 80, "decoder_ffn_dim": 92, "max_position_embeddings": 40,
    "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 48, "d_kv": 10, "d_ff": 80, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_VISION = {**_SIZES, "intermediate_size": 80, "image_size": SIZE, "patch_size": 8, "num_labels": 3}
_STAGES = {"depths": [1, 2], "image_size": SIZE, "num_labels": 3}
_SPEECH = {
    **_SIZES, "vocab_size": 31, "intermediate_size": 80, "conv_dim": (28, 36), "conv_stride": (5, 4),
    "conv_kernel": (10, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 20, "num_labels": 3,
}  # fmt: skip
_DUAL: dict[str, Any] = {
    "text_config": {**_CAUSAL, "intermediate_size": 80, "projection_dim": 28},
    "vision_config": {
        **_VISION, "hidden_size": 60, "num_attention_heads": 6, "intermediate_size": 72, "projection_dim": 28,
    },
    "projection_dim": 28,
}  # fmt: skip
_BLIP: dict[str, Any] = {
    **_DUAL, "text_config": {**_DUAL["text_config"], "encoder_hidden_size": 60, "is_decoder": True, "sep_token_id": 3},
    "image_text_hidden_size": 26,
}  # fmt: skip

ENCODERS: dict[str, Row] = {
    "bert": ("BertForSequenceClassification", _ENCODER, _padded),
    "bert_eager": ("BertForSequenceClassification", {**_ENCODER, "attn_implementation": "eager"}, _padded),
    "bert_mlm": ("BertForMaskedLM", _ENCODER, _padded),
    "bert_pretraining": ("BertForPreTraining", _ENCODER, _padded),
    "roberta": ("RobertaForSequenceClassification", _ENCODER, _padded),
    "roberta_mlm": ("RobertaForMaskedLM", _ENCODER, _padded),
    "xlm_roberta": ("XLMRobertaForSequenceClassification", _ENCODER, _padded),
    "camembert": ("CamembertForTokenClassification", _ENCODER, _padded),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": VOCABULARY, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80, "num_labels": 3,
         "max_position_embeddings": 40},
        _padded,
    ),
    "albert": ("AlbertForSequenceClassification", {**_ENCODER, "embedding_size": 36}, _padded),
    "electra": ("ElectraForSequenceClassification", {**_ENCODER, "embedding_size": 36}, _padded),
    "deberta": (
        "DebertaForSequenceClassification",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        _padded,
    ),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
         "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False, "conv_kernel_size": 3},
        _padded,
    ),
    "mpnet": ("MPNetForSequenceClassification", _ENCODER, _padded),
    "modernbert": (
        "ModernBertForMaskedLM", {**_CAUSAL, "local_attention": 4, "cls_token_id": 2, "sep_token_id": 3}, _padded,
    ),
}  # fmt: skip

DECODERS: dict[str, Row] = {
    "gpt2": ("GPT2LMHeadModel", {**_N, "n_inner": 80, "n_positions": 40}, _DECODE),
    "opt": (
        "OPTForCausalLM",
        {**_CAUSAL, "ffn_dim": 80, "word_embed_proj_dim": 48},
        _DECODE,
    ),
    "opt_projected": ("OPTForCausalLM", {**_CAUSAL, "ffn_dim": 80, "word_embed_proj_dim": 36}, _DECODE),
    "gpt_neox": ("GPTNeoXForCausalLM", _CAUSAL, _DECODE),
    "gptj": ("GPTJForCausalLM", {**_N, "n_inner": 80, "n_positions": 40, "rotary_dim": 8}, _DECODE),
    "bloom": ("BloomForCausalLM", {**_CAUSAL, "n_layer": 2, "n_head": 4}, _DECODE),
    "mpt": ("MptForCausalLM", {"vocab_size": VOCABULARY, "d_model": 48, "n_layers": 2, "n_heads": 4}, _DECODE),
    "falcon_multi_query": ("FalconForCausalLM", {**_CAUSAL, "ffn_hidden_size": 80}, _DECODE),
    "falcon_grouped": (
        "FalconForCausalLM",
        {**_CAUSAL, "num_attention_heads": 8, "num_kv_heads": 2, "new_decoder_architecture": True,
         "ffn_hidden_size": 80},
        _DECODE,
    ),
    "llama": ("LlamaForCausalLM", _CAUSAL, _DECODE),
    "llama_gqa": ("LlamaForCausalLM", _GROUPED, _DECODE),
    "llama_tied": ("LlamaForCausalLM", {**_WIDE, "tie_word_embeddings": True}, _DECODE),
    "llama_eager": ("LlamaForCausalLM", {**_GROUPED, "attn_implementation": "eager"}, _DECODE),
    "llama_classifier": ("LlamaForSequenceClassification", {**_GROUPED, "num_labels": 3}, _DECODE),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED, _DECODE),
    "qwen3": ("Qwen3ForCausalLM", _WIDE, _DECODE),
    "mistral": ("MistralForCausalLM", {**_WIDE, "sliding_window": 5}, _DECODE),
    "gemma": ("GemmaForCausalLM", _WIDE, _DECODE),
    "gemma2": ("Gemma2ForCausalLM", {**_WIDE, "query_pre_attn_scalar": 10, "sliding_window": 5}, _DECODE),
    "gemma3": ("Gemma3ForCausalLM", {**_WIDE, "query_pre_attn_scalar": 10, "sliding_window": 5}, _DECODE),
    "olmo2": ("Olmo2ForCausalLM", _GROUPED, _DECODE),
    "stablelm": ("StableLmForCausalLM", _GROUPED, _DECODE),
    "starcoder2": ("Starcoder2ForCausalLM", _GROUPED, _DECODE),
    "phi": ("PhiForCausalLM", {**_CAUSAL, "partial_rotary_factor": 0.5}, _DECODE),
    "phi3": ("Phi3ForCausalLM", _GROUPED, _DECODE),
    "glm": ("GlmForCausalLM", _WIDE, _DECODE),
    "mixtral": (
        "MixtralForCausalLM",
        {**_WIDE, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
        _DECODE,
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**_GROUPED, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28,
         "shared_expert_intermediate_size": 36},
        _DECODE,
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**_WIDE, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28},
        _DECODE,
    ),
}  # fmt: skip

SEQUENCES: dict[str, Row] = {
    "t5": ("T5ForConditionalGeneration", _T5, _source_and_target),
    "t5_gated": (
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        _source_and_target,
    ),
    "t5_encoder": ("T5EncoderModel", _T5, _padded),
    "bart": ("BartForConditionalGeneration", _SEQ2SEQ, _source_and_target),
    "marian": ("MarianMTModel", _SEQ2SEQ, _source_and_target),
    "pegasus": ("PegasusForConditionalGeneration", _SEQ2SEQ, _source_and_target),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**_SEQ2SEQ, "num_mel_bins": 20, "max_source_positions": 30, "max_target_positions": 40},
        _spectrum_and_text,
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", _SPEECH, _wave),
    "wav2vec2_classifier": ("Wav2Vec2ForSequenceClassification", _SPEECH, _wave),
    "hubert": ("HubertForCTC", {**_SPEECH, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}, _wave),
}  # fmt: skip

IMAGES: dict[str, Row] = {
    "vit": ("ViTForImageClassification", _VISION, _pixels),
    "deit": ("DeiTForImageClassificationWithTeacher", _VISION, _pixels),
    "beit": (
        "BeitForImageClassification",
        {**_VISION, "vocab_size": VOCABULARY, "use_relative_position_bias": True},
        _pixels,
    ),
    "dinov2": ("Dinov2ForImageClassification", {**_VISION, "mlp_ratio": 2}, _pixels),
    "swin": (
        "SwinForImageClassification",
        {**_STAGES, "embed_dim": 24, "num_heads": [2, 4], "patch_size": 2, "window_size": 4, "mlp_ratio": 3.0},
        _pixels,
    ),
    "swinv2": (
        "Swinv2ForImageClassification",
        {**_STAGES, "embed_dim": 24, "num_heads": [2, 4], "patch_size": 2, "window_size": 4, "mlp_ratio": 3.0},
        _pixels,
    ),
    "convnextv2": (
        "ConvNextV2ForImageClassification", {**_STAGES, "num_stages": 2, "hidden_sizes": [20, 36]}, _pixels,
    ),
    "segformer": (
        "SegformerForImageClassification",
        {"num_encoder_blocks": 2, "depths": [1, 2], "sr_ratios": [4, 1], "hidden_sizes": [24, 36],
         "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 3], "mlp_ratios": [3, 2],
         "num_labels": 3},
        _pixels,
    ),
    "clip": ("CLIPModel", _DUAL, _pixels_and_text),
    "siglip": (
        "SiglipModel",
        {**_DUAL, "text_config": {**_DUAL["text_config"], "projection_size": 60}},
        _pixels_and_text,
    ),
    "blip_caption": ("BlipForConditionalGeneration", _BLIP, _pixels_and_text),
    "blip_retrieval": ("BlipForImageTextRetrieval", _BLIP, _pixels_and_text),
}  # fmt: skip


def entries() -> Iterator[Entry]:
    """Encoders, decoders, sequence to sequence and speech, images; none without transformers."""
    if find_spec("transformers") is None:
        return
    for name, (cls, config, inputs) in {**ENCODERS, **DECODERS, **SEQUENCES, **IMAGES}.items():
        yield entry(f"hf:{name}", "huggingface", from_config(cls, config), inputs)


def from_config(cls: str, config: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """Makes a model of transformers by the name of its class, with fresh weights."""

    def build() -> nn.Module:
        import transformers

        found = getattr(transformers, cls)
        model: nn.Module = found(found.config_class(**config))
        return model

    return build
