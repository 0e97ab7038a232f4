"""The check of a trace refutes plans that are wrong in one place, as a wrong rule of the tracer would make them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import etp_graph as etp
from benchmarks.models import registry
from etp_graph.plan import Group, Slice
from etp_graph.plan._groups import as_tensor
from etp_graph.verification import _verify, lock_what_fails
from etp_graph.verification._trials import SCREENED, Trials

MODELS = ("cifar_resnet20", "pyg:gat_ppi_small", "hf:llama_gqa", "rnn:lstm_lm")
MORE = ("hf:bert", "hf:t5", "hf:gemma3", "informer", "cifar_densenet40", "timm:mobilenetv2_035", "pyg:sage3")

DEEP = ("resnet152", "densenet201", "vit_b_16", "swin_t", "efficientnet_b4", "hf:gemma3", "timm:repghostnet_050")

Mutant = tuple[str, Group, Slice, etp.Plan]


def mutants(plan: etp.Plan) -> Iterator[Mutant]:
    """Yield plans with one slice that is forgotten, or whose units are in another order."""
    for group in plan.prunable:
        if group.n_units < 3:
            continue
        for number, piece in enumerate(group.slices):
            before, after = group.slices[:number], group.slices[number + 1 :]
            units = as_tensor(piece.unit)
            changed: dict[str, tuple[Slice, ...]] = {
                "shift": (*before, replace(piece, unit=(units + 1) % group.n_units), *after),  # type: ignore[arg-type]
                "reverse": (*before, replace(piece, unit=group.n_units - 1 - units), *after),  # type: ignore[arg-type]
            }
            if before or after:
                changed["forget"] = (*before, *after)
            for what, slices in changed.items():
                wrong = replace(group, slices=slices)
                groups = tuple(wrong if one is group else one for one in plan.groups)
                yield what, group, piece, replace(plan, groups=groups)


def is_equivalent(piece: Slice) -> bool:
    """Biases of keys add the same to all scores of a query, which the softmax takes away again."""
    return piece.tensor.endswith(("key.bias", "k_proj.bias", "k_lin.bias"))


def is_refuted(model: nn.Module, inputs: Any, group: Group, wrong: etp.Plan) -> bool:
    try:
        checked = lock_what_fails(model, wrong, inputs)
    except etp.EtpError:
        return True
    return checked[group.name].locked is not None


@pytest.mark.parametrize(
    ("name", "count"),
    [*((name, 6) for name in MODELS), *(pytest.param(name, 150, marks=pytest.mark.slow) for name in (*MODELS, *MORE))],
)
def test_wrong_plans_are_refuted(name: str, count: int, tell: Callable[[str], None]) -> None:
    torch.manual_seed(0)
    entry = registry()[name]
    model, inputs = entry.build(), entry.small()
    found = [one for one in mutants(etp.trace(model, inputs)) if not is_equivalent(one[2])]
    chosen = random.Random(0).sample(found, min(count, len(found)))
    missed = [
        (what, group.name, piece.tensor)
        for what, group, piece, wrong in chosen
        if not is_refuted(model, inputs, group, wrong)
    ]
    tell(f"{len(chosen)} of {len(found)} wrong plans, {len(chosen) - len(missed)} refuted")
    assert not missed


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_rounding_of_right_plans_is_below_the_screen(name: str, tell: Callable[[str], None]) -> None:
    entry = registry()[name]
    torch.manual_seed(0)
    model, inputs = entry.build(), entry.inputs()
    plan = etp.trace(model, inputs, check=False)
    screen = Trials(
        model, plan, inputs, gradients=False, randomize=True, seed=0, dtypes=(torch.float32,)
    )  # fmt: skip
    largest = max(screen.trial(plan.prunable, ratio).error for ratio in (0.5, 0.0, 1.0))
    tell(f"{largest:.1e}")
    assert largest < SCREENED


def test_a_doubt_of_the_screen_is_judged_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a screen that doubts everything locks nothing that float64 finds right, and the other way round."""
    entry = registry()["cifar_resnet20"]
    model, inputs = entry.build(), entry.small()
    plan = etp.trace(model, inputs, check=False)
    monkeypatch.setattr(_verify, "SCREENED", -1.0)
    assert lock_what_fails(model, plan, inputs).fingerprint == plan.fingerprint
    _, group, _, wrong = next(mutants(plan))
    assert is_refuted(model, inputs, group, wrong)


def test_the_screen_spares_float64_where_rounding_explains_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    entry = registry()["cifar_resnet20"]
    model, inputs = entry.build(), entry.small()
    plan = etp.trace(model, inputs, check=False)
    make = _verify.Trials

    def noting(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        seen.append(made.dtype)
        return made

    monkeypatch.setattr(_verify, "Trials", noting)
    lock_what_fails(model, plan, inputs)
    assert seen == [torch.float32]
