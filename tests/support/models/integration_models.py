"""Small models, their data, and the training loop by hand that frameworks are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import etp_graph as etp
from etp_graph import methods

Batch = dict[str, Tensor]


class Net(nn.Module):
    """A convolutional network with a batch norm, called as transformers' models are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(6, 4),
        )  # fmt: skip

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(images)
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels),
                                                          "logits": logits}  # fmt: skip


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=16, num_labels=3,
    ))  # fmt: skip


def llama() -> nn.Module:
    """Four heads that share two keys and values; the output is tied to the embedding."""
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=16, tie_word_embeddings=True,
        use_cache=False,  # as the trainer sets it, so that a plan by hand has the same fingerprint
    ))  # fmt: skip


def images(n: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [{"images": torch.randn(3, 8, 8, generator=generator), "labels": torch.tensor(i % 4)} for i in range(n)]


def sentences(n: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(30, (8,), generator=generator), "labels": torch.tensor(i % 3)}
            for i in range(n)]  # fmt: skip


def texts(n: int) -> list[Batch]:
    found = [item["input_ids"] for item in sentences(n)]
    return [{"input_ids": ids, "labels": ids} for ids in found]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], list[Batch]]]] = {
    "cnn": (Net, images), "bert": (bert, sentences), "llama": (llama, texts),
}  # fmt: skip
METHOD = methods.get("etp")


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name][0]()


def example(name: str) -> Batch:
    return {key: value[None] for key, value in MODELS[name][1](1)[0].items() if key != "labels"}


def collate(items: list[Batch]) -> Batch:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def optimizer_of(model: nn.Module, name: str = "adam") -> Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def schedule_of(optimizer: Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))


def by_hand(
    model: nn.Module,
    steps: Iterable[list[Batch]],
    *,
    example_inputs: Any,
    prune_step: int,
    speed_up: float = 1.5,
    method: etp.methods.Method = METHOD,
    loss_of: Callable[[nn.Module, list[Batch], Batch], Tensor],
    optimizer: str = "adam",
    clip: float | None = None,
) -> list[float]:
    """Sparse phase, surgery, fine-tuning; ``steps``: the batches that each optimizer step accumulates."""
    held = optimizer_of(model, optimizer)
    scheduler = schedule_of(held)
    plan = etp.trace(model, example_inputs)
    force = method.regularizer(model, plan, steps=prune_step, budget=etp.Budget(speed_up=speed_up))
    if force is not None:
        force.attach(held)
    model.train()
    losses = []
    for number, parts in enumerate(steps, 1):
        for part in parts:
            loss = loss_of(model, parts, part)
            loss.backward()
            losses.append(float(loss.detach()))
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        held.step()
        scheduler.step()
        held.zero_grad()
        if number == prune_step:
            scores = method.scores(model, plan, regularizer=force)
            selection = etp.allocate(model, plan, scores, budget=etp.Budget(speed_up=speed_up))
            etp.prune_(model, plan, selection, optimizer=held)
            if force is not None:
                force.detach()
    return losses


def same(a: nn.Module, b: nn.Module) -> bool:
    """Equal names, shapes and values of everything in the state."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
