"""Stand-ins: the same function as the original, in its place only where surgery needs it, and declared by users."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import etp_graph as etp
from benchmarks.models import registry
from etp_graph.model import run_model, tensors_of
from etp_graph.standins import _registry, standin, standing_in
from etp_graph.standins._registry import Row, register_row
from etp_graph.standins._source import rewrite
from etp_graph.verification._sampling import random_selection

OPTIONS = list(itertools.product((False, True), repeat=4))


@pytest.mark.parametrize(("batch_first", "bias", "extra", "other_widths"), OPTIONS)
def test_multihead_attention_computes_what_the_original_computes(
    batch_first: bool, bias: bool, extra: bool, other_widths: bool
) -> None:
    torch.manual_seed(0)
    width = 10 if other_widths else None
    original = nn.MultiheadAttention(
        12, 3, bias=bias, add_bias_kv=extra, add_zero_attn=extra, kdim=width, vdim=width, batch_first=batch_first
    ).eval()
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    query, key = torch.randn(2, 5, 12), torch.randn(2, 7, width or 12)
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 4:] = True
    masks = [
        {}, {"key_padding_mask": padding}, {"attn_mask": torch.randn(5, 7)}, {"attn_mask": torch.randn(6, 5, 7)},
        {"attn_mask": torch.rand(5, 7) > 0.8, "key_padding_mask": padding}, {"average_attn_weights": False},
    ]  # fmt: skip
    for options, need_weights in itertools.product(masks, (False, True)):
        with torch.no_grad():
            want = original(query, key, key, need_weights=need_weights, **options)
            with standing_in(original):
                got = original(query, key, key, need_weights=need_weights, **options)
        torch.testing.assert_close(got[0], want[0], equal_nan=True, rtol=1e-4, atol=1e-5)
        assert (got[1] is None) == (want[1] is None)
        if want[1] is not None:
            torch.testing.assert_close(got[1], want[1], equal_nan=True, rtol=1e-4, atol=1e-5)


def test_a_single_sequence_without_batch() -> None:
    original = nn.MultiheadAttention(12, 3).eval()
    x = torch.randn(5, 12)
    want = original(x, x, x)
    with standing_in(original):
        got = original(x, x, x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layers_with_their_fast_path(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(nn.Linear(7, 12), nn.TransformerEncoder(layer, 2), nn.Linear(12, 3)).eval()
    x = torch.randn(2, 5, 7)
    plan = etp.trace(model, x, prune="all", check=False)
    assert {group.kind for group in plan.prunable} == {"heads", "head_dims", "neurons", "stream"}
    etp.verify(model, plan, x)
    etp.prune_(model, plan, random_selection(plan, plan.prunable, 0.5, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        fast = model(x)  # PyTorch's fused operator must not take the pruned layer
    torch.testing.assert_close(fast, model(x).detach())


def test_decoders_with_cross_attention() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(12, 4, 2, 2, 20, batch_first=True).eval()
    inputs = (torch.randn(2, 5, 12), torch.randn(2, 6, 12))
    plan = etp.trace(model, inputs, check=False)
    assert sum(group.kind == "heads" for group in plan.prunable) == 6
    etp.verify(model, plan, inputs)


class Tokens(nn.Module):
    """A module that nobody knows: its products are computed by a library that PyTorch does not see."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer in (self.q, self.k, self.v))
        return self.o(foreign(q, k, v, heads=self.heads))


def foreign(*projected: Tensor, heads: int) -> Tensor:
    q, k, v = (
        t.detach().numpy().reshape(*t.shape[:2], heads, 4).transpose(0, 2, 1, 3) for t in projected
    )  # fmt: skip
    scores = np.exp(q @ k.transpose(0, 1, 3, 2) / 2)
    mixed = scores / scores.sum(-1, keepdims=True) @ v
    return torch.from_numpy(mixed.transpose(0, 2, 1, 3).reshape(*projected[0].shape))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.tokens, self.last = nn.Linear(5, 12), Tokens(), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.tokens(self.first(x)))


@pytest.fixture
def rows() -> Iterator[None]:
    before = dict(_registry.ROWS)
    yield
    _registry.ROWS.clear()
    _registry.ROWS.update(before)


def declare() -> None:
    @etp.register_standin(Tokens)
    class PrunableTokens(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            split = (x.shape[0], x.shape[1], -1, self.size)
            q, k, v = (layer(x).view(split).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.o(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))


@pytest.mark.usefixtures("rows")
def test_a_user_declares_a_stand_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 4, 5)
    declare()
    plan = etp.trace(model, x, check=False)
    assert type(model.tokens) is Tokens, "tracing left another class behind"
    assert ("tokens.q", "heads", 3) in {(g.name, g.kind, g.n_units) for g in plan.prunable}
    dense = model(x)
    etp.verify(model, plan, x, gradients=False)
    etp.prune_(model, plan, random_selection(plan, plan.prunable, 0.4, torch.Generator().manual_seed(0)))
    assert type(model.tokens) is not Tokens
    assert model(x).shape == dense.shape
    etp.save(model, tmp_path / "pruned")
    assert torch.equal(etp.load(tmp_path / "pruned", build=Net).eval()(x), model(x))
    _registry.ROWS.pop(f"{__name__}.Tokens")
    with pytest.raises(etp.CheckpointError, match=r"'tokens'.*import the code that registers it"):
        etp.load(tmp_path / "pruned", build=Net)


