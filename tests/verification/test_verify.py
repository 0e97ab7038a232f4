"""The oracle: it accepts what is right, refutes what is wrong and names it, and touches nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.plan import Group, Plan, Slice
from etp_graph.verification._sampling import random_selection
from tests.support.model_state import same, state_of
from tests.support.models.toy import Toy, toy_plan

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def with_slices(plan: Plan, name: str, change: Callable[[Slice], Slice | None]) -> Plan:
    def rewrite(group: Group) -> Group:
        if group.name != name:
            return group
        return replace(group, slices=tuple(s for s in map(change, group.slices) if s is not None))

    return replace(plan, groups=tuple(map(rewrite, plan.groups)))


def shifted(piece: Slice) -> Slice:
    return replace(piece, unit=(torch.arange(8) + 1) % 8) if piece.tensor == "conv2.weight" else piece


WRONG: dict[str, tuple[str, Callable[[Slice], Slice | None]]] = {
    "consumer shifted by one": ("conv1", shifted),
    "norm scale forgotten": ("conv1", lambda s: None if s.tensor == "norm.weight" else s),
    "running mean of other units": (
        "conv1", lambda s: replace(s, unit=torch.arange(8).flip(0)) if s.tensor == "norm.running_mean" else s),
    "consumer forgotten": ("conv2", lambda s: None if s.tensor == "linear.weight" else s),
    "flatten in the wrong order": (
        "conv2", lambda s: replace(s, unit=torch.arange(6).repeat(4)) if s.tensor == "linear.weight" else s),
}  # fmt: skip


def test_the_right_plan_passes_and_the_model_is_untouched() -> None:
    model, plan = Toy().train(), toy_plan()
    before, rng = state_of(model), torch.get_rng_state()
    result = etp.verify(model, plan, X)
    assert result.error < 1e-12
    assert result.gradient_error is not None and result.gradient_error < 1e-10
    assert result.effect > 0.01, "removing units without any effect proves nothing"
    assert result.units > 8
    assert same(before, state_of(model)) and model.training and model.norm.training
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("name", WRONG)
def test_wrong_plans_are_refuted_and_the_group_is_named(name: str) -> None:
    group, change = WRONG[name]
    with pytest.raises(etp.EquivalenceError, match=f"'{group}'") as caught:
        etp.verify(Toy(), with_slices(toy_plan(), group, change), X)
    assert caught.value.group == group
    assert caught.value.error > 1e-6


def test_default_initialisation_would_hide_a_forgotten_bias() -> None:
    """Why verify randomises: a fresh network has biases and statistics of zero, and forgives."""
    group, change = WRONG["running mean of other units"]
    plan, fresh = with_slices(toy_plan(), group, change), Toy()
    etp.verify(fresh, plan, X, randomize=False)
    with pytest.raises(etp.EquivalenceError):
        etp.verify(fresh, plan, X)


class Pairs(nn.Module):
    """Folds channels into pairs whose inner size is fixed, by the sizes of the activation or by a number of nobody."""

    def __init__(self, seen: bool) -> None:
        super().__init__()
        self.seen = seen
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(4, 6, 1)
        self.c = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n = x.shape[1] if self.seen else x.stride(0) // x[0, 0].numel()
        x = x.view(x.shape[0], n // 2, 2, *x.shape[2:]).amax(2)
        return self.c(self.b(x / (1 if self.seen else n))).mean((2, 3))


def test_trace_locks_what_the_check_refutes() -> None:
    for seen, units in ((True, 4), (False, None)):
        plan = etp.trace(Pairs(seen), X)
        assert plan["b"].locked is None
        assert (plan["a"].n_units if plan["a"].locked is None else None) == units
        etp.verify(Pairs(seen), plan, X)


def test_float32_where_an_operator_knows_no_float64() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.toy = Toy()

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise RuntimeError("no kernel for Double")
            out: Tensor = self.toy(x)
            return out

    model = Picky()
    assert etp.verify(model, etp.trace(model, X), X).dtype == "float32"


def test_layer_norm_is_reduced_over_the_kept_entries() -> None:
    class Stream(nn.Module):
        def __init__(self, affine: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)
            self.norm = nn.LayerNorm(16, elementwise_affine=affine)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.norm(self.a(x)))
            return out

    x = torch.randn(5, 6)
    for affine in (True, False):
        model = Stream(affine)
        plan = etp.trace(model, x)
        assert plan["a"].locked is None
        assert etp.verify(model, plan, x).error < 1e-12
        etp.prune_(model, plan, etp.Selection({"a": torch.arange(16) < 7}))  # type: ignore[dict-item]
        assert model.norm.normalized_shape == (7,)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_random_selections_respect_the_constraints(ratio: float) -> None:
    groups = [
        Group(name="plain", kind="channels", n_units=12, slices=()),
        Group(name="blocks", kind="channels", n_units=12, slices=(), blocks=3, min_units=3),
        Group(name="multiple", kind="channels", n_units=12, slices=(), multiple=4),
        Group(name="floor", kind="channels", n_units=12, slices=(), min_units=7),
        Group(name="single", kind="channels", n_units=1, slices=()),
    ]
    plan = Plan(groups=tuple(groups), tensors={}, parameters=())
    selection = random_selection(plan, plan.groups, ratio, torch.Generator().manual_seed(0))
    selection.check(plan)
    assert selection.n_removed > 0


class Small(nn.Module):
    """Two layers around whatever ``between`` does to eight features; ``more`` makes the output of it and of them."""

    def __init__(
        self, between: Callable[[Tensor], Tensor], more: Callable[[Tensor, Tensor], object] | None = None
    ) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 4)
        self.between, self.more = between, more

    def forward(self, x: Tensor) -> object:
        inner = self.between(self.a(x))
        out = self.c(self.b(inner).relu())
        return out if self.more is None else self.more(out, inner)


class Holder:
    """An output object of nobody's making."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


