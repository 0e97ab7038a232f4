"""What ``trace`` promises beyond the groups: constraints and their messages, inputs, errors, and a model left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.model import _layer_table as layers
from etp_graph.model import named_tensors
from tests.support.models.toy import Toy, toy_plan


class GroupNormed(nn.Module):
    """conv (3 -> 8), group norm (4 groups), conv (8 -> 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.GroupNorm(4, 8)
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(x)))


class TwoInputs(nn.Module):
    """Two linear layers over two inputs, and a third over their sum; the output is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"logits": self.last((self.left(left) + self.right(right)).relu())}


class Padded(nn.Module):
    """Zero channels around the input's, their widths in attributes of the module."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.low, self.high))


class Stage(nn.Module):
    """conv a (3 -> 4), conv b (4 -> 8) plus a padded shortcut around it, conv c (8 -> 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 5, 1)
        self.shortcut = Padded(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c((self.b(x) + self.shortcut(x)).relu())


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def test_plan_of_a_toy_is_the_one_written_by_hand() -> None:
    found, want = etp.trace(Toy(), torch.zeros(1, 3, 8, 8)), toy_plan()
    assert [group.name for group in found.groups] == [group.name for group in want.groups]
    for mine, other in zip(found.groups, want.groups):
        assert {(s.tensor, s.axis) for s in mine.slices} == {(s.tensor, s.axis) for s in other.slices}
        assert {(a.module, a.name) for a in mine.attributes} >= {(a.module, a.name) for a in other.attributes}
        assert (mine.n_units, mine.kind, mine.locked) == (other.n_units, other.kind, other.locked)
    assert {(op.coefficient, op.axes) for op in found.ops} == {(op.coefficient, op.axes) for op in want.ops}


def test_group_norm_keeps_equal_runs_and_says_so() -> None:
    plan = etp.trace(GroupNormed(), image())
    group = plan["conv"]
    assert (group.blocks, group.min_units) == (4, 4)
    keep = torch.ones(8, dtype=torch.bool)
    keep[0] = False
    with pytest.raises(etp.SelectionError, match=r"'conv'.*\[1, 2, 2, 2\] units in its 4 blocks.*ignore='conv'"):
        group.check_keep(keep)
    group.check_keep(torch.tensor([0, 1] * 4, dtype=torch.bool))


def test_group_norm_over_uneven_streams_is_locked() -> None:
    """One normalisation group holds a channel of each convolution."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 3, 1), nn.GroupNorm(4, 8)
            self.mid, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.mid(self.norm(torch.cat([self.a(x), self.b(x)], 1))))

    plan = etp.trace(Joined(), image())
    for name in ("a", "b"):
        assert "do not fill the 4 normalisation groups of 'norm' evenly" in (plan[name].locked or "")
    assert plan["mid"].locked is None


def test_registered_padding_loses_its_channels_too() -> None:
    model = Stage()
    assert [g.name for g in etp.trace(model, image()).prunable] == ["a"], "the padding's channels are fixed"
    etp.register_padding(Padded, before="low", after="high")
    try:
        plan = etp.trace(model, image())
        assert {g.name: g.n_units for g in plan.prunable} == {"a": 4, "b": 4}
        assert etp.verify(model, plan, image()).error < 1e-10
        etp.prune_(model, plan, etp.Selection({"b": torch.tensor([True, False, True, False])}))  # type: ignore[dict-item]
        assert (model.shortcut.low, model.shortcut.high, model.b.out_channels) == (1, 1, 6)
    finally:
        layers.PADDINGS.pop(Padded)


@pytest.mark.parametrize(
    "inputs", [(torch.ones(2, 6), torch.ones(2, 4)), {"right": torch.ones(2, 4), "left": torch.ones(2, 6)}]
)
def test_tuples_are_positional_and_dicts_are_keywords(inputs: object) -> None:
    model = TwoInputs()
    plan = etp.trace(model, inputs)
    assert {g.name: g.n_units for g in plan.prunable} == {"left": 8}
    assert {(s.tensor, s.axis) for s in plan["left"].slices} == {
        ("left.weight", 0), ("left.bias", 0), ("right.weight", 0), ("right.bias", 0), ("last.weight", 1),
    }  # fmt: skip
    assert etp.verify(model, plan, inputs).error < 1e-10


def test_ignored_modules_keep_their_units() -> None:
    model = Toy()
    by_name = etp.trace(model, image(), ignore="conv1")
    assert [g.name for g in by_name.prunable] == ["conv2"]
    assert by_name["conv1"].locked == "ignored (conv1)"
    assert [g.name for g in etp.trace(model, image(), ignore=["*1"]).prunable] == ["conv2"]
    with pytest.raises(etp.PlanError, match=r"'stem\.\*' matches no module; names look like conv1, norm"):
        etp.trace(model, image(), ignore="stem.*")


