"""Write a pruned model of transformers as a plain folder, which its own class loads."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph._config import require
from etp_graph.errors import ExportError
from etp_graph.model import all_tensors, eval_mode, first_names, run_model

from ._facts import build_skeleton
from ._folder import require_free, require_space, write_folder
from ._inputs import huggingface_inputs
from ._solve import find_config

_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_ROUNDINGS = 4096
"""Outputs may differ by this many roundings of their element type, relative to the largest value."""


def huggingface(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    example_inputs: Any = None,
    max_shard_size: str | int = "50GB",
    overwrite: bool = False,
) -> Path:
    """Write a pruned model of transformers so that ``from_pretrained`` loads it without this library.

    The configuration gets the sizes of the pruned model (``intermediate_size``, ``num_attention_heads``, ...). The
    folder is then loaded by the class of the model, and the outputs are compared. The folder appears only if they are
    equal. The model is not changed.

    Args:
        model: a model of transformers, pruned or not, with its weights.
        folder: the folder to write; the weights are sharded safetensors.
        tokenizer: tokenizer or processor to write beside it; anything with ``save_pretrained``.
        example_inputs: inputs for the comparison, as for :func:`etp_graph.trace`; small random ones if not given.
        max_shard_size: largest size of a file of weights.
        overwrite: whether to replace a model in the folder.

    Returns:
        The folder.

    Raises:
        ExportError: the configuration of the class cannot describe the model (the message gives the reason and what
            fits); the model is quantized, has adapters or code of its own; the tokenizer does not fit; the folder is in
            use, or the disk is too full. Nothing is written then.
        CheckpointError: writing failed. What the folder held before is still there.
    """
    target = Path(folder).absolute()
    _require_plain(model)
    _require_fitting(model, tokenizer)
    require_free(target, overwrite=overwrite)
    config = find_config(model)
    require_space(target, int(1.02 * _n_bytes(model)) + 2**20)
    inputs = huggingface_inputs(model) if example_inputs is None else example_inputs
    outputs = _outputs(model, inputs)

    def write(place: Path) -> None:
        _with_config(model, config).save_pretrained(place, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        _compare(model, outputs, place, inputs)

    write_folder(target, write)
    return target


def _require_plain(model: nn.Module) -> None:
    """Raise :class:`ExportError` unless this is a model of transformers itself, with ordinary weights."""
    name = type(model).__name__
    require(
        callable(getattr(model, "save_pretrained", None)) and hasattr(model, "config"),
        f"{name} is no model of transformers: write it with etp.save, or export the model inside of it.",
        ExportError,
    )
    adapters = hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
    require(not adapters, f"{name} has adapters: merge them first (model.merge_and_unload()).", ExportError)
    require(
        type(model).__module__.split(".")[0] == "transformers",
        f"{name} comes from {type(model).__module__}, not from transformers, so from_pretrained could not build it "
        "elsewhere without that code: write it with etp.save.",
        ExportError,
    )
    for tensor_name, tensor in all_tensors(model).items():
        require(not tensor.is_meta, f"{tensor_name} has no values (it is on the meta device): load them.", ExportError)
        if isinstance(tensor, nn.Parameter):
            require(
                type(tensor.data) is Tensor and tensor.dtype in _PLAIN,
                f"{tensor_name} is quantized ({tensor.dtype}): dequantize the model (model.dequantize()), prune and "
                "export it, and quantize what you loaded.",
                ExportError,
            )


def _require_fitting(model: Any, tokenizer: Any) -> None:
    """Raise :class:`ExportError` unless the tokenizer has at most as many tokens as the model has embeddings."""
    if tokenizer is None:
        return
    require(
        callable(getattr(tokenizer, "save_pretrained", None)),
        f"tokenizer: {type(tokenizer).__name__} has no save_pretrained; give the tokenizer or processor of the model.",
        ExportError,
    )
    text = getattr(tokenizer, "tokenizer", tokenizer)
    size = len(text) if hasattr(text, "__len__") else 0
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", size)
    require(
        size <= vocabulary,
        f"the tokenizer has {size} tokens and the model {vocabulary}: give the tokenizer that belongs to the model.",
        ExportError,
    )


def _n_bytes(model: nn.Module) -> int:
    tensors = all_tensors(model)
    return sum(
        tensors[name].numel() * tensors[name].element_size()
        for name, first in first_names(tensors, tensors).items() if name == first
    )  # fmt: skip


def _with_config(model: Any, config: Any) -> Any:
    """Return a model of the stock class with a configuration that shares the weights of the pruned one."""
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)  # left by a file that was dequantized as it was read
    config.dtype = model.dtype
    plain: Any = build_skeleton(type(model), config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = copy.deepcopy(model.generation_config)
    return plain


def _outputs(model: nn.Module, inputs: Any) -> list[tuple[str, Tensor]]:
    """Return the outputs of a model, each with its name. Raises :class:`ExportError` if it does not run."""
    try:
        with torch.no_grad(), eval_mode(model):
            return list(_named_outputs(run_model(model, inputs)))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ExportError(
            f"{type(model).__name__} does not run on the inputs of the comparison ({type(error).__name__}: {error}): "
            "give others (example_inputs=)."
        ) from error


def _compare(model: Any, outputs: list[tuple[str, Tensor]], place: Path, inputs: Any) -> None:
    """Load the folder with the class of the model, and raise :class:`ExportError` unless the outputs are equal."""
    again = _loaded(model, place)
    for (name, a), (_, b) in zip(outputs, _outputs(again, inputs)):
        error = float((a.double() - b.double()).abs().max()) / max(float(a.double().abs().max()), 1e-6)
        limit = _ROUNDINGS * torch.finfo(a.dtype).eps if a.dtype.itemsize > 2 else 0.05
        if not error <= limit:
            raise ExportError(
                f"{type(model).__name__} has the sizes of the pruned model, and computes another {name} (off by "
                f"{error:.1e}){_other_numbers(model, again)}: prune fewer kinds of units (trace(..., prune=...)), "
                "or keep the model with etp.save."
            )


def _loaded(model: Any, place: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attention = model.config._attn_implementation
            again = type(model).from_pretrained(place, dtype=model.dtype, attn_implementation=attention)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(f"{type(model).__name__} cannot load what was written ({error}): use etp.save.") from error
    return again.to(model.device)


def _named_outputs(outputs: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of numbers in outputs, each with a name; not those of caches."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield name, outputs
    elif isinstance(outputs, Mapping):
        for key, value in outputs.items():
            yield from _named_outputs(value, str(key))
    elif isinstance(outputs, (tuple, list)):
        for i, value in enumerate(outputs):
            yield from _named_outputs(value, f"{name}[{i}]")


def _other_numbers(model: nn.Module, again: nn.Module) -> str:
    """Return the numbers in modules that differ between two models, as the reason for other outputs."""
    modules = dict(again.named_modules())
    found = [
        f"{name or type(model).__name__}.{key} is {value:g} here and {other:g} there"
        for name, module in model.named_modules() if name in modules
        for key, value in vars(module).items()
        if type(value) in (int, float) and type(other := vars(modules[name]).get(key)) is type(value) and other != value
    ]  # fmt: skip
    scaled = [text for text in found if "scal" in text] or found
    return f", because {scaled[0]}" if scaled else ""