HIDDEN: dict[str, tuple[nn.Module, str]] = {
    "a count of one": (Small(lambda t: t.unsqueeze(1).squeeze() if t.shape[-1] > 1 else t.squeeze()), "check failed"),
    "an odd count": (Small(lambda t: t[:, : t.shape[1] // 2 * 2] if t.shape[1] % 2 == 0 else t[:, :-1]), "a"),
    "a count as a number": (Small(lambda t: t / t.shape[1]), "used as a value"),
    "a count that no rule sees": (Small(lambda t: t / t.stride(0)), "check failed"),
    "an integer output": (Small(lambda t: t, lambda out, t: (out, (t / t.shape[1] * 1e3).long())), "output"),
    "an output in an object": (Small(lambda t: t, lambda out, t: (out, Holder(t))), "output"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_one_look_would_not_see_is_locked_or_right(name: str) -> None:
    """Every admissible selection of what stays prunable runs and is right, the extreme counts among them."""
    model, reason = HIDDEN[name]
    x = torch.randn(2, 3)
    plan = etp.trace(model, x)
    locked = plan["a"].locked
    assert locked is None or reason in locked or "fixed positions" in locked
    assert plan["b"].locked is None
    for seed in range(3):
        etp.verify(model, plan, x, seed=seed)


def test_a_closed_gate_does_not_hide_what_it_gates() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 4)
            self.register_buffer("gate", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            out: Tensor = self.c(self.b(x + self.gate * x / x.shape[1]).relu())
            return out

    assert etp.trace(Gated(), torch.randn(2, 3))["a"].locked is not None


def test_a_weight_that_is_used_outside_its_layer_is_locked() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x) + self.b.weight[0])
            out: Tensor = self.d(self.c(x).relu())
            return out

    plan = etp.trace(Twice(), torch.randn(2, 3), check=False)
    assert all("outside its layer" in str(plan[name].locked) or "fixed" in str(plan[name].locked) for name in "ab")
    assert plan["c"].locked is None


def test_seeds_and_statistics_of_the_user_stay() -> None:
    class WithChildren(nn.BatchNorm1d):
        """A norm that has submodules, as timm's norms with activations do."""

        def __init__(self, n: int) -> None:
            super().__init__(n)
            self.act = nn.ReLU()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b, self.unused = nn.Linear(3, 8), WithChildren(8), nn.Linear(8, 4), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.norm(self.a(x)))
            return out

    model, x = Net(), torch.randn(4, 3)
    before, rng, pending = state_of(model), torch.get_rng_state(), list(torch.cuda._queued_calls)
    etp.verify(model, etp.trace(model, x), x)
    assert same(before, state_of(model))
    assert list(torch.cuda._queued_calls) == pending
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("form", ["outside", "inside"])
def test_inference_mode(form: str) -> None:
    model, x = Toy(), torch.randn(1, 3, 8, 8)
    with torch.inference_mode(form == "inside"):
        plan = etp.trace(model, x)
    assert len(plan.prunable) == 2


def test_functional_dropout_does_not_refute_an_auxiliary_head() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.aux = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> object:
            x = nn.functional.dropout(self.a(x).relu(), 0.5, self.training)
            return (self.b(x), self.aux(x)) if self.training else self.b(x)

    model, x = Dropping(), torch.randn(2, 3)
    plan = etp.trace(model, x)
    assert plan.modes == ("eval", "train") and plan["a"].locked is None
    assert etp.verify(model, plan, x).error < 1e-12


class NarrowPairs(nn.Module):
    """It refuses when both branches of a pair are narrow, and hides from the tracer that it asks."""

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(5, 8) for _ in range(2 * pairs))
        self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in range(2 * pairs))

    def forward(self, x: Tensor) -> Tensor:
        widths = [branch.weight.untyped_storage().nbytes() // branch.weight[0].nbytes for branch in self.branches]
        if any(max(pair) < 8 for pair in zip(widths[::2], widths[1::2], strict=True)):
            raise ValueError("too narrow")
        found = [head(branch(x).relu()) for branch, head in zip(self.branches, self.heads, strict=True)]
        return torch.stack(found).sum(0)


@pytest.mark.parametrize("pairs", [1, 2, 4, 8])
def test_of_pairs_that_fail_only_together_one_each_is_locked(pairs: int) -> None:
    model, x = NarrowPairs(pairs), torch.randn(2, 5)
    plan = etp.trace(model, x)
    failed = [group.name for group in plan.groups if group.locked and "together with others" in group.locked]
    assert len(failed) == pairs
    assert etp.verify(model, plan, x).error < 1e-12


class Joint(nn.Module):
    """It refuses when its branches are narrow together, and hides from the tracer that it asks."""

    def __init__(self, branches: int, wanted: int) -> None:
        super().__init__()
        self.wanted = wanted
        self.branches = nn.ModuleList(nn.Linear(5, 8) for _ in range(branches))
        self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        widths = [branch.weight.untyped_storage().nbytes() // branch.weight[0].nbytes for branch in self.branches]
        if sum(widths) < self.wanted:
            raise ValueError("too narrow")
        found = [head(branch(x).relu()) for branch, head in zip(self.branches, self.heads, strict=True)]
        return torch.stack(found).sum(0)


@pytest.mark.parametrize(("branches", "wanted", "locked"), [(2, 9, 1), (6, 13, 1), (6, 20, 3), (24, 50, 7)])
def test_of_groups_that_fail_only_together_no_more_are_locked_than_doubling_finds(
    branches: int, wanted: int, locked: int
) -> None:
    model, x = Joint(branches, wanted), torch.randn(2, 5)
    plan = etp.trace(model, x)
    failed = [group for group in plan.groups if group.locked and "together with others" in group.locked]
    assert 0 < len(failed) <= locked < branches
    assert all("too narrow" in str(group.locked) for group in failed)
    assert etp.verify(model, plan, x).error < 1e-12