@pytest.mark.usefixtures("rows")
def test_without_it_attention_is_locked_and_a_warning_names_class_and_remedy() -> None:
    model, x = Net().eval(), torch.randn(2, 4, 5)
    with pytest.warns(
        etp.UnprunableAttention, match=r"Tokens \('tokens'\).*leaves PyTorch.*register_standin\(Tokens\)"
    ):
        plan = etp.trace(model, x)
    assert {group.name for group in plan.prunable} == {"first", "tokens.o"}, "the rest of the model is still prunable"
    assert all(group.locked for group in plan.groups if group.name in ("tokens.q", "tokens.k", "tokens.v"))


@pytest.mark.usefixtures("rows")
def test_a_rewrite_whose_text_is_not_there_declares_nothing() -> None:
    rewrite(f"{__name__}.Tokens", ("no such text", "anything"))
    assert standin(Tokens()) is None


@pytest.mark.usefixtures("rows")
def test_classes_come_back_after_an_error() -> None:
    register_row(Tokens, Row(lambda _: nn.Identity))
    model = Net()
    with pytest.raises(RuntimeError, match="stop"), standing_in(model):
        raise_inside(model)
    assert type(model.tokens) is Tokens


def raise_inside(model: Net) -> None:
    assert type(model.tokens) is nn.Identity
    raise RuntimeError("stop")


class Square(nn.Module):
    """The usual self-made attention: it takes the width of its heads from its input."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.scale = 4**-0.5

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


def test_self_made_attention_needs_no_row() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 12), Square(), nn.Linear(12, 2)).eval(), torch.randn(2, 4, 5)
    plan = etp.trace(model, x, check=False)
    assert {g.kind for g in plan.prunable} >= {"heads"}
    etp.verify(model, plan, x)


@pytest.mark.parametrize("name", ["self-made", "blip"])
def test_pruned_models_are_copied_and_pickled_with_their_classes(name: str) -> None:
    torch.manual_seed(0)
    if name == "blip":
        entry = registry()["hf:blip_caption"]
        model, x = entry.build(), entry.inputs()
    else:
        model, x = nn.Sequential(nn.Linear(5, 12), Square(), nn.Linear(12, 2)).eval(), torch.randn(2, 4, 5)
    plan = etp.trace(model, x, prune="heads")
    etp.prune_(model, plan, random_selection(plan, plan.prunable, 0.4, torch.Generator().manual_seed(0)))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    want = tensors_of(run_model(model, x))[0]
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(tensors_of(run_model(other, x))[0], want)


class Averaged(nn.Module):
    """Attention that returns the mean of its weights over the heads."""

    def __init__(self, extra: bool) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(6, 12), nn.Linear(12, 3)
        self.att = nn.MultiheadAttention(12, 4, batch_first=True, add_bias_kv=extra, add_zero_attn=extra)

    def forward(self, x: Tensor, **masks: Tensor) -> tuple[Tensor, Tensor]:
        x = self.i(x)
        y, weights = self.att(x, x, x, **masks)
        return self.o(y), weights


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("masked", [(), ("attn_mask",), ("key_padding_mask",), ("attn_mask", "key_padding_mask")])
def test_removed_heads_keep_their_share_of_averaged_weights(masked: tuple[str, ...], extra: bool) -> None:
    torch.manual_seed(0)
    all_masks = {
        "attn_mask": torch.randn(5, 5),
        "key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
    }
    model, inputs = Averaged(extra).eval(), {"x": torch.randn(2, 5, 6), **{name: all_masks[name] for name in masked}}
    for left in (3, 2):  # also of a model that was pruned before
        plan = etp.trace(model, inputs)
        heads = next(group for group in plan.prunable if group.kind == "heads")
        assert etp.verify(model, plan, inputs).error < 1e-9
        keep = {heads.name: torch.arange(heads.n_units) < left}
        silent = copy.deepcopy(model)
        with torch.no_grad():
            for name, tensor in silent.named_parameters():
                for piece in heads.slices:
                    gone = ~keep[heads.name][torch.as_tensor(list(piece.unit))]
                    if piece.tensor == name:
                        tensor.index_fill_(piece.axis, torch.as_tensor(list(piece.index))[gone], 0.0)
            want = silent(**inputs)
            etp.prune_(model, plan, etp.Selection(keep))
            torch.testing.assert_close(model(**inputs), want)
