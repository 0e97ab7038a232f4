"""An ``nn.Module`` as it is: its tensors, modes, random state and layer table. Nothing here knows a plan."""

from __future__ import annotations

from ._layer_table import (
    ATTRIBUTES_BY_NAME,
    CHANNELWISE_LAYERS,
    EMBEDDING_ARGUMENTS,
    MIXING_LAYERS,
    PADDINGS,
    POOLS,
    CountingAttributes,
    MixingLayer,
    as_count,
    bind_arguments,
    counting_attributes,
    held_size,
    is_editable,
    is_weightless_norm,
    register_padding,
    sizes_of_class,
)
from ._markers import PackedExperts, long_axis, mixture, norm_over_units, routed, run_with_closed_experts, unit_mean
from ._modes import (
    InFloat64,
    WithoutDropout,
    eval_mode,
    without_attention_fast_path,
    without_autocast,
    without_garbage_collection,
)
from ._outputs import ChosenOutputs, Outputs, UnknownFunction, check_outputs, output_entry, run_outputs
from ._private_random import PrivateRandom, is_random_operator, kept_generators, private_random
from ._random_state import RNG, SEEDED, capture_rng, preserved_rng, restore_rng_
from ._run import ModuleStack, convert_inputs, run_model, tensors_of
from ._running_line import failing_line, running_line
from ._shards import Shards, any_sharded, is_sharded, local_part, local_ranges
from ._tensors import all_tensors, copy_model, first_names, named_tensors, persistent_names
from ._undone import removing_hooks, undone
from ._wrappers import after_gradients, inner_optimizer, plain_forward, require_bare
from ._written_state import ModelState, restored_state

__all__ = [
    "ATTRIBUTES_BY_NAME",
    "CHANNELWISE_LAYERS",
    "EMBEDDING_ARGUMENTS",
    "MIXING_LAYERS",
    "PADDINGS",
    "POOLS",
    "RNG",
    "SEEDED",
    "ChosenOutputs",
    "CountingAttributes",
    "InFloat64",
    "MixingLayer",
    "ModelState",
    "ModuleStack",
    "Outputs",
    "PackedExperts",
    "PrivateRandom",
    "Shards",
    "UnknownFunction",
    "WithoutDropout",
    "after_gradients",
    "all_tensors",
    "any_sharded",
    "as_count",
    "bind_arguments",
    "capture_rng",
    "check_outputs",
    "convert_inputs",
    "copy_model",
    "counting_attributes",
    "eval_mode",
    "failing_line",
    "first_names",
    "held_size",
    "inner_optimizer",
    "is_editable",
    "is_random_operator",
    "is_sharded",
    "is_weightless_norm",
    "kept_generators",
    "local_part",
    "local_ranges",
    "long_axis",
    "mixture",
    "named_tensors",
    "norm_over_units",
    "output_entry",
    "persistent_names",
    "plain_forward",
    "preserved_rng",
    "private_random",
    "register_padding",
    "removing_hooks",
    "require_bare",
    "restore_rng_",
    "restored_state",
    "routed",
    "run_model",
    "run_outputs",
    "run_with_closed_experts",
    "running_line",
    "sizes_of_class",
    "tensors_of",
    "undone",
    "unit_mean",
    "without_attention_fast_path",
    "without_autocast",
    "without_garbage_collection",
]
