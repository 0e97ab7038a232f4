"""Channels of state-space mixers: one dimension of the tensor of states holds them, the other states of fixed width."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.standins import standing_in
from etp_graph.verification import Masked, random_selection

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 9, 3, 7, 2, 30], [8, 8, 21, 4, 6, 11]])
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "state_size": 6,
    "time_step_rank": 5, "conv_kernel": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 39,
}  # fmt: skip


def causal(name: str) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES)).eval()
    for key, parameter in model.named_parameters():
        if "A_log" not in key:
            nn.init.normal_(parameter, std=0.4)
    return model


def channels(plan: etp.Plan) -> list[etp.plan.Group]:
    return [group for group in plan.prunable if "in_proj" in group.name]


@pytest.mark.parametrize("name", ["Mamba", "FalconMamba"])
def test_inner_channels_go_with_the_default_call_of_a_user(name: str, tmp_path: Path) -> None:
    model = causal(name)
    plan = etp.trace(model, IDS)
    assert [group.n_units for group in channels(plan)] == [32, 32]
    places = {(piece.tensor.rpartition("mixer.")[2], piece.axis) for piece in channels(plan)[0].slices}
    assert places >= {
        ("in_proj.weight", 0), ("conv1d.weight", 0), ("x_proj.weight", 1), ("dt_proj.weight", 0), ("A_log", 0),
        ("D", 0), ("out_proj.weight", 1),
    }  # fmt: skip
    etp.verify(model, plan, IDS)
    require_equal_after_surgery(model, plan)
    mixer = model.backbone.layers[0].mixer
    assert mixer.dt_proj.in_features == mixer.dt_proj.weight.shape[1] == mixer.time_step_rank
    assert mixer.dt_proj.out_features == len(mixer.A_log) == mixer.conv1d.groups < 32
    tokens = model.generate(IDS, max_new_tokens=6, do_sample=False)
    etp.save(model, tmp_path / "pruned")
    loaded = etp.load(tmp_path / "pruned", build=lambda: causal(name)).eval()
    assert torch.equal(loaded.generate(IDS, max_new_tokens=6, do_sample=False), tokens)


@pytest.mark.parametrize("name", ["Mamba", "FalconMamba"])
def test_masks_and_no_cache_open_the_same(name: str) -> None:
    model = causal(name)
    masked = {"input_ids": IDS, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])}
    for inputs in (masked, {"input_ids": IDS, "use_cache": False}):
        plan = etp.trace(model, inputs)
        assert [group.n_units for group in channels(plan)] == [32, 32]
        etp.verify(model, plan, inputs)


def test_a_uniform_selection_of_mamba_becomes_a_folder(tmp_path: Path) -> None:
    model = causal("Mamba")
    plan = etp.export.restrict_plan(model, etp.trace(model, IDS))
    open_ = channels(plan)
    assert open_
    keep = torch.ones(plan.n_units, dtype=torch.bool)
    for group, span in plan.spans():
        if group in open_:
            keep[span.start : span.start + 16] = False
    etp.prune_(model, plan, etp.Selection.from_flat(plan, keep))
    etp.export.huggingface(model, tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.config.intermediate_size == 16
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


HYBRID: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 39,
}  # fmt: skip
OF_BAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_n_groups": 1, "mamba_chunk_size": 8}
MAMBA2 = {"num_heads": 8, "head_dim": 8, "state_size": 6, "chunk_size": 8}
MIXERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "one group": ("Mamba2", {**MAMBA2, "n_groups": 1}, 8),
    "groups": ("Mamba2", {**MAMBA2, "n_groups": 2}, 2),
    "Bamba": ("Bamba", {**OF_BAMBA, "attn_layer_indices": [1]}, 8),
    "FalconH1": ("FalconH1", {**OF_BAMBA, "mamba_d_ssm": 64, "head_dim": 8}, 8),
    "GraniteMoeHybrid": ("GraniteMoeHybrid", {
        **OF_BAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1,
        "shared_intermediate_size": 24, "position_embedding_type": None,
    }, 8),
    "NemotronH": ("NemotronH", {
        "hybrid_override_pattern": "M*", "head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 6,
        "n_groups": 1, "chunk_size": 8, "use_mamba_kernels": False,
    }, 8),
    "Qwen3Next": ("Qwen3Next", {
        "head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "num_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    }, 4),
    "RecurrentGemma": ("RecurrentGemma", {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32}, 4),
    "MiniMax": ("MiniMax", {
        "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "block_size": 4, "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }, 4),
}  # fmt: skip
"""Class, sizes, and the number of heads of the mixer."""


def hybrid(name: str) -> Any:
    family, sizes, _ = MIXERS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**HYBRID | sizes))
    for key, parameter in model.named_parameters():
        if "A_log" not in key:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", MIXERS)
def test_heads_of_mixers_go_with_the_default_call_of_a_user(name: str) -> None:
    model = hybrid(name)
    plan = etp.trace(model, IDS)
    first = (".in_proj", ".linear_y", ".qkv_proj")
    mixers = [g for g in plan.prunable if g.kind == "heads" and any(layer in g.name for layer in first)]
    assert mixers
    assert {group.n_units for group in mixers} == {MIXERS[name][2]}
    etp.verify(model, plan, IDS)
    require_equal_after_surgery(model, plan)


def test_heads_inside_the_groups_of_a_mixer_go_on_request() -> None:
    model = hybrid("groups")
    plan = etp.trace(model, IDS, prune=["query_heads"])
    assert [group.n_units for group in plan.prunable] == [4, 4]
    etp.verify(model, plan, IDS)
    require_equal_after_surgery(model, plan)
    mixer = model.backbone.layers[0].mixer
    assert mixer.norm.group_size * 2 == len(mixer.norm.weight) < 64


def require_equal_after_surgery(model: Any, plan: etp.Plan) -> None:
    """Assert that pruned and masked model agree with and without a cache, and generate the same tokens."""
    selection = random_selection(plan, plan.prunable, 0.4, torch.Generator().manual_seed(0))
    masked, expected = copy.deepcopy(model), etp.cost(model, plan, selection)
    etp.prune_(model, plan, selection)
    assert sum(p.numel() for p in model.parameters()) == expected.params
    with torch.no_grad():
        for cache in (True, False):
            with Masked(masked, plan, selection.flat(plan)), standing_in(masked, views_only=True):
                want = masked(IDS, use_cache=cache).logits
            torch.testing.assert_close(model(IDS, use_cache=cache).logits, want, rtol=1e-4, atol=1e-4)
    tokens = [model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*tokens)


class Scan(nn.Module):
    """A selective scan as users write it, with the states last or first."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.d_inner, self.d_state, self.dt_rank = 12, 4, 3
        self.in_proj, self.out_proj = nn.Linear(8, 24), nn.Linear(12, 8)
        self.conv1d = nn.Conv1d(12, 12, 3, groups=12, padding=2)
        self.x_proj, self.dt_proj = nn.Linear(12, 3 + 8, bias=False), nn.Linear(3, 12)
        states = torch.arange(1.0, 5).repeat(12, 1).log() + 0.1 * torch.randn(12, 4)
        self.A_log = nn.Parameter(states if how != "states first" else states.t().contiguous())
        self.D = nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        _, length, _ = x.shape
        y, gate = self.in_proj(x).chunk(2, -1)
        y = nn.functional.silu(self.conv1d(y.transpose(1, 2))[..., :length].transpose(1, 2))
        delta, b, c = self.x_proj(y).split([self.dt_rank, self.d_state, self.d_state], -1)
        y = self.scan(y, nn.functional.softplus(self.dt_proj(delta)), -self.A_log.exp(), b, c) + y * self.D
        return x + self.out_proj(y * nn.functional.silu(gate))

    def scan(self, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        found = []
        if self.how == "einsum":
            decay = torch.exp(torch.einsum("bld,dn->bldn", delta, a))
            add = torch.einsum("bld,bln,bld->bldn", delta, b, u)
            state = torch.zeros((len(u), u.shape[2], a.shape[1]))
            for i in range(u.shape[1]):
                state = decay[:, i] * state + add[:, i]
                found.append(torch.einsum("bdn,bn->bd", state, c[:, i]))
        elif self.how == "sum":
            state = u.new_zeros(len(u), self.d_inner, self.d_state)
            for i in range(u.shape[1]):
                state = state * torch.exp(delta[:, i, :, None] * a) + (delta * u)[:, i, :, None] * b[:, i, None]
                found.append((state * c[:, i, None]).sum(-1))
        else:
            state = torch.zeros(len(u), a.shape[0], u.shape[2])
            for i in range(u.shape[1]):
                state = state * torch.exp(delta[:, i, None] * a) + (delta * u)[:, i, None] * b[:, i, :, None]
                found.append((state * c[:, i, :, None]).sum(1))
        return torch.stack(found, 1)


@pytest.mark.parametrize("how", ["einsum", "sum", "states first"])
def test_scans_of_users(how: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), Scan(how), Scan(how), nn.Linear(8, 3)).eval(), torch.randn(2, 6, 5)
    plan = etp.trace(model, x)
    assert [group.n_units for group in channels(plan)] == [12, 12]
    etp.verify(model, plan, x)
    etp.prune_(model, plan, random_selection(plan, channels(plan), 0.5, torch.Generator()))
    assert len(model[1].D) < 12
    assert model(x).shape == (2, 6, 3)
