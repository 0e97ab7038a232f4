"""Make a configuration of transformers small: few layers, narrow layers, short vocabularies."""

from __future__ import annotations

import copy
import re
from typing import Any

from ._transformers_seams import fit

VOCABULARY, IMAGE = 128, 32
"""Tokens, and pixels of a side."""

_WIDTH = 64
"""Of the residual stream: four heads of 16 numbers."""

Level = str
"""``parts``: all sizes. ``widths``: all but those of :data:`_PARTS`. ``heads``: of these, all but the numbers of heads.
``layers``: layers, tokens. ``nothing``."""

LEVELS = ("parts", "widths", "heads", "layers", "nothing")
"""The levels, the smallest first."""

_NARROW = ("parts", "widths")

_PARTS: tuple[tuple[str, int], ...] = (
    (r"^patch_size$", 8),
    (r"^(max_position_embeddings|n_positions|n_ctx|max_2d_position_embeddings|num_position_embeddings)$", 64),
    (r"^max_(encoder_|decoder_)?(source_positions|target_positions|position_embeddings|img_size|image_size)$", 64),
    (r"^(text|vision|audio|thinker|backbone|cross|projector|projection|reassemble|downsample)_hidden_size$", _WIDTH),
    (r"^(projector|adapter|vision|text_projection)_(in|out|input|output)_?(dim|size)$|^(project|output)_dim$", _WIDTH),
    (r"^(patch_embed_hidden_size|unit_embed_dim|descriptor_dim|descriptor_decoder_dim|memory_\w*hidden_size)$", _WIDTH),
    (r"^(merged_hidden_size|prediction_head_size|router_hidden_size|auxiliary_channels|codebook_size)$", _WIDTH),
    (r"^(pos_emb_(height|width)|posemb_grid_size)$", 8),
    (r"^(max_num_patches|latent_channels|num_embeddings|output_channels)$", _WIDTH),
    (r"^base_channels$", 32),
    (r"^(ext_pw_out_channel|depthwise_separable_out_channel|nemo_conv_channels|mlp_dim)$", _WIDTH),
    (r"^(hidden_size_global|pred_hidden_size|mit_hidden_size|vit_dim|mask_dim|moe_hidden_size|dff|dim_ff)$", _WIDTH),
)
"""Sizes of patches, tables of positions, and seams between parts. In the full model they hold a small share of the
parameters, and beside narrow layers they would hold most of them. Not every class takes these values."""

_LAYERS: tuple[tuple[str, int], ...] = (
    (r"(^|_)(layers?|n_layers?|depth|num_blocks|num_(encoder|decoder|hidden)_blocks)$", 2),
    (r"(^|_)(num|n)_\w*layers?$", 2),
    (r"^num_hidden_groups$", 1),
    (r"vocab_size", VOCABULARY),
    (r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|block_size)$", 256),
    (r"(num_queries|num_object_queries|num_latents|latent_query_num)$", 8),
    (r"^num_(local_|routed_)?experts$|^n_routed_experts$|^moe_num_experts$|^num_moe_experts$", 4),
    (r"^(num_experts_per_tok|moe_topk|top_k|moe_k|num_selected_experts|moe_num_experts_per_tok|top_k_experts)$", 2),
    (r"^(n_group|topk_group|num_expert_group)$", 1),
    (r"^(attention_window|sliding_window|local_attention_window|attention_chunk_size)$", 8),
)
_WIDTHS: tuple[tuple[str, int], ...] = (
    (r"(intermediate|ffn|feedforward|feed_forward|mlp|inner|d_ff|n_inner|hidden_dim)\w*(size|dim)?$", 96),
    (r"^(ffn_hidden_size|shared_expert\w*|moe_intermediate_size)$", 48),
    (r"^(head_dim|d_kv|attention_head_size|head_size|v_head_dim|global_head_dim|swa_head_dim)$", 16),
    (r"^(qk_nope_head_dim|mamba_head_dim|mamba_d_head|qk_head_dim)$", 16),
    (r"^(qk_rope_head_dim|rotary_dim)$", 8),
    (r"^(q_lora_rank|kv_lora_rank|dt_rank|time_step_rank|mamba_dt_rank)$", 24),
    (r"^(state_size|mamba_d_state|ssm_state_size|mamba_state_size)$", 16),
    (r"^(projection_dim|projection_size|classifier_proj_size|embedding_size_per_layer)$", 32),
    (r"^hidden_size_per_layer_input$", 16),
    (r"^(hidden_size|d_model|n_embd|embed_dim|dim|emb_dim|embedding_size|encoder_hidden_size|decoder_hidden_size)$",
     _WIDTH),
    (r"^(vision_embed_dim|cross_attention_dim|word_embed_proj_dim|d_embed|qformer_hidden_size|out_hidden_size)$",
     _WIDTH),
    (r"^(lru_width|attention_hidden_size|model_dim|hidden_dim|d_latents|fpn_hidden_size|encoder_dim)$", _WIDTH),
    (r"^(mask_feature_size|feature_size|fusion_hidden_size|hidden_channels|decoder_dim|decoder_embed_dim)$", _WIDTH),
)  # fmt: skip
_HEADS: tuple[tuple[str, int], ...] = (
    (r"(key_value_heads|kv_heads|kv_n_heads|attention_groups)$", 2),
    (r"^(mamba_num_heads|mamba_n_heads)$", 8),
    (r"(^|_)(num_)?\w*(attention_)?heads?$", 4),
)
_IMAGE_SIZE = re.compile(r"(pretrain_)?(image_size|img_size|input_size|crop_size)")
_TOKEN = re.compile(r"(token|patch)_(id|index)$")
_LISTS = re.compile(r"(hidden_sizes|embed_dims?|encoder_hidden_sizes|neck_hidden_sizes|dims|channels|widths|d_model|"
                    r"hidden_channels)$")  # fmt: skip


