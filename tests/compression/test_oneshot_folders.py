"""The streamed form gives the bits of the form in memory, as plain folders, and holds one block at a time."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import etp_graph as etp
from etp_graph.compression.streamed import _blocks
from etp_graph.export import restrict_plan
from tests.support.models.causal_models import CAUSAL, token_batches, write_causal

transformers = pytest.importorskip("transformers")


def load(folder: Path, family: str, **options: Any) -> Any:
    return getattr(transformers, CAUSAL[family][0]).from_pretrained(folder, **options).eval()


def in_memory(
    source: Path, family: str, batches: list[Any], streamed: etp.StreamedResult, **options: Any
) -> tuple[Any, etp.OneShotResult]:
    """Return the model that ``oneshot_`` prunes with the groups of the streamed plan, and its result."""
    model = load(source, family, dtype=torch.float32)
    data = [{**batch, "use_cache": False} for batch in batches]
    plan = restrict_plan(model, etp.trace(model, data[0], check=False))
    groups = {group.name: group for group in streamed.plan.groups}
    same = tuple(
        replace(one, locked=groups[one.name].locked, multiple=groups[one.name].multiple) for one in plan.groups
    )
    return model, etp.oneshot_(model, data, plan=replace(plan, groups=same), progress=False, blend=1, **options)


@pytest.mark.parametrize(
    ("family", "criterion"),
    [
        ("llama", None), ("llama", "wanda"), ("llama", "magnitude"), ("llama", "taylor"), ("qwen2", "kron_obs"),
        ("qwen2", "flap"), ("gemma2", None), ("phi3", "obs"), ("gpt2", None), ("gpt2", "wanda"), ("opt", "flap"),
        ("neox", None), ("gpt_neo", None),
    ],
)  # fmt: skip
def test_the_weights_are_those_of_the_form_in_memory(family: str, criterion: str | None, tmp_path: Path) -> None:
    source, batches = write_causal(tmp_path / "dense", family), token_batches()
    found = etp.oneshot(source, batches, budget=0.8, out=tmp_path / "out", criterion=criterion, progress=False)
    budget = etp.Budget(params=0.8, uniform=True)
    model, done = in_memory(source, family, batches, found, budget=budget, criterion=criterion)
    (size,) = found.sizes
    assert size.folder == tmp_path / "out"
    assert size.cost.params == done.pruned.params <= 0.8 * found.dense.params
    assert done.selection.n_removed > 0
    assert all(torch.equal(keep, size.selection.keep[name]) for name, keep in done.selection.keep.items())
    again, info = getattr(transformers, CAUSAL[family][0]).from_pretrained(size.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())
    assert size.compensation is not None
    assert done.compensation is not None
    assert size.compensation.layers == done.compensation.layers
    assert all(fit.after < fit.before for fit in size.compensation.layers)


def test_half_precision_is_computed_in_float32_and_stored_as_it_was(tmp_path: Path) -> None:
    model = load(write_causal(tmp_path / "wide"), "llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    batches = token_batches()
    found = etp.oneshot(tmp_path / "dense", batches, budget=0.8, out=tmp_path / "out", progress=False)
    other, _ = in_memory(tmp_path / "dense", "llama", batches, found, budget=etp.Budget(params=0.8, uniform=True))
    wanted = other.state_dict()
    assert {value.dtype for value in wanted.values()} == {torch.float32}
    for name, value in load(tmp_path / "out", "llama", dtype="auto").state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, wanted[name].to(torch.bfloat16))


def test_sizes_are_nested_and_the_smallest_is_that_of_its_budget_alone(tmp_path: Path) -> None:
    source, batches = write_causal(tmp_path / "dense"), token_batches()
    budgets = [0.9, etp.Budget(params=0.75), 0.65]
    found = etp.oneshot(source, batches, budget=budgets, out=tmp_path / "out", criterion="magnitude", progress=False)
    assert [size.folder.name for size in found.sizes] == ["params=0.9", "params=0.75", "params=0.65"]
    for larger, smaller in zip(found.sizes, found.sizes[1:], strict=False):
        assert smaller.cost.params < larger.cost.params
        for name, keep in smaller.selection.keep.items():
            assert bool((keep <= larger.selection.keep[name]).all())
    for size, share in zip(found.sizes, (0.9, 0.75, 0.65), strict=True):
        assert sum(value.numel() for value in load(size.folder, "llama").parameters()) == size.cost.params
        assert size.cost.params <= share * found.dense.params
    alone = etp.oneshot(source, batches, budget=0.65, out=tmp_path / "one", criterion="magnitude", progress=False)
    for file in sorted(alone.sizes[0].folder.glob("*.safetensors")):
        assert file.read_bytes() == (found.sizes[2].folder / file.name).read_bytes()


def test_without_compensation_the_weights_are_cut_alone(tmp_path: Path) -> None:
    source = write_causal(tmp_path / "dense")
    found = etp.oneshot(source, token_batches(), budget=0.8, out=tmp_path / "out", compensate=False, progress=False)
    assert found.sizes[0].compensation is None
    dense, pruned = load(source, "llama").state_dict(), load(tmp_path / "out", "llama").state_dict()
    cut = 0
    for name, keep in found.sizes[0].selection.keep.items():
        if "mlp" in name:
            down = name.replace("gate_proj", "down_proj").replace("up_proj", "down_proj") + ".weight"
            assert torch.equal(pruned[down], dense[down][:, keep])
            cut += int((~keep).sum())
    assert cut > 0


def test_shards_and_the_files_beside_the_weights(tmp_path: Path) -> None:
    source, batches = write_causal(tmp_path / "dense", max_shard_size="8KB"), token_batches()
    assert len(list(source.glob("*.safetensors"))) > 2
    (source / "tokenizer.json").write_text("{}")
    (source / "optimizer.pt").write_bytes(b"0")
    etp.oneshot(source, batches, budget=0.8, out=tmp_path / "out", criterion="wanda", progress=False)
    held = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "config.json", "model.safetensors.index.json"} <= held
    assert "optimizer.pt" not in held
    assert {file.stat().st_mode for file in (tmp_path / "out").iterdir()} == {
        (tmp_path / "out/config.json").stat().st_mode
    }
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {file for file in held if file.endswith(".safetensors")}
    whole = write_causal(tmp_path / "whole")
    etp.oneshot(whole, batches, budget=0.8, out=tmp_path / "other", criterion="wanda", progress=False)
    one, other = (load(tmp_path / name, "llama").state_dict() for name in ("out", "other"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not list(tmp_path.glob(".*"))


def test_one_block_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_causal(tmp_path / "dense")
    alive: list[tuple[str, weakref.ref[Tensor]]] = []
    most, read = 0, _blocks.SourceFolder.read

    def watched(self: Any, key: str) -> Tensor:
        nonlocal most
        blocks = {name for name, held in alive if held() is not None}
        most = max(most, len(blocks | {block_of(key)} - {""}))
        return read(self, key)

    cast = _blocks.BlockwiseModel.cast

    def noted(self: Any, tensor: Tensor) -> Tensor:
        found = cast(self, tensor)
        if tuple(found.shape) in shapes:
            alive.append((current[0], weakref.ref(found)))
        return found

    shapes = {(48, 32), (32, 48)}  # of neurons: hidden states have three dimensions
    current = [""]

    def block_of(key: str) -> str:
        current[0] = key.split(".")[2] if ".layers." in key else ""
        return current[0]

    monkeypatch.setattr(_blocks.SourceFolder, "read", watched)
    monkeypatch.setattr(_blocks.BlockwiseModel, "cast", noted)
    etp.oneshot(source, token_batches(), budget=[0.9, 0.8], out=tmp_path / "out", progress=False)
    assert {name for name, _ in alive} == {"0", "1"}
    assert most == 1


@pytest.mark.parametrize("ridge", [1e-3, 0.0])
def test_fewer_tokens_than_inputs_of_a_layer(ridge: float, tmp_path: Path) -> None:
    source, batch = write_causal(tmp_path / "dense"), torch.randint(3, 64, (1, 8))
    found = etp.oneshot(
        source, [batch], budget=0.8, out=tmp_path / "out", criterion="wanda", ridge=ridge, progress=False
    )
    fits = found.sizes[0].compensation
    assert fits is not None
    assert fits.layers
    assert all(fit.after <= fit.before for fit in fits.layers)
    assert bool(load(tmp_path / "out", "llama")(batch).logits.isfinite().all())


def test_a_number_of_heads_that_the_class_refuses_is_not_chosen(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    found = etp.oneshot(
        tmp_path / "dense", token_batches(), budget=etp.Budget(params=0.9), prune="heads", criterion="wanda",
        out=tmp_path / "out", progress=False,
    )  # fmt: skip
    assert load(tmp_path / "out", "llama").config.num_attention_heads == 4  # six do not divide the width
    assert {group.multiple for group in found.plan.prunable} == {2}