@pytest.mark.parametrize("training", [True, False])
def test_trace_and_verify_change_nothing(training: bool) -> None:
    model = nn.Sequential(Toy(), nn.Dropout(0.5)).train(training)
    model[0].norm.eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(model)}
    identities = {name: id(tensor) for name, tensor in named_tensors(model)}
    inputs = image()
    copied, state = inputs.clone(), torch.get_rng_state()
    plan = etp.trace(model, inputs)
    etp.verify(model, plan, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(inputs, copied)
    assert [module.training for module in model.modules()] == modes
    assert {name: id(tensor) for name, tensor in named_tensors(model)} == identities
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_trace_is_reproducible_and_depends_on_the_architecture_alone() -> None:
    first, second = Toy(), Toy()
    assert etp.trace(first, image()) == etp.trace(second, image())
    assert etp.trace(copy.deepcopy(first), image()).fingerprint == etp.trace(first, image()).fingerprint


def test_a_wrong_plan_is_refuted_by_name() -> None:
    """The oracle can fail: units of one layer are coupled with the wrong units of the next."""
    from dataclasses import replace

    model = Toy()
    plan = etp.trace(model, image())
    group = plan["conv1"]
    consumer = ("conv2.weight", 1)
    turned = tuple(
        replace(s, unit=torch.arange(8).roll(1)) if (s.tensor, s.axis) == consumer else s for s in group.slices
    )
    wrong = replace(plan, groups=(replace(group, slices=turned), *plan.groups[1:]))
    with pytest.raises(etp.EquivalenceError, match="'conv1'") as caught:
        etp.verify(model, wrong, image())
    assert caught.value.group == "conv1"
    assert caught.value.error > 1e-3


def nothing() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "only the output layer": (nothing, r"no group of this model can be pruned \(0: feeds the model's output\)"),
    "no parameters": (nn.ReLU, "no parameters"),
    "compiled": (lambda: torch.compile(Toy()), "compiled; trace the original module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(etp.PlanError, match=message):
        etp.trace(build(), image())


def test_the_models_own_exception_passes_through() -> None:
    class Picky(Toy):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            raise LookupError("images must be square")

    model = Picky().train()
    with pytest.raises(LookupError, match=r"^images must be square$") as caught:
        etp.trace(model, image())
    assert caught.value.__cause__ is None
    assert Picky.calls == 1, "nothing was tried again"
    assert model.training
    assert model.norm.training
    with pytest.raises(RuntimeError, match=r"expected input"):
        etp.trace(Toy(), torch.zeros(1, 4, 8, 8))


def test_a_training_mode_that_cannot_run_is_a_note() -> None:
    """Auxiliary heads are looked for in a second pass; where the model cannot run it, tracing still succeeds."""

    class Aux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
            self.aux, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            if self.training:
                raise RuntimeError(f"no labels at hand {self.aux(x).shape}")
            out: Tensor = self.head(x)
            return out

    plan = etp.trace(Aux(), torch.randn(2, 4))
    assert "no labels at hand" in plan.notes[0]
    assert plan["stem"].locked is None
    assert "aux.weight" in {piece.tensor for piece in plan["stem"].slices}, "what was seen of the head is cut along"
    assert plan["aux"].locked is not None
    assert plan.unreached == ("last.weight", "last.bias")


def test_an_exception_leaves_no_hooks_or_modes_behind() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.a(x)
            raise KeyError("mine")

    from torch.nn.modules import module

    hooks = (len(module._global_forward_hooks), len(module._global_forward_pre_hooks))
    with pytest.raises(KeyError, match="mine"):
        etp.trace(Failing(), torch.randn(1, 3))
    assert (len(module._global_forward_hooks), len(module._global_forward_pre_hooks)) == hooks
    assert torch.is_grad_enabled()
    assert etp.trace(Toy(), torch.randn(1, 3, 8, 8)).n_units == 19


def test_a_width_that_is_used_as_a_number_is_locked_by_the_check() -> None:
    """No operator shows that a value depends on the number of channels; only the comparison does."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            out: Tensor = self.c(self.b(x / x.stride(0)))
            return out

    model, x = Scaled(), torch.randn(2, 4)
    with pytest.raises(etp.EquivalenceError, match="'a'"):
        etp.verify(model, etp.trace(model, x, check=False), x)
    plan = etp.trace(model, x)
    assert str(plan["a"].locked).startswith("check failed")
    assert plan["b"].locked is None


def test_control_flow_that_depends_on_data_is_traced_as_run_and_said_so() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) if bool(x.sum() > 0) else self.c(y)

    plan = etp.trace(Branch(), torch.ones(2, 4))
    assert plan.unreached == ("c.weight", "c.bias")
    assert any("reads values of tensors" in note for note in plan.notes)
    assert not etp.trace(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.ones(2, 4)).notes
