"""What a plan looks like: every fact is there, in any terminal."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from etp_graph._text import percent, si
from etp_graph.plan import Cost, Slice, cost_table
from etp_graph.plan._table import parameters_at_stake, plan_table
from tests.support.models.synthetic import synthetic
from tests.support.models.toy import toy_plan


def test_toy_rows() -> None:
    text = plan_table(toy_plan())
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert "8" in rows["conv1"].split()
    assert "6: conv1.weight, norm.weight, ..." in rows["conv1"]
    assert "feeds the model's output" in rows["linear"]
    assert "664" in rows["conv1"]  # 3*8*9 + 2*8 + 8*6*9
    assert "3 groups (2 prunable, 1 locked), 19 units (14 prunable)" in text
    assert "41,592" in text
    assert "795" in text
    assert str(toy_plan()) == text


def test_the_text_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = toy_plan()
    usual = plan_table(plan)
    for name, value in (("COLUMNS", "20"), ("FORCE_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
    assert plan_table(plan) == usual
    assert usual.isascii()
    assert not re.search(r"\x1b|[ \t]$", usual, re.MULTILINE)


def test_nothing_is_truncated() -> None:
    reason = "the operator einops.rearrange mixes channels in a way that is not known " * 4
    name = "model.encoder." * 8 + "[0]"
    first, *rest = toy_plan().groups
    plan = replace(
        toy_plan(), groups=(replace(first, name=name, locked=reason, blocks=2, multiple=4, min_units=3), *rest),
        uncounted=tuple(f"aten.operator_{i}" for i in range(40)), notes=("a remark [bold]that stays[/bold] whole",),
        unreached=tuple(f"spare.{i}" for i in range(40)),
    )  # fmt: skip
    text = plan_table(plan)
    words = " ".join(line[line.index("feeds") if "feeds" in line else 0 :] for line in text.splitlines())
    assert name in text
    for word in {*reason.split(), *plan.uncounted, "[bold]that"}:
        assert word in words
    assert "spare.11" in text
    assert "and 28 more" in text
    assert max(map(len, text.splitlines()[-10:])) <= 120


def test_constraints_are_shown() -> None:
    first, *rest = toy_plan().groups
    text = plan_table(replace(toy_plan(), groups=(replace(first, blocks=2, multiple=4), *rest)))
    assert "equal in 2 blocks" in text
    assert "multiple of 4" in text


def test_a_plan_with_nothing_to_prune_says_so() -> None:
    plan = toy_plan()
    text = plan_table(plan.lock(dict.fromkeys(("conv1", "conv2"), "ignored by the user")))
    assert "Nothing can be pruned" in text
    assert text.count("ignored by the user") == 2


@pytest.mark.parametrize("seed", range(3))
def test_every_group_has_a_row(seed: int) -> None:
    _, plan = synthetic(seed, stages=4, depth=25, width=4)
    rows = plan_table(plan).splitlines()
    starts = {row.split()[0] for row in rows if row}
    assert len(plan.groups) > 100
    assert {group.name for group in plan.groups} <= starts


def test_an_entry_cut_along_two_axes_counts_once() -> None:
    plan = toy_plan()
    both = replace(
        plan.groups[0],
        slices=(
            Slice(tensor="conv2.weight", axis=0, index=range(2), unit=range(2)),
            Slice(tensor="conv2.weight", axis=0, index=range(1, 3), unit=range(2)),
            Slice(tensor="conv2.weight", axis=1, index=range(4), unit=range(4)),
            Slice(tensor="norm.running_var", axis=0, index=range(8), unit=range(8)),
        ),
    )
    assert parameters_at_stake(plan, both) == (6 * 8 - 3 * 4) * 9
    assert parameters_at_stake(plan, replace(both, slices=())) == 0


@pytest.mark.parametrize(("count", "text"), [(0, "0"), (999, "999"), (1000, "1.000 k"), (25_557_032, "25.56 M"),
                                             (999_949_999, "999.9 M"), (999_999_999, "1.000 G"),
                                             (4_089_184_256, "4.089 G"), (3 * 10**18, "3000 P")])  # fmt: skip
def test_si(count: int, text: str) -> None:
    assert si(count) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"), [(0, 10, "0.0 %"), (1, 10**6, "< 0.1 %"), (1, 3, "33.3 %"), (0, 0, "0.0 %")]
)
def test_percent(part: int, whole: int, text: str) -> None:
    assert percent(part, whole) == text


def test_cost_table() -> None:
    text = cost_table({
        "dense": Cost(macs=8_000_000, params=1000), "etp": Cost(macs=1_000_000, params=400, uncounted=("fft",)),
        "nothing": Cost(macs=0, params=0),
    })  # fmt: skip
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert "8.00x" in rows["etp"]
    assert "12.5 %" in rows["etp"]
    assert "40.0 %" in rows["etp"]
    assert "-" in rows["nothing"]
    assert "not counted in the MACs: fft" in text
