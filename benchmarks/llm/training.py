"""Training of a pruned language model for a few hundred steps: all weights, LoRA, distillation, or a sparse phase."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import etp_graph as etp
from benchmarks.common.precision import autocast
from etp_graph.recovery import Distillation

WARM = 0.1
"""Share of the steps in which the rate grows to its peak; it falls to zero by a cosine."""

RANK = 8
"""Of the adapters, as in LLM-Pruner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """A way to train.

    Attributes:
        rates: peaks of the learning rate that are tried on the validation text, at the same number of steps each.
        adapters: only adapters of rank 8 are trained, at all linear layers of the blocks; then they are merged.
        teacher: half of the loss is the distance to the dense model.
        sparse: the first half of the steps is a sparse phase that begins with the dense model.
        source: where the way comes from.
    """

    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    adapters: bool = False
    teacher: bool = False
    sparse: bool = False
    source: str = ""


RECOVERIES: Mapping[str, Recovery] = {
    "full": Recovery(source="all weights, AdamW"),
    "lora": Recovery(
        rates=(3e-4, 1e-3, 3e-3, 1e-2), adapters=True, source="Hu et al. 2022, as LLM-Pruner (Ma et al. 2023)"
    ),
    "distilled": Recovery(teacher=True, source="all weights, `etp.recovery.Distillation` with its defaults"),
    "etp-global": Recovery(
        sparse=True,
        source="this library: `compress` with the method `etp` and scores that are compared across groups, half of the "
        "steps sparse, half fine-tuning",
    ),
}  # fmt: skip


def train_(
    model: nn.Module,
    windows: Tensor,
    rate: float,
    *,
    around: AbstractContextManager[Distillation | None] | None = None,
    attach: Callable[[torch.optim.Optimizer], object] = lambda optimizer: None,
) -> None:
    """Train on one window [tokens] a step, with AdamW and gradients clipped to norm 1.

    Forward passes are in bfloat16 autocast where the processor computes in it.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    attach(optimizer)
    total = len(windows)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_peak(step, total))
    model.train()
    with around or nullcontext() as distillation:
        for window in windows:
            with autocast("bf16", "cpu"):
                loss = model(input_ids=window[None], labels=window[None], use_cache=False).loss
                loss = loss if distillation is None else distillation.mixed(loss)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()


def recovered(model: Any, teacher: nn.Module, windows: Tensor, recovery: Recovery, rate: float) -> Any:
    """The trained model. The given one is changed, and the teacher is not."""
    model.requires_grad_(True)
    if not recovery.adapters:
        around = Distillation(model, teacher) if recovery.teacher else None
        train_(model, windows, rate, around=around)
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped: Any = get_peft_model(model, config)
    train_(wrapped, windows, rate)
    return wrapped.merge_and_unload()


def pruned_sparsely(model: Any, batches: Sequence[Mapping[str, Any]], windows: Tensor, params: int, rate: float) -> Any:
    """A copy that lost its units in a sparse phase of half of the steps, and was fine-tuned for the other half."""
    copied, halves = copy.deepcopy(model), windows.tensor_split(2)
    copied.requires_grad_(True)

    def train(one: nn.Module, phase: etp.Phase) -> None:
        part = halves[0] if phase.name == "sparse" else halves[1]
        train_(one, part, rate, attach=lambda optimizer: phase.attach(optimizer, steps=len(part)))

    etp.compress(
        copied, batches[0], train=train, evaluate=lambda one: 0.0, method="etp", check=False, progress=False,
        budget=etp.Budget(params=params, scope="global"),
    )  # fmt: skip
    return copied.eval()


def _share_of_peak(step: int, total: int) -> float:
    warm = max(round(WARM * total), 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))