def shrunken(config: Any, level: Level) -> Any:
    """Return a configuration like another one, with small sizes.

    Args:
        config: the configuration; not changed.
        level: what is made small.
    """
    if level == "nothing":
        return config
    changes = _changes(config, level)
    built = _rebuilt(config, changes)
    small = built if built is not None else _changed(config, changes)
    fit(small, config, narrow=level in _NARROW)
    return small


def _changes(config: Any, level: Level) -> dict[str, Any]:
    """Return attribute -> small value. Configurations of parts are made small in the same way."""
    found: dict[str, Any] = {}
    values = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    for name, value in values.items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            found[name] = shrunken(value, level)
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int):
            small = _small(name, value, values, level)
            if small != value:
                found[name] = small
        elif isinstance(value, list | tuple) and value:
            small_list = _small_list(name, value, values, level)
            if small_list != list(value):
                found[name] = type(value)(small_list)
        elif name == "rope_parameters" and level in _NARROW and re.search("vl|omni|4v|ocr", config.model_type):
            found[name] = {**value, "mrope_section": [2, 3, 3]}  # rotary dimensions of time, height and width
    tokens = [
        n
        for n, v in values.items()
        if re.search(r"(token|patch)_(id|index)$", n) and isinstance(v, int) and v >= VOCABULARY
    ]
    for offset, name in enumerate(tokens):
        found[name] = VOCABULARY - 1 - offset
    return found


def _small(name: str, value: int, values: dict[str, Any], level: Level) -> int:
    """Return the small value of an integer: that of the first pattern that its name matches."""
    if name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id"):
        return min(value, VOCABULARY - 1)
    tables = {
        "parts": (_PARTS, _LAYERS, _HEADS, _WIDTHS), "widths": (_LAYERS, _HEADS, _WIDTHS),
        "heads": (_LAYERS, _WIDTHS), "layers": (_LAYERS,),
    }[level]  # fmt: skip
    if name == "num_hidden_layers" and value == len(_as_list(values.get("hidden_sizes"))):
        return value  # there are stages, and each has its entry in lists
    if name == "head_dim" and "qk_rope_head_dim" in values and level != "layers":
        return 8  # rotary embeddings alone use it there
    if level in _NARROW and re.search(_HEADS[0][0], name):
        heads = max((v for n, v in values.items() if re.fullmatch(r"num_attention_heads|n_heads?|num_heads", n)
                     and isinstance(v, int)), default=0)  # fmt: skip
        return 4 if value >= heads else min(value, 2)
    if (
        re.fullmatch(r"(pretrain_)?(image_size|img_size|input_size|crop_size)", name)
        and value >= IMAGE
        and level != "layers"
    ):
        return IMAGE if level == "parts" else _image_size(values)
    for table in tables:
        for pattern, small in table:
            if re.search(pattern, name):
                return min(value, small)
    return value


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _image_size(values: dict[str, Any]) -> int:
    """Return a size of images that is a multiple of the patches."""
    patch = values.get("patch_size", 16)
    patch = patch if isinstance(patch, int) else 16
    return max(IMAGE, 2 * patch) if patch <= 32 else 4 * patch


def _small_list(name: str, value: Any, values: dict[str, Any], level: Level) -> list[Any]:
    """Return a short or narrow list: one layer of each stage, the kinds of layers that differ, narrow stages."""
    values_ = list(value)
    if name == "layer_types" or (name.endswith(("_types", "_type")) and isinstance(values_[0], str)):
        return _short_types(values_)
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values_):
        return values_
    if re.search(r"depths?$|num_layers$|layers$|num_blocks$", name):
        return [min(v, 1 if level in _NARROW else 2) for v in values_]
    if level == "parts" and name in ("patch_size", "tubelet_size"):
        return [min(v, 8) for v in values_]
    if name in ("image_size", "input_size"):
        return [min(v, IMAGE) for v in values_] if level != "layers" else values_
    if level in _NARROW and _LISTS.search(name) and max(values_) > _WIDTH:
        by = max(1, min(values_) // 16)
        return [max(16, v // by // 16 * 16) for v in values_]
    return values_


def _short_types(types: list[str]) -> list[str]:
    """Return two layers, of different kinds if there are any."""
    kinds = list(dict.fromkeys(types))[:2]
    return kinds if len(kinds) == 2 else kinds * 2


def _rebuilt(config: Any, changes: dict[str, Any]) -> Any:
    """Return a configuration that its class makes from the values; ``None`` if the class refuses them.

    What is not a size is kept: the full configuration may be that of a part, with values that are not its defaults.
    """
    given = config.to_diff_dict() if hasattr(config, "to_diff_dict") else {}
    other = {k: v for k, v in given.items() if isinstance(v, bool | str) or k == "model_args"}
    kept = {k: v for k, v in other.items() if k not in ("model_type", "transformers_version", *changes)}
    for values in ({**kept, **changes}, changes, {k: v for k, v in changes.items() if not k.endswith("_types")}):
        try:
            return type(config)(**values)
        except Exception:  # noqa: BLE001, S112 - each class checks its values in its own way
            continue
    return None


def _changed(config: Any, changes: dict[str, Any]) -> Any:
    """Return a copy of the configuration with the values set one by one, for classes that refuse them together."""
    found = copy.deepcopy(config)
    for name, value in changes.items():
        try:
            setattr(found, name, value)
        except Exception:  # noqa: BLE001, S112 - a property without a setter
            continue
    return found
