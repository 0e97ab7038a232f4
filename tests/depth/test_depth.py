"""Blocks that are removed are those that a model can skip; what is left computes the same, and is saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import etp_graph as etp
from benchmarks.models import huggingface as registry
from etp_graph.errors import EquivalenceError, PlanError, ScoreError
from etp_graph.model import run_model, tensors_of
from etp_graph.surgery import get_record

TOKENS = {"input_ids": torch.arange(24).view(2, 12), "use_cache": False}


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4, **more}
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=24, intermediate_size=40, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def qwen2() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, use_sliding_window=True, sliding_window=4, max_window_layers=2,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).eval()


def of_registry(table: dict[str, registry.Row], name: str, **more: Any) -> Any:
    cls, config, _ = table[name]
    torch.manual_seed(0)
    return registry.from_config(cls, {**config, **more})().eval()


class Own(nn.Module):
    """Residual blocks with numbers of their own, in a loop over a count."""

    class Block(nn.Module):
        def __init__(self, layer_idx: int) -> None:
            super().__init__()
            self.layer_idx = layer_idx
            self.norm, self.inner, self.out = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(self.inner(self.norm(x)).relu())

    def __init__(self) -> None:
        super().__init__()
        self.n_layers = 3
        self.layers = nn.ModuleList([self.Block(i) for i in range(3)])
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.n_layers):
            x = self.layers[i](x)
        return self.head(x)


def make(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 64, 64)
    if name == "llama":
        return llama(), TOKENS
    if name == "qwen2":
        return qwen2(), TOKENS
    if name == "bert":
        return of_registry(registry.ENCODERS, "bert", num_hidden_layers=3), registry.ENCODERS["bert"][2]()
    if name == "t5":
        cls = of_registry(registry.SEQUENCES, "t5", num_layers=3, num_decoder_layers=3)
        return cls, registry.SEQUENCES["t5"][2]()
    if name == "own":
        return Own().eval(), torch.randn(4, 8)
    if name == "transformer encoder":
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval(), torch.randn(2, 5, 16)
    if name.startswith("timm:"):
        return timm.create_model(name[5:], num_classes=5).eval(), pixels
    return torchvision.models.get_model(name, num_classes=5).eval(), pixels


MODELS = {
    "llama": True, "qwen2": True, "bert": False, "t5": True, "own": True, "transformer encoder": True, "resnet18": True,
    "mobilenet_v2": True, "timm:test_vit": True, "timm:convnext_atto": True,
}  # fmt: skip
"""Model -> whether its blocks compute the identity once what they add is zero."""


@torch.no_grad()
def jitter(model: nn.Module) -> nn.Module:
    """Replace biases and norms by random values, because zero biases hide errors."""
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return model


def out(model: nn.Module, inputs: Any) -> Tensor:
    return next(t for t in tensors_of(run_model(model, inputs)) if t.is_floating_point())


class Skip(nn.Module):
    """Stand at the place of a block and hand on its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = [block]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"][0], name) if name != "block" else self.__dict__["block"]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = self.block[0](x, *args, **kwargs)
        return x if isinstance(given, Tensor) else (x, *given[1:])


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_the_model_that_skips_the_block(name: str) -> None:
    model, inputs = make(name)
    jitter(model)
    blocks = etp.depth.find_blocks(model, inputs)
    assert {block.exact for block in blocks} == {MODELS[name]}
    block = blocks[len(blocks) // 2]
    skipping, shorter = copy.deepcopy(model), copy.deepcopy(model)
    around = skipping.get_submodule(block.container)
    key = block.name.rpartition(".")[2]
    around._modules[key] = Skip(around._modules[key])  # type: ignore[arg-type]
    error = etp.depth.remove_blocks_(shorter, [block], inputs)
    assert error < 1e-5
    dense = out(model, inputs)
    want, got = out(skipping, inputs), out(shorter, inputs)
    assert not torch.allclose(want, dense, rtol=1e-3)  # the block matters
    torch.testing.assert_close(got, want)
    kept = {id(p) for p in skipping.parameters()}
    for a, b in zip((want, got), (skipping, shorter)):
        (a.double() ** 2).sum().backward()
        assert any(p.grad is not None for p in b.parameters())
    grads = [[p.grad for p in m.parameters()] for m in (skipping, shorter)]
    assert len(grads[0]) == len(grads[1]) == len(kept)
    for a, b in zip(*grads):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, shorter))
    assert before - after == block.parameters


