"""Configurations of transformers: what building a class with a changed one may raise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from etp_graph.depth import remove_blocks_
from etp_graph.errors import EtpError


def test_a_lack_of_memory_while_a_class_is_built_is_raised_and_changes_nothing() -> None:
    full = False

    class Large(LlamaModel):
        def __init__(self, config: Any) -> None:
            if full:
                raise MemoryError("no room for the layers")
            super().__init__(config)

    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    model, full = Large(config), True
    before: Any = model.layers
    with pytest.raises((MemoryError, EtpError), match="no room for the layers"):
        remove_blocks_(model, ["layers.1"], torch.zeros(1, 4, dtype=torch.long))
    assert len(before) == 3 and config.num_hidden_layers == 3
