"""Masks on single weights: they act, they have the share of zeros that the schedule says, and they leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.common.machine import nonzero
from benchmarks.models.recurrent import LanguageModel
from benchmarks.weights_or_units.contestants import SCHEDULE
from benchmarks.weights_or_units.masks import Masks, target


def language_model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(nn.LSTM, embedding=8, hidden=12, vocabulary=30)


IDS = torch.arange(30).view(3, 10)


def test_masks_act_in_the_forward_of_every_matrix() -> None:
    """The masked network computes what an ordinary one with the same zeros does, whichever matrix they are in."""
    model, plain = language_model().eval(), language_model().eval()
    masks = Masks(model)
    before = model(IDS)
    assert torch.equal(before, plain(IDS))
    masks.raise_to(0.6)
    with torch.no_grad():
        for module, name in masks.weights:
            where = next(key for key, one in model.named_modules() if one is module)
            weight = plain.get_submodule(where).get_parameter(name)
            smallest = weight.abs().flatten().argsort()[: round(0.6 * weight.numel())]
            weight.view(-1)[smallest] = 0
            changed = plain(IDS)
            assert not torch.equal(changed, before), f"zeros in {where}.{name} change nothing"
            before = changed
    assert torch.allclose(model(IDS), before, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.875, 0.95])
def test_share_of_zeros_is_that_of_the_schedule_in_every_matrix(share: float) -> None:
    model = language_model()
    masks = Masks(model)
    assert len(masks.weights) == 2 + 4  # embedding and decoder, two layers with two matrices each
    for progress in (0.0, 0.2, 0.5, 0.5, 1.0):
        masks.raise_to(share * SCHEDULE(progress))
        for module, name in masks.weights:
            mask = getattr(module, f"{name}_mask")
            assert int((mask == 0).sum()) == round(share * SCHEDULE(progress) * mask.numel())
    masks.remove()
    assert nonzero(model) == target(model, share)
    assert all(bool(p.all()) for name, p in model.named_parameters() if "bias" in name)


def test_masks_are_by_the_weights_after_the_last_step_and_never_taken_back() -> None:
    model = language_model()
    masks = Masks(model)
    masks.raise_to(0.5)
    model(IDS).sum().backward()
    first = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert not model.decoder.weight_orig.grad[first["decoder.weight_mask"] == 0].any()
    with torch.no_grad():
        model.decoder.weight_orig.copy_(torch.linspace(1, 2, 360).view(30, 12))
    masks.raise_to(0.6)
    kept = first["decoder.weight_mask"].flatten().nonzero().flatten()
    gone = kept[: 216 - 180]  # the smallest of those that were left
    assert not model.decoder.weight_mask.flatten()[gone].any()
    assert all(bool((buffer <= first[name]).all()) for name, buffer in model.named_buffers())


def test_without_masks_the_network_is_an_ordinary_one() -> None:
    model = language_model().eval()
    names = {name for name, _ in model.named_parameters()}
    masks = Masks(model)
    masks.raise_to(0.5)
    with torch.no_grad():
        masked = model(IDS)
        masks.remove()
        assert torch.equal(model(IDS), masked)
    assert {name for name, _ in model.named_parameters()} == names
    assert not list(model.buffers())
    assert not any(module._forward_pre_hooks for module in model.modules())
