"""MACs of every family against counts by hand, dense and with units removed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import etp_graph as etp
from benchmarks.models import registry
from etp_graph.verification._sampling import random_selection

transformers = pytest.importorskip("transformers")
pyg = pytest.importorskip("torch_geometric.nn")


def removed(plan: etp.Plan, kind: str, count: int) -> etp.Selection:
    """The selection that removes the first ``count`` units of every prunable group of a kind."""
    keep = torch.ones(plan.n_units, dtype=torch.bool)
    for group, span in plan.spans():
        if group.kind == kind and group.locked is None:
            for start in range(0, group.n_units, group.n_units // group.blocks):
                keep[span.start + start : span.start + start + count] = False
    return etp.Selection.from_flat(plan, keep)


def transformer(d: int, heads: int, size: int, neurons: int, tokens: int, batch: int) -> int:
    """A layer of BERT: projections, scores, context, feed-forward."""
    inner = heads * size
    return batch * (4 * tokens * d * inner + 2 * tokens * tokens * inner + 2 * tokens * d * neurons)


def test_bert() -> None:
    config = transformers.BertConfig(
        hidden_size=24, num_attention_heads=4, num_hidden_layers=2, intermediate_size=40, vocab_size=31, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.randint(31, (2, 7))}
    plan = etp.trace(model, inputs, prune="all", check=False)
    head = 2 * (24 * 24 + 24 * 3)  # pooler and classifier; looking up embeddings multiplies nothing
    assert etp.cost(model, plan).macs == 2 * transformer(24, 4, 6, 40, 7, 2) + head
    fewer = etp.cost(model, plan, removed(plan, "heads", 1)).macs
    assert fewer == 2 * transformer(24, 3, 6, 40, 7, 2) + head
    narrower = etp.cost(model, plan, removed(plan, "head_dims", 2)).macs
    assert narrower == 2 * transformer(24, 4, 4, 40, 7, 2) + head


def test_gpt2_with_its_transposed_layers() -> None:
    entry = registry()["hf:gpt2"]
    model, inputs = entry.build(), entry.inputs()
    plan = etp.trace(model, inputs, check=False)
    c, (batch, tokens) = model.config, inputs["input_ids"].shape
    neurons = c.n_inner or 4 * c.n_embd
    layers = c.n_layer * transformer(c.n_embd, c.n_head, c.n_embd // c.n_head, neurons, tokens, batch)
    assert etp.cost(model, plan).macs == layers + batch * tokens * c.n_embd * c.vocab_size


@pytest.mark.parametrize("name", ["hf:llama_gqa", "hf:t5", "hf:vit", "hf:swin", "hf:bart", "hf:beit", "informer"])
def test_after_surgery_as_torch_counts(name: str) -> None:
    entry = registry()[name]
    torch.manual_seed(0)
    model, inputs = entry.build(), entry.inputs()
    plan = etp.trace(model, inputs)
    selection = random_selection(plan, plan.prunable, 0.4, torch.Generator().manual_seed(0))
    expected = etp.cost(model, plan, selection)
    etp.prune_(model, plan, selection)
    # The formula that PyTorch has for the fused attention kernel differs between CPUs: count its plain matrix products.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    # Products that are not matrix products (a rotation summed over) are counted here and not there.
    assert counter.get_total_flops() // 2 == pytest.approx(expected.macs, rel=0.02)
    assert sum(p.numel() for p in model.parameters()) == expected.params


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = pyg.GATConv(7, 5, heads=4), pyg.GATConv(20, 3, heads=2, concat=False)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.b(self.a(x, edges).relu(), edges)


def gat(nodes: int, edges: int, d: int, heads: int, channels: int) -> int:
    """Projection, two scores for each node and head, a weighted message on each edge and each self-loop."""
    inner = heads * channels
    return nodes * d * inner + 2 * nodes * inner + (edges + nodes) * inner


def test_edges_of_a_graph_attention_network() -> None:
    model = Graph().eval()
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 1, 2], [1, 2, 3, 4, 5, 0, 0, 0]])
    inputs = (torch.randn(6, 7), edges)
    plan = etp.trace(model, inputs, check=False)
    assert etp.cost(model, plan).macs == gat(6, 8, 7, 4, 5) + gat(6, 8, 20, 2, 3)
    fewer = etp.cost(model, plan, removed(plan, "heads", 1)).macs
    assert fewer == gat(6, 8, 7, 3, 5) + gat(6, 8, 15, 1, 3)


@pytest.mark.parametrize(("cls", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_steps_of_a_recurrent_network(cls: type[nn.RNNBase], gates: int) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.rnn = cls(6, 8, num_layers=2, bidirectional=True, batch_first=True)
            self.out = nn.Linear(16, 5)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.rnn(self.embed(ids))[0])

    def steps(hidden: int) -> int:
        first = 2 * gates * (hidden * 6 + hidden * hidden)
        second = 2 * gates * (hidden * 2 * hidden + hidden * hidden)
        return 3 * 4 * (first + second + 2 * hidden * 5)

    model, ids = Tagger().eval(), torch.randint(11, (3, 4))
    plan = etp.trace(model, ids, check=False)
    assert etp.cost(model, plan).macs == steps(8)
    assert etp.cost(model, plan, removed(plan, "hidden", 3)).macs == steps(5)


def test_experts_count_by_those_that_are_active() -> None:
    entry = registry()["hf:mixtral"]
    model, inputs = entry.build(), entry.inputs()
    plan = etp.trace(model, inputs, prune="all", check=False)
    c, (batch, tokens) = model.config, inputs["input_ids"].shape
    n, d = batch * tokens, c.hidden_size
    size = c.head_dim or d // c.num_attention_heads
    query, key = c.num_attention_heads * size, c.num_key_value_heads * size
    attention = n * d * (2 * query + 2 * key) + 2 * batch * tokens * tokens * query
    experts = c.num_local_experts
    active = n * c.num_experts_per_tok * 3 * d * c.intermediate_size
    rotation = etp.cost(model, plan).macs - c.num_hidden_layers * (attention + n * d * experts + active)
    rotation -= n * d * c.vocab_size
    assert 0 <= rotation <= batch * tokens * size, "positions times frequencies"
    fewer = etp.cost(model, plan).macs - etp.cost(model, plan, removed(plan, "experts", 1)).macs
    assert fewer == c.num_hidden_layers * n * d, "an expert less costs a row of the router less, and nothing else"


class NarrowGraph(nn.Module):
    """Graph attention whose last layer has one head and one class."""

    def __init__(self) -> None:
        super().__init__()
        self.first = pyg.GATConv(5, 8, heads=2)
        self.last = pyg.GATConv(16, 1, heads=1, concat=False)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x, edges).relu(), edges)
        return out


def test_one_head_of_one_class_has_a_cost() -> None:
    torch.manual_seed(0)
    model, inputs = NarrowGraph().eval(), (torch.randn(6, 5), torch.randint(0, 6, (2, 14)))
    plan = etp.trace(model, inputs, prune="all")
    selection = etp.allocate(model, plan, torch.rand(plan.n_units), budget=etp.Budget(speed_up=1.5))
    predicted = etp.cost(model, plan, selection)
    etp.prune_(model, plan, selection)
    assert etp.cost(model, etp.trace(model, inputs, prune="all")).macs == predicted.macs


@pytest.mark.parametrize(
    "name", ["hf:bert", "hf:gpt2", "hf:llama_gqa", "hf:t5", "hf:vit", "rnn:lstm_lm", "pyg:gat3", "informer"]
)
def test_the_predicted_cost_is_that_of_the_plan_after_surgery(name: str) -> None:
    entry = registry()[name]
    torch.manual_seed(0)
    model = entry.build()
    check_prediction(model, entry.small())


def test_the_predicted_cost_of_fused_projections() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True).eval()
    check_prediction(nn.Sequential(layer, nn.Linear(24, 3)).eval(), torch.randn(2, 5, 24))


def check_prediction(model: nn.Module, inputs: object) -> None:
    plan = etp.trace(model, inputs, prune="all")
    selection = random_selection(plan, plan.prunable, 0.4, torch.Generator().manual_seed(1))
    predicted = etp.cost(model, plan, selection)
    assert predicted.macs < etp.cost(model, plan).macs
    etp.prune_(model, plan, selection)
    after = etp.cost(model, etp.trace(model, inputs, prune="all", check=False))
    assert (after.macs, after.params) == (predicted.macs, predicted.params)
