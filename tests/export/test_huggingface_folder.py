"""The folder of an exported model: complete or absent, and refused before anything is written."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import etp_graph as etp
from etp_graph.errors import CheckpointError, ExportError


class OwnLlama(transformers.LlamaForCausalLM):
    """A class that from_pretrained cannot find elsewhere."""


def build(cls: type[Any] = transformers.LlamaForCausalLM) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=4, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return cls(config).eval()


def prune(model: nn.Module, share: float = 0.7, **rules: Any) -> nn.Module:
    plan = etp.trace(model, etp.export.huggingface_inputs(model))
    budget = etp.Budget(params=int(share * plan.dense.params), **rules)
    etp.prune_(model, plan, etp.allocate(model, plan, etp.criteria.magnitude(model, plan), budget=budget))
    return model


@pytest.fixture(scope="module")
def pruned() -> Any:
    return prune(build(), uniform=True)


def tokenizer(n_tokens: int) -> Any:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n_tokens)}, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")


def test_the_folder_is_complete(pruned: Any, tmp_path: Path) -> None:
    folder = etp.export.huggingface(pruned, tmp_path / "out", tokenizer(64), max_shard_size="4KB")
    held = {file.name for file in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} <= held
    config = json.loads((folder / "config.json").read_text())
    layer = pruned.model.layers[0]
    assert config["intermediate_size"] == layer.mlp.gate_proj.out_features < 40
    assert config["num_key_value_heads"] * config["head_dim"] == layer.self_attn.k_proj.out_features
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) == 64
    assert pruned.config.intermediate_size == 40  # the model is as it was
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(10)[None]
    assert torch.equal(again(tokens).logits, pruned(tokens).logits)
    out = again.generate(tokens, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > tokens.shape[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_element_type_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    model = prune(build(), uniform=True).to(dtype)
    folder = etp.export.huggingface(model, tmp_path / "out")
    assert transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == dtype


def test_an_exported_model_is_pruned_and_exported_again(pruned: Any, tmp_path: Path) -> None:
    folder = etp.export.huggingface(pruned, tmp_path / "once")
    again = prune(transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), uniform=True)
    twice = etp.export.huggingface(again, tmp_path / "twice")
    size = transformers.AutoConfig.from_pretrained(twice).intermediate_size
    assert size < transformers.AutoConfig.from_pretrained(folder).intermediate_size


def test_save_pretrained_of_a_pruned_model_names_the_way(pruned: Any, tmp_path: Path) -> None:
    loaded = etp.load(etp.save(pruned, tmp_path / "saved"))
    for model in (pruned, copy.deepcopy(pruned), loaded):
        with pytest.warns(UserWarning, match=r"etp_graph\.export\.huggingface"):
            model.save_pretrained(tmp_path / "out")  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build().save_pretrained(tmp_path / "dense")
        etp.export.huggingface(pruned, tmp_path / "plain")
    held = torch.load(_written(copy.deepcopy(pruned), tmp_path / "model.pt"), weights_only=False)
    assert torch.equal(held(torch.arange(4)[None]).logits, pruned(torch.arange(4)[None]).logits)


def _written(model: nn.Module, file: Path) -> Path:
    torch.save(model, file)
    return file


def test_a_folder_with_a_model_needs_overwrite(pruned: Any, tmp_path: Path) -> None:
    folder = etp.export.huggingface(build(), tmp_path / "out")
    before = (folder / "config.json").read_text()
    with pytest.raises(ExportError, match="overwrite=True"):
        etp.export.huggingface(pruned, folder)
    assert (folder / "config.json").read_text() == before
    etp.export.huggingface(pruned, folder, overwrite=True)
    assert (folder / "config.json").read_text() != before


def test_a_folder_with_other_files_is_never_replaced(pruned: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ExportError, match="thesis"):
        etp.export.huggingface(pruned, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_uneven_layers_are_refused_with_the_remedy(tmp_path: Path) -> None:
    model = build()
    plan = etp.trace(model, etp.export.huggingface_inputs(model))
    keep = {
        "model.layers.0.mlp.gate_proj": torch.arange(40) < 30,
        "model.layers.1.mlp.gate_proj": torch.arange(40) < 20,
    }
    etp.prune_(model, plan, etp.Selection(keep))  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"intermediate_size .*30 .*20 .*uniform=True"):
        etp.export.huggingface(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _adapted() -> Any:
    model = build()
    model.peft_config = {"default": None}
    return model


def _quantized() -> Any:
    model = build()
    weight = model.model.layers[0].mlp.up_proj
    weight.weight = nn.Parameter(weight.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def _with_extra_tensor() -> Any:
    model = build()
    model.model.layers[0].extra = nn.Linear(2, 2)
    return model


def _on_meta() -> Any:
    return build().to("meta")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_adapted, "merge_and_unload"), (_quantized, "dequantize"), (_with_extra_tensor, r"layers\.0\.extra"),
        (_on_meta, "meta"), (lambda: build(OwnLlama), "OwnLlama comes from"), (lambda: nn.Linear(2, 2), "Linear is no"),
    ],
)  # fmt: skip
def test_what_a_plain_folder_cannot_hold_is_refused(make: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=reason):
        etp.export.huggingface(make(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_another_model_is_refused(pruned: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="65 tokens and the model 64"):
        etp.export.huggingface(pruned, tmp_path / "out", tokenizer(65))
    with pytest.raises(ExportError, match="save_pretrained"):
        etp.export.huggingface(pruned, tmp_path / "out", "gpt2")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_before_anything_is_written(
    pruned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match="MiB are free"):
        etp.export.huggingface(pruned, tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(pruned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.GenerationConfig, "save_pretrained", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        etp.export.huggingface(pruned, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_restricted_stream_keeps_what_the_class_accepts(tmp_path: Path) -> None:
    model = build()
    plan = etp.trace(model, etp.export.huggingface_inputs(model), prune=["stream", "neurons"])
    plan = etp.export.restrict_plan(model, plan)
    (stream,) = (group for group in plan.prunable if group.kind == "stream")
    assert stream.multiple == 6  # heads
    assert {group.multiple for group in plan.prunable if group.kind == "neurons"} == {1}
    budget = etp.Budget(params=int(0.7 * plan.dense.params), uniform=True)
    etp.prune_(model, plan, etp.allocate(model, plan, torch.rand(plan.n_units), budget=budget))
    folder = etp.export.huggingface(model, tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.hidden_size in (6, 12, 18)
    assert config.head_dim == 4
