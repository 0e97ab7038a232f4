"""Models of transformers load from the configuration in their folder, without a function that builds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import etp_graph as etp
from benchmarks.models import huggingface as registry
from etp_graph.errors import CheckpointError
from etp_graph.model import run_model

ROWS = {**registry.ENCODERS, **registry.DECODERS, **registry.SEQUENCES, **registry.IMAGES}


def pruned(name: str) -> tuple[Any, Any]:
    """A model with layers of unequal widths, which no configuration describes."""
    cls, config, inputs = ROWS[name]
    torch.manual_seed(0)
    model, x = registry.from_config(cls, config)().eval(), inputs()
    plan = etp.trace(model, x, check=False)
    scores = torch.rand(plan.n_units)
    budget = etp.Budget(params=int(0.9 * plan.dense.params))
    etp.prune_(model, plan, etp.allocate(model, plan, scores, budget=budget))
    return model, x


@pytest.mark.parametrize("name", ["llama_tied", "bert", "gpt2", "t5", "gemma3", "clip", "whisper"])
def test_the_loaded_model_computes_the_same(name: str, tmp_path: Path) -> None:
    model, x = pruned(name)
    etp.save(model, tmp_path / "out")
    again = etp.load(tmp_path / "out")
    assert type(again) is type(model)
    assert not again.training
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))
    for ours, theirs in zip(run_model(model, x).to_tuple(), run_model(again, x).to_tuple(), strict=True):
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs)


def test_element_types_and_devices(tmp_path: Path) -> None:
    model, x = pruned("llama_tied")
    folder = etp.save(model.to(torch.bfloat16), tmp_path / "out")
    assert {p.dtype for p in etp.load(folder).parameters()} == {torch.bfloat16}
    wide: Any = etp.load(folder, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    assert wide.lm_head.weight is wide.model.embed_tokens.weight
    for a, b in zip(wide.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b.double())
    assert bool(wide(**x).logits.isfinite().all())
    on_meta: Any = etp.load(folder, device="meta")
    assert next(on_meta.parameters()).is_meta


def test_a_saved_model_is_replaced_with_its_configuration(tmp_path: Path) -> None:
    model, _ = pruned("llama_tied")
    folder = etp.save(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="overwrite=True"):
        etp.save(model, folder)
    etp.save(model, folder, overwrite=True)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_folder_without_a_configuration_asks_for_the_architecture(tmp_path: Path) -> None:
    folder = etp.save(torch.nn.Linear(2, 2), tmp_path / "out")
    assert not (folder / "config.json").exists()
    with pytest.raises(CheckpointError, match="build=make_model"):
        etp.load(folder)


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "{}", '{"architectures": []}', '{"architectures": ["os"]}', '{"architectures": ["LlamaConfig"]}',
        '{"architectures": [3]}', '{"architectures": ["LlamaForCausalLM"], "hidden_size": "wide"}', "[" * 10_000,
    ],
)  # fmt: skip
def test_a_damaged_configuration_is_one_error(text: str, tmp_path: Path) -> None:
    folder = etp.save(pruned("llama_tied")[0], tmp_path / "out")
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        etp.load(folder)


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    folder = etp.save(pruned("llama_tied")[0], tmp_path / "out")
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**body, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"layers\.2"):
        etp.load(folder)


def test_a_plain_folder_loads_by_its_class(tmp_path: Path) -> None:
    model = registry.from_config(*ROWS["llama_tied"][:2])()
    folder = etp.export.huggingface(model.eval(), tmp_path / "out")
    again: Any = etp.load(folder, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert again.model.rotary_emb.inv_freq.dtype == torch.float32
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot load"):
        etp.load(folder)
