"""The phase in which the criterion sees data: no weight moves, and a run that was interrupted there continues."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

from etp_graph import allocate, collect, compress, methods, prune_, trace
from etp_graph.compression import Phase
from etp_graph.errors import ScoreError
from tests.support.faults import interrupted
from tests.support.models.toy import toy_plan
from tests.support.training_loops import Loop, X, Y, loss, run, toy

COLLECTED = sorted(name for name, method in methods.METHODS.items() if method.collected and not method.sparse)
each = pytest.mark.parametrize("name", COLLECTED)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@each
def test_training_in_this_phase_changes_nothing_and_the_scores_are_those_of_the_weights(name: str) -> None:
    """A loop that knows nothing of the phase trains as ever, and all of its batches meet the same weights."""
    model, plan, criterion = toy(), toy_plan(), methods.get(name).criterion
    kept: dict[str, dict[str, torch.Tensor]] = {}
    batches: list[torch.Tensor] = []

    def train(model: nn.Module, phase: Phase) -> None:
        kept[f"{phase.name} begins"] = values(model)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        phase.attach(optimizer)
        assert phase.regularizer is None
        for chosen in torch.randperm(16).split(8):
            batches.append(chosen)
            phase.labels(Y[chosen])
            optimizer.zero_grad()
            loss(model, X[chosen], Y[chosen]).backward()
            optimizer.step()

    expected = toy()
    result = run(model, train=train, method=name, plan=plan)
    assert [key.split()[0] for key in kept] == ["calibrate", "finetune"]
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in kept["calibrate begins"].items())
    expected.train(criterion == "taylor")
    state = values(expected)
    with collect.watch(expected, plan, criterion) as record:
        for chosen in batches[:2]:
            record.labels(Y[chosen])
            loss(expected, X[chosen], Y[chosen]).backward()
    expected.load_state_dict(state)
    scores = methods.get(name).scores(expected, plan, record=record)
    selection = allocate(expected, plan, scores, budget=result.budget)
    assert {k: v.tolist() for k, v in selection.keep.items()} == {
        k: v.tolist() for k, v in result.selections[0].keep.items()
    }
    prune_(expected, plan, selection)
    began = kept["finetune begins"]
    assert all(torch.equal(v, began[k]) for k, v in expected.state_dict().items())
    assert "calibrate" in result.rounds[0].seconds


@each
def test_an_optimizer_that_was_not_attached_moves_nothing_either(name: str) -> None:
    began: list[dict[str, torch.Tensor]] = []

    class Stubborn(Loop):
        def train(self, model: nn.Module, phase: Phase) -> None:
            if phase.name == "calibrate":
                began.append(values(model))
                optimizer = SGD(model.parameters(), lr=0.1)
                for _ in range(2):
                    phase.labels(Y)
                    loss(model).backward()
                    optimizer.step()
                model.train()
                return
            began.append(values(model))

    run(toy(), Stubborn(), method=name, speed_up=1.0001)
    first, second = began
    same = [key for key in first if first[key].shape == second[key].shape]
    assert "linear.bias" in same
    assert all(torch.equal(first[key], second[key]) for key in same)


@each
@pytest.mark.parametrize("fail_at", range(4))
def test_an_interrupted_run_continues(name: str, fail_at: int, tmp_path: Path) -> None:
    """Calls of the loop: evaluate, calibrate, evaluate, finetune, evaluate."""
    expected, started, model = (interrupted.toy() for _ in range(3))
    interrupted.seed()
    result = interrupted.run(expected, interrupted.Loop(), None, method=name, rounds=1)
    interrupted.seed()
    with pytest.raises(interrupted.Power):
        interrupted.run(started, interrupted.Loop(fail_at), tmp_path, method=name, rounds=1)
    if fail_at == 0:
        interrupted.seed()
    loop = interrupted.Loop()
    again = interrupted.run(model, loop, tmp_path, method=name, rounds=1)
    assert interrupted.facts(again) == interrupted.facts(result)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in expected.state_dict().items())
    assert ("calibrate 0" in loop.calls) == (fail_at <= 1)


@each
def test_every_round_collects_anew(name: str) -> None:
    loop = Loop()
    result = run(toy(), loop, method=name, rounds=2, speed_up=2.5)
    assert [p.name for p in loop.phases] == ["calibrate", "finetune"] * 2
    assert len(result.rounds) == 2


@each
def test_a_phase_without_batches_is_told(name: str) -> None:
    with pytest.raises(ScoreError, match="'calibrate'"):
        run(toy(), method=name, train=lambda model, phase: None)


def test_labels_that_nobody_gave_are_told() -> None:
    def train(model: nn.Module, phase: Phase) -> None:
        model(X)

    with pytest.raises(ScoreError, match=r"labels\(y\)"):
        run(toy(), method="f-statistic", train=train)


def test_what_cannot_be_collected_is_found_before_training() -> None:
    loop = Loop()
    with pytest.raises(ScoreError, match="prunes no experts"):
        run(toy(), loop, method=methods.Method(name="experts", criterion="reap"))
    assert not loop.phases
    assert not loop.metrics


def test_frozen_weights_are_scored_and_stay_frozen() -> None:
    loop, model = Loop(), toy()
    model.norm.weight.requires_grad_(False)
    run(model, loop, method="taylor")
    assert "calibrate" in [phase.name for phase in loop.phases]
    assert not model.norm.weight.requires_grad
    assert model.norm.weight.grad is None


def test_labels_do_nothing_in_other_phases() -> None:
    loop = Loop()  # it gives labels in every phase
    run(toy(), loop, method="etp")
    assert [p.name for p in loop.phases] == ["sparse", "finetune"]


def tiny_bert() -> tuple[nn.Module, torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=40,
        num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config), torch.randint(40, (12, 9))


@pytest.mark.parametrize("name", sorted(methods.METHODS.keys() - {"network-slimming"}))
def test_every_method_prunes_heads_and_neurons_of_a_transformer(name: str) -> None:
    model, tokens = tiny_bert()
    labels = tokens.sum(1) % 2

    def train(model: nn.Module, phase: Phase) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        phase.attach(optimizer, steps=2)
        for _ in range(2):
            phase.labels(labels)
            value = nn.functional.cross_entropy(model(tokens).logits, labels) + phase.penalty()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

    result = compress(model, tokens[:1], train=train, evaluate=lambda m: 0.0, speed_up=1.4, method=name)
    assert result.speed_up >= 1.4
    kinds = {g.kind for g in trace(model, tokens[:1], check=False).prunable}
    assert {"heads", "neurons"} <= kinds