@torch.no_grad()
def silence(block: nn.Module, names: tuple[str, ...]) -> None:
    """Set weights and biases of the last projections to zero."""
    for name in names:
        for p in block.get_submodule(name).parameters():
            p.zero_()


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("llama", ("self_attn.o_proj", "mlp.down_proj")),
        ("t5", ("layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo")),
        ("own", ("out",)),
        ("transformer encoder", ("self_attn.out_proj", "linear2")),
        ("resnet18", ("bn2",)),
        ("timm:test_vit", ("attn.proj", "mlp.fc2")),
        ("timm:convnext_atto", ("mlp.fc2",)),
    ],
)
def test_an_exact_block_is_free_once_its_last_projections_are_zero(name: str, last: tuple[str, ...]) -> None:
    model, inputs = make(name)
    jitter(model)
    block = next(b for b in etp.depth.find_blocks(model, inputs) if not b.name.startswith("decoder"))
    masked, shorter = copy.deepcopy(model), copy.deepcopy(model)
    silence(masked.get_submodule(block.name), last)
    etp.depth.remove_blocks_(shorter, [block.name], inputs)
    with torch.no_grad():
        torch.testing.assert_close(out(shorter, inputs), out(masked, inputs))


def test_numbers_of_layers_follow_and_the_shared_configuration_stays() -> None:
    model = qwen2()
    config = model.config
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    etp.depth.remove_blocks_(model, ["model.layers.1", "model.layers.2"], TOKENS)
    assert model.config.num_hidden_layers == 2
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.model.config is model.config
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    assert config.num_hidden_layers == 4
    own, inputs = make("own")
    etp.depth.remove_blocks_(own, ["layers.0"], inputs)
    assert own.n_layers == 2
    assert [block.layer_idx for block in own.layers] == [0, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("make_model", [llama, qwen2])
def test_a_decoder_generates_with_and_without_cache(make_model: Any) -> None:
    model = make_model()
    etp.depth.remove_blocks_(model, ["model.layers.0", "model.layers.2"], TOKENS)
    prompt = torch.arange(6)[None]
    found = [
        model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0, eos_token_id=None)
        for cache in (True, False)
    ]
    assert torch.equal(*found)


def narrow(model: Any) -> None:
    plan = etp.export.restrict_plan(model, etp.trace(model, TOKENS))
    budget = etp.Budget(params=int(0.8 * plan.dense.params), uniform=True)
    etp.prune_(model, plan, etp.allocate(model, plan, etp.criteria.magnitude(model, plan), budget=budget))


@pytest.mark.parametrize("order", ["depth width", "width depth", "depth width depth"])
def test_depth_and_width_in_any_order_are_saved_loaded_and_exported(order: str, tmp_path: Path) -> None:
    model = llama()
    for step in order.split():
        if step == "width":
            narrow(model)
        else:
            etp.depth.shorten_(model, [TOKENS], n_blocks=1)
    expected = model(**TOKENS).logits
    folder = etp.save(model, tmp_path / "saved")
    for again in (etp.load(folder), etp.load(folder, build=llama), copy.deepcopy(model)):
        assert torch.equal(again(**TOKENS).logits, expected)
        assert get_record(again) == get_record(model)
    twice = etp.save(etp.load(folder), tmp_path / "twice")
    assert torch.equal(etp.load(twice)(**TOKENS).logits, expected)
    plain = etp.export.huggingface(model, tmp_path / "plain")
    stock = transformers.AutoModelForCausalLM.from_pretrained(plain).eval()
    assert torch.equal(stock(**TOKENS).logits, expected)
    assert stock.config.num_hidden_layers == len(model.model.layers) < 4


def test_a_model_that_only_lost_blocks_is_written_by_save_pretrained(tmp_path: Path) -> None:
    model = llama()
    etp.depth.shorten_(model, [TOKENS], n_blocks=2)
    model.save_pretrained(tmp_path / "plain")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(stock(**TOKENS).logits, model(**TOKENS).logits)


def test_a_wrong_architecture_is_refused_and_stays_whole(tmp_path: Path) -> None:
    model, inputs = make("own")
    etp.depth.remove_blocks_(model, ["layers.2"], inputs)
    folder = etp.save(model, tmp_path / "saved")
    small = Own().eval()
    small.layers = small.layers[:2]
    with pytest.raises(etp.CheckpointError, match=r"layers\.2"):
        etp.load(folder, build=small)
    other = Own().eval()
    other.head = nn.Linear(8, 3)
    with pytest.raises(etp.CheckpointError, match="head"):
        etp.load(folder, build=other)
    assert len(other.layers) == 3
    assert other.n_layers == 3


