"""Pruned is masked for the real classes of the libraries, all kinds of units, as the tracer understood them."""

from __future__ import annotations

import pytest
import torch

import etp_graph as etp
from benchmarks.models import Entry, registry
from tests.support.zero_units import zero_units_

ENTRIES = {
    name: entry
    for name, entry in registry().items()
    if entry.family in ("huggingface", "graphs", "recurrent", "forecasting") and name != "pyg:gat_ppi"
}
VISION = (
    "swin_v2_t", "timm:beit_base_patch16_224", "timm:cait_xxs24_224", "timm:convnextv2_atto", "timm:efficientformer_l1",
    "timm:eva02_tiny_patch14_224", "timm:levit_128s", "timm:maxvit_rmlp_pico_rw_256", "timm:pvt_v2_b0",
    "timm:res2net50_14w_8s", "timm:swin_tiny_patch4_window7_224", "timm:twins_svt_small", "timm:vit_tiny_patch16_224",
    "timm:xcit_nano_12_p16_224",
)  # fmt: skip
NO_HEADS = ("hf:convnextv2", "hf:bloom", "hf:mpt", "hf:falcon_grouped")
"""No attention; slopes of ALiBi that are computed from the number of heads; a width computed from two counts."""
REFUTED = ("hf:falcon_grouped", "hf:segformer")
"""Where the plan is wrong before the check of ``trace`` has locked what it refutes."""


def small(entry: Entry) -> torch.nn.Module:
    torch.manual_seed(0)
    return entry.build()


@pytest.mark.parametrize("name", ENTRIES)
def test_every_kind_of_unit(name: str) -> None:
    entry = ENTRIES[name]
    model, inputs = small(entry), entry.inputs()
    plan = etp.trace(model, inputs, prune="all", check=name in REFUTED)
    found = etp.verify(model, plan, inputs, ratio=(0.0, 0.3, 0.7))
    tolerance = 1e-9 if found.dtype == "float64" else 1e-4
    assert found.error < tolerance
    assert found.gradient_error is not None
    assert found.gradient_error < max(tolerance, 1e-6)
    assert found.effect > 1e-4, "nothing was removed that mattered: the comparison says nothing"
    if entry.family == "huggingface" and name not in NO_HEADS:
        assert any(group.kind == "heads" for group in plan.prunable)
        assert any(group.kind == "neurons" for group in plan.prunable)
    if name.startswith(("pyg:gat", "pyg:transformer")) and name != "pyg:gat1_head":
        assert any(group.kind == "heads" for group in plan.prunable)
    if entry.family == "recurrent":
        # A tied embedding makes one unit of a hidden unit and a feature.
        assert any(group.kind in ("hidden", "projections", "features") for group in plan.prunable)


@pytest.mark.parametrize("name", VISION)
def test_vision(name: str) -> None:
    entry = registry()[name]
    model, inputs = small(entry), entry.small()
    plan = etp.trace(model, inputs, prune="all", check=False)
    found = etp.verify(model, plan, inputs, ratio=0.4, gradients=False)
    assert found.error < 1e-9
    assert any(group.kind in ("heads", "channels") for group in plan.prunable)


@pytest.mark.parametrize("name", NO_HEADS)
def test_heads_that_code_counts_are_locked_with_a_reason(name: str) -> None:
    entry = ENTRIES[name]
    plan = etp.trace(small(entry), entry.inputs(), prune="all", check=True)
    heads = [group for group in plan.groups if group.kind == "heads"]
    assert all(group.locked for group in heads)
    assert plan.prunable


def test_grouped_queries_go_with_their_keys() -> None:
    entry = ENTRIES["hf:llama_gqa"]
    model = small(entry)
    plan = etp.trace(model, entry.inputs(), check=False)
    group = plan["model.layers.0.self_attn.q_proj"]
    config = model.config
    assert (group.kind, group.n_units) == ("heads", config.num_key_value_heads)
    sizes = {piece.tensor.split(".")[-2]: len(piece) for piece in group.slices}
    assert sizes["q_proj"] == sizes["o_proj"] == config.num_attention_heads * config.head_dim
    assert sizes["k_proj"] == sizes["v_proj"] == config.num_key_value_heads * config.head_dim


def test_rotated_dimensions_of_heads_go_in_pairs_in_all_layers_with_the_table_of_frequencies() -> None:
    entry = ENTRIES["hf:llama_gqa"]
    model = small(entry)
    plan = etp.trace(model, entry.inputs(), prune=["head_dims"], check=False)
    (group,) = [group for group in plan.groups if group.kind == "head_dims"]
    tensors = {piece.tensor for piece in group.slices}
    assert {"model.rotary_emb.inv_freq", *(f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))} <= tensors
    assert 2 * group.n_units == model.config.hidden_size // model.config.num_attention_heads
    assert etp.verify(model, plan, entry.inputs()).error < 1e-9


def test_averaged_heads_of_a_graph_network_can_go() -> None:
    entry = ENTRIES["pyg:gat_ppi_small"]
    model, inputs = small(entry), entry.inputs()
    plan = etp.trace(model, inputs)
    last = [group for group in plan.prunable if group.kind == "heads"][-1]
    dense = model(*inputs)
    keep = torch.ones(plan.n_units, dtype=torch.bool)
    for group, span in plan.spans():
        if group is last:
            keep[span.start] = False
    zero_units_(model, plan, keep)
    zeroed = model(*inputs)
    etp.prune_(model, plan, etp.Selection.from_flat(plan, keep))
    assert not torch.allclose(zeroed, dense)
    assert torch.allclose(model(*inputs), zeroed, atol=1e-6), "removing a head of zeros changed the mean"
