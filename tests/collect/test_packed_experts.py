"""Neurons of packed experts are watched at the products that read them, whatever runs the experts."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import etp_graph as etp
from etp_graph import collect
from etp_graph.collect import OwnLabels, UnwatchedGroups
from tests.support.models.mixtures import MIXTURES, experts_of, mixture, tokens


def with_record(
    model: Any, data: list[Any], criterion: str
) -> tuple[etp.Plan, collect.Observations, slice, list[Tensor]]:
    """Return the plan, the record, the span of the neurons, and [x, ∂L/∂x] of all pairs of tokens and experts."""
    name, experts = experts_of(model)
    plan, gate = etp.trace(model, data[0]), experts._apply_gate
    seen: list[Tensor] = []

    def keeping(both: Tensor) -> Tensor:
        out: Tensor = gate(both)
        if out.requires_grad:
            out.retain_grad()
        seen.append(out)
        return out

    experts._apply_gate = keeping
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    with collect.activations(model, plan, criterion) as record:
        for batch in data:
            logits = model(**batch).logits
            F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten(), reduction="sum").backward()
    del experts._apply_gate
    span = {group.name: span for group, span in plan.spans()}[name]
    joined = [torch.cat(seen).detach(), torch.cat([x.grad for x in seen if x.grad is not None])]
    return plan, record, span, joined


@pytest.mark.parametrize("family", MIXTURES)
def test_fisher_is_that_of_all_pairs_of_tokens_and_experts(family: str) -> None:
    model, data = mixture(family, "grouped_mm"), tokens(2)
    _, record, span, (x, gradient) = with_record(model, data, "fisher")
    n_tokens = sum(batch["input_ids"].numel() for batch in data)
    wanted = (x * gradient).double().square().sum(0) / n_tokens / 2
    torch.testing.assert_close(record.values["fisher"][span], wanted, rtol=1e-4, atol=1e-12)
    assert not record.unwatched


@pytest.mark.parametrize("family", MIXTURES)
def test_wanda_weighs_with_the_weights_of_all_experts(family: str) -> None:
    model, data = mixture(family, "grouped_mm"), tokens(2)
    _, record, span, (x, _) = with_record(model, data, "wanda")
    down = experts_of(model)[1].down_proj.detach().double()  # [experts, d, neurons], or with the last two exchanged
    columns = down.abs().sum((0, 2 if family == "GptOss" else 1))
    wanted = columns * x.double().square().mean(0).sqrt()
    found = record.values["wanda"][span]
    torch.testing.assert_close(found / found.mean(), wanted / wanted.mean(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("criterion", ["fisher", "wanda", "obs"])
@pytest.mark.parametrize("family", MIXTURES)
def test_it_does_not_matter_what_runs_the_experts(family: str, criterion: str) -> None:
    data, found = tokens(2), []
    for implementation in ("eager", "grouped_mm"):
        model = mixture(family, implementation)
        plan = etp.trace(model, data[0])
        with collect.activations(model, plan, criterion) as record:
            for batch in data:
                logits = model(**batch).logits
                F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten(), reduction="sum").backward()
        found.append(record.values[criterion])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-9, equal_nan=True)  # locked units are NaN


@pytest.mark.parametrize("criterion", ["fisher", "kron_obs", "obs", "wanda", "flap", "activation"])
def test_silent_neurons_go_first_and_nothing_is_ranked_by_its_norm(criterion: str) -> None:
    model, data = mixture("Mixtral", "grouped_mm"), tokens(3)
    name, experts = experts_of(model)
    silent = torch.tensor([1, 2, 5, 7, 11, 13, 20, 22])
    experts.gate_up_proj.data[:, silent] = 0  # a gate of zero
    experts.down_proj.data[:, :, silent] *= 100  # which makes their norms large
    plan = etp.trace(model, data[0], prune=["neurons"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnwatchedGroups)
        found = etp.oneshot_(model, data, budget=etp.Budget(params=0.92), criterion=criterion, plan=plan)
    assert not bool(found.selection.keep[name][silent].any())


def test_labels_of_the_models_own_need_no_gradient_of_weights() -> None:
    model, data = mixture("Mixtral", "grouped_mm"), tokens(1)
    plan = etp.trace(model, data[0])
    model.requires_grad_(False)
    with collect.activations(model, plan, "fisher") as record:
        OwnLabels()(model, data[0]).backward()
    name, _ = experts_of(model)
    span = next(span for group, span in plan.spans() if group.name == name)
    assert bool((record.values["fisher"][span] > 0).all()) and not record.unwatched


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_mode_stays_after_an_exception(error: type[BaseException]) -> None:
    model, data = mixture("Mixtral", "grouped_mm"), tokens(1)
    plan = etp.trace(model, data[0])
    _, experts = experts_of(model)

    def fail(both: Tensor) -> Tensor:
        raise error("a fault of the user's")

    experts._apply_gate = fail
    before = torch._C._len_torch_function_stack()
    with pytest.raises(error, match="a fault"), collect.activations(model, plan, "wanda"):
        model(**data[0])
    assert torch._C._len_torch_function_stack() == before
    del experts._apply_gate
    hooks = [part for part in model.modules() if part._forward_hooks or part._forward_pre_hooks]
    assert not hooks


def test_experts_whose_weights_are_gathered_are_named() -> None:
    model, data = mixture("Mixtral", "batched_mm"), tokens(1)
    plan = etp.trace(model, data[0])
    with pytest.warns(UnwatchedGroups, match="experts"), collect.activations(model, plan, "wanda"):
        model(**data[0])


def test_padding_does_not_change_how_much_neurons_matter() -> None:
    """The scores of experts compare with those of heads, so that both must be means over the tokens of the data."""
    model, (batch,) = mixture("Mixtral", "grouped_mm"), tokens(1)
    plan, found = etp.trace(model, batch), []
    for padded in (0, 48):
        ids = F.pad(batch["input_ids"], (0, padded))
        mask = F.pad(torch.ones_like(batch["input_ids"]), (0, padded))
        with collect.activations(model, plan, "fisher") as record:
            logits = model(input_ids=ids, attention_mask=mask).logits[:, : batch["input_ids"].shape[1]]
            F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten(), reduction="sum").backward()
        found.append(record.values["fisher"])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-12, equal_nan=True)


def test_a_criterion_of_classes_sees_no_experts_and_says_so() -> None:
    model, data = mixture("Mixtral", "grouped_mm"), tokens(1)
    plan = etp.trace(model, data[0])

    def run() -> None:
        with collect.activations(model, plan, "f_statistic") as record:
            record.labels(torch.arange(8) % 2)
            model(**data[0])

    with pytest.warns(UnwatchedGroups, match="experts"):
        run()


@pytest.mark.parametrize("criterion", ["obs", "fisher"])
def test_more_equal_experts_change_no_score(criterion: str) -> None:
    """With equal experts the layer is the same function, however many there are."""
    from transformers import MixtralConfig, MixtralForCausalLM

    data, found = tokens(2), []
    for count in (2, 8):
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=count, num_experts_per_tok=1, use_cache=False,
        )  # fmt: skip
        model: Any = MixtralForCausalLM(config).eval()
        name, _ = experts_of(model)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim == 3:
                one = torch.randn(parameter.shape[1:], generator=generator) / 5
                parameter.data.copy_(one.expand_as(parameter))
            elif parameter.ndim == 2 and parameter.shape[0] != count:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 5)
        plan = etp.trace(model, data[0])
        with collect.activations(model, plan, criterion) as record:
            for batch in data:
                logits = model(**batch).logits
                F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten(), reduction="sum").backward()
        found.append(record.values[criterion][next(span for group, span in plan.spans() if group.name == name)])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-12)