def test_the_optimizer_forgets_the_blocks() -> None:
    model, inputs = make("own")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(inputs).square().sum().backward()
    optimizer.step()
    etp.depth.remove_blocks_(model, ["layers.1"], inputs, optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} == {id(p) for p in optimizer.state}
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    optimizer.step()


def test_scores_are_their_definitions() -> None:
    model, inputs = make("own")
    blocks = etp.depth.find_blocks(model, inputs)
    batches = [inputs, torch.randn(6, 8)]
    stream, terms = torch.cat(batches), []
    with torch.no_grad():
        for block in model.layers:  # type: ignore[union-attr]
            after = block(stream)
            terms.append(sum(1 - float(a @ b / a.norm() / b.norm()) for a, b in zip(stream, after)) / len(stream))
            stream = after
    found = etp.depth.block_influence(model, blocks, batches)
    torch.testing.assert_close(found, torch.tensor(terms, dtype=torch.float64), rtol=1e-4, atol=1e-6)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    rises = etp.depth.loss_increase(model, blocks, batches, loss=loss)
    with torch.no_grad():
        for i, block in enumerate(blocks):
            shorter = copy.deepcopy(model)
            etp.depth.remove_blocks_(shorter, [block], inputs)
            rise = sum(float(loss(shorter, b) - loss(model, b)) for b in batches) / 2
            assert float(rises[i]) == pytest.approx(rise, rel=1e-4, abs=1e-6)


def test_blocks_are_scored_anew_after_each_choice() -> None:
    model, inputs = make("own")
    with torch.no_grad():  # the first two blocks add the same vector, the third one a longer vector at a right angle
        for p in model.parameters():
            p.zero_()
        for block, (axis, length) in zip(model.layers, ((0, 1.0), (0, 1.0), (1, 1.2))):  # type: ignore[arg-type]
            block.out.bias[axis] = length
        model.head.weight[0, 0] = model.head.weight[1, 1] = 1.0  # type: ignore[union-attr, index]
        dense = model(inputs)
    result = etp.depth.shorten_(
        model, [inputs], n_blocks=2, criterion="loss", loss=lambda m, x: (m(x) - dense).square().sum(1).mean()
    )
    assert result.removed == ("layers.0", "layers.2")  # one pass of scores would take both equal ones, and lose more
    assert result.scores == pytest.approx((1.0, 1.2**2))


def test_what_cannot_go_is_refused_and_nothing_changes() -> None:
    model, inputs = make("own")
    before = {name: p.clone() for name, p in model.named_parameters()}
    for names, reason in (
        (["layers.9"], "no entry"), (["head"], "no entry"), ([""], "no entry"),
        (["layers.0", "layers.0"], "twice"), (["layers.0", "layers.1", "layers.2"], "at least one"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=reason):
            etp.depth.remove_blocks_(model, names, inputs)
    with pytest.raises(PlanError, match="3 residual blocks, of which 2"):
        etp.depth.shorten_(model, [inputs], n_blocks=3)
    with pytest.raises(PlanError, match="no batches"):
        etp.depth.shorten_(model, [], n_blocks=1)
    with pytest.raises(ScoreError, match="returned no loss"):
        etp.depth.shorten_(model, [inputs], n_blocks=1, criterion="loss")
    with pytest.raises(PlanError, match="no residual block"):
        etp.depth.find_blocks(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4))
    with pytest.raises(PlanError, match=r"removed by etp_graph\.depth"):
        etp.trace(model, inputs, prune=["neurons", "blocks"])
    t5, inputs = make("t5")
    assert "encoder.block.0" not in {block.name for block in etp.depth.find_blocks(t5, inputs)}
    with pytest.raises(EquivalenceError, match=r"encoder\.block\.0"):
        etp.depth.remove_blocks_(t5, ["encoder.block.0"], inputs)
    assert len(t5.encoder.block) == t5.config.num_layers == 3
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_layers_that_share_tensors_stay() -> None:
    model, inputs = make("own")
    model.layers[1].inner = model.layers[0].inner  # type: ignore[index, union-attr]
    assert [block.name for block in etp.depth.find_blocks(model, inputs)] == ["layers.2"]
    with pytest.raises(PlanError, match="shares tensors"):
        etp.depth.remove_blocks_(model, ["layers.0"], inputs)
