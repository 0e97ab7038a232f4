"""Padding is no data, and a group that no module shows does not stop the others from being recorded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph import collect, criteria
from etp_graph.collect import Observations, UnwatchedGroups
from tests.support.models.toy import Toy, toy_plan
from tests.support.recorded_batches import batches

Inputs = Mapping[str, Tensor]
IDS = torch.randint(3, 40, (6, 9), generator=torch.Generator().manual_seed(0))
LENGTHS = (9, 3, 5, 9, 1, 5)
MASK = (torch.arange(9) < torch.tensor(LENGTHS).unsqueeze(1)).long()


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40,
    ))  # fmt: skip


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
    ))  # fmt: skip


def bart() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BartForConditionalGeneration(transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=12, decoder_ffn_dim=12, max_position_embeddings=40,
    ))  # fmt: skip


class Encoder(nn.Module):
    """PyTorch's own encoder layer, with True where there is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 12, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.layer(self.table(input_ids), src_key_padding_mask=attention_mask == 0)
        return self.head(x[:, 0])


def pairs(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Inputs of an encoder and a decoder of one length, of which only the encoder's have padding."""
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": IDS[: len(ids)]}


def one(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": mask}


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor, Tensor], dict[str, Tensor]]]] = {
    "bert": (bert, one), "llama": (llama, one), "bart": (bart, pairs), "torch": (Encoder, one),
}  # fmt: skip


def prepared(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build().double().eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def record(model: nn.Module, plan: etp.Plan, inputs: list[dict[str, Tensor]], *names: str) -> Observations:
    with collect.activations(model, plan, *names) as found, torch.no_grad():
        for one_ in inputs:
            found.labels(torch.arange(6)[: len(one_["input_ids"])] % 2)
            model(**one_)
    return found


@pytest.mark.parametrize("name", CASES)
def test_statistics_do_not_depend_on_padding(name: str) -> None:
    build, inputs = CASES[name]
    model = prepared(build)
    plan = etp.trace(model, inputs(IDS, torch.ones_like(MASK)), check=False)
    names = ("activation", "hrank")
    alone = [inputs(IDS[i : i + 1, :n], MASK[i : i + 1, :n]) for i, n in enumerate(LENGTHS)]
    if name == "bart":
        alone = [{**x, "decoder_input_ids": IDS[i : i + 1]} for i, x in enumerate(alone)]
    padded = record(model, plan, [inputs(IDS, MASK)], *names)
    wanted = record(model, plan, alone, *names)
    for statistic in names:
        torch.testing.assert_close(padded.values[statistic], wanted.values[statistic], equal_nan=True)
    longer = inputs(torch.cat([IDS, IDS], 1), torch.cat([MASK, torch.zeros_like(MASK)], 1))
    if name != "bart":
        found = record(model, plan, [longer], "activation").values["activation"]
        torch.testing.assert_close(found, padded.values["activation"], equal_nan=True)
    without = record(model, plan, [inputs(IDS, torch.ones_like(MASK))], "activation").values["activation"]
    assert not torch.allclose(without.nan_to_num(), padded.values["activation"].nan_to_num())


def test_labels_stay_with_their_samples_and_positional_masks_count() -> None:
    model = prepared(Encoder)
    plan = etp.trace(model, (IDS, MASK), check=False)
    padded = record(model, plan, [one(IDS, MASK)], "f_statistic").values["f_statistic"]
    seen: list[Tensor] = []
    model.layer.linear2.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with collect.activations(model, plan, "f_statistic") as found, torch.no_grad():
        found.labels(torch.arange(6) % 2)
        model(IDS, MASK)
    torch.testing.assert_close(found.values["f_statistic"], padded, equal_nan=True)
    means = torch.stack([x[:n].mean(0) for x, n in zip(seen[0], LENGTHS, strict=True)])
    a, b = means[::2], means[1::2]
    between = 3 * (a.mean(0) - means.mean(0)).square() + 3 * (b.mean(0) - means.mean(0)).square()
    within = (a - a.mean(0)).square().sum(0) + (b - b.mean(0)).square().sum(0)
    span = next(span for group, span in plan.spans() if group.name == "layer.linear1")
    torch.testing.assert_close(padded[span], between / (within / 4))


def test_a_group_that_no_module_shows_is_named_and_ranked_by_its_weights() -> None:
    torch.manual_seed(0)
    model, plan = Toy().double().eval(), toy_plan()
    first, *rest = plan.groups
    blind = replace(plan, groups=(replace(first, attributes=()), *rest))
    with pytest.warns(UnwatchedGroups, match="'conv1'"), collect.activations(model, blind, "activation") as found:
        model(batches(torch.float64)[0][0])
    spans = {group.name: span for group, span in blind.spans()}
    scores = criteria.activation(model, blind, record=found)
    norms = criteria.magnitude(model, blind)[spans["conv1"]]
    torch.testing.assert_close(scores[spans["conv1"]], norms)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with collect.activations(model, plan, "activation") as whole:
            model(batches(torch.float64)[0][0])
    wanted = criteria.activation(model, plan, record=whole)[spans["conv2"]]
    torch.testing.assert_close(scores[spans["conv2"]], wanted)
    raw = found.read("activation", blind)
    assert bool(raw.isfinite().all())


class Calls(nn.Module):
    """A layer (3 -> 8) whose reader is called as a function, and one (2 -> 8) whose reader is called as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.a(x).relu(), self.b.weight, self.b.bias)
        return self.d(self.c(x.tanh()).relu())


def test_compress_goes_on_when_a_reader_is_never_called(tmp_path: Any) -> None:
    def train(model: nn.Module, phase: etp.Phase) -> None:
        if phase.name == "calibrate":
            model(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))
            return
        phase.attach(torch.optim.SGD(model.parameters(), lr=0.0), steps=1)

    def run() -> nn.Module:
        torch.manual_seed(0)
        model = Calls()
        etp.compress(model, torch.randn(2, 3), train=train, evaluate=lambda m: 0.0, method="hrank", params=0.7,
                     checkpoint=tmp_path / "run")  # fmt: skip
        return model

    with pytest.warns(UnwatchedGroups, match="'a'"):
        first = run()
    again = run()
    assert [p.shape for p in again.parameters()] == [p.shape for p in first.parameters()]
