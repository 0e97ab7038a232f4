"""The models of the speed benchmark, each with its inputs and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Case:
    """A model in training mode, its inputs, and what of its output is trained."""

    model: nn.Module
    inputs: Any
    example: Any

    def loss(self) -> Tensor:
        """A scalar that depends on every output."""
        out = self.model(**self.inputs) if isinstance(self.inputs, dict) else self.model(self.inputs)
        tensor: Tensor = out if isinstance(out, Tensor) else out.logits
        return tensor.square().mean()


def _images(name: str, batch: int) -> Case:
    import torchvision

    x = torch.randn(batch, 3, 224, 224)
    return Case(torchvision.models.get_model(name).train(), x, x[:1])


def _resnet56() -> Case:
    from etp_graph.demo.zoo.models import resnet56

    x = torch.randn(128, 3, 32, 32)
    return Case(resnet56().train(), x, x[:1])


def _bert() -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(num_labels=2)).train()
    ids = torch.randint(1, 30_000, (8, 64))
    return Case(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"input_ids": ids[:1, :16]})


def llama(layers: int, *, width: int = 256, heads: int = 8, vocabulary: int = 1000, inner: int | None = None) -> Case:
    """A Llama of transformers with as many layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner or 4 * width, num_attention_heads=heads, num_hidden_layers=layers,
        num_key_value_heads=heads, vocab_size=vocabulary, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(0, vocabulary, (1, 16), device="cpu")
    return Case(LlamaForCausalLM(config).eval(), {"input_ids": ids}, {"input_ids": ids})


CASES: dict[str, Callable[[], Case]] = {
    "ResNet-56, batch 128 at 32": _resnet56,
    "ResNet-50, batch 8 at 224": lambda: _images("resnet50", 8),
    "ViT-B/16, batch 4": lambda: _images("vit_b_16", 4),
    "BERT-base, 8 x 64 tokens": _bert,
    "Llama-like, 8 layers": lambda: llama(8),
    "Llama-like, 32 layers": lambda: llama(32),
    "Llama-like, 128 layers": lambda: llama(128),
    "DenseNet-201": lambda: _images("densenet201", 1),
    "ViT-L/16": lambda: _images("vit_l_16", 1),
}
"""By the names of the page."""
