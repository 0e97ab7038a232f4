"""Variants of ``etp`` for the study: one thing is different in each.

A name says what: ``etp[rate=2]`` is ``etp`` with another rate. Where the strength is fixed, it is tuned as in every
other method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.contest.claim import CLAIM
from etp_graph import forces, methods, schedules
from etp_graph.methods import Method

ETP = methods.get("etp")
PAPER = methods.get("etp-paper")
FIXED = replace(ETP, beta=3e-4, acts_on="units", strength=None, kappa="sqrt")
"""The same force at a fixed strength, on all units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is varied: a title, and the variants by name; ``etp`` itself belongs to each."""

    title: str
    variants: Mapping[str, Method]


def _named(**changed: Method) -> dict[str, Method]:
    return {f"etp[{name.replace('_', '-')}]": method for name, method in changed.items()}


CONTROLS: Mapping[str, Method] = {
    method.name: method
    for method in (
        replace(ETP, name="etp-hard", mode="mask", source="control: the units of etp at its times, zeroed at once"),
        replace(
            ETP, name="etp-uniform-force", force=forces.Uniform(), need_force=ETP.force,
            source="control: the units of etp at its times, pushed by a uniform force",
        ),
        *(
            replace(
                ETP, name=f"{name}-soft", chosen_by="criterion", criterion=methods.get(name).criterion,
                p=methods.get(name).p, scope=methods.get(name).scope, rank=methods.get(name).rank,
                source=f"control: the units of {name} at its times, pushed by the force of etp",
            )
            for name in ("l1-gradual", "taylor-gradual")
        ),
        replace(
            PAPER, name="etp-paper-code", force=forces.Exponential(divided_by="n_units"),
            source="etp-paper with the λ of the authors' code, exp(5/N)",
        ),
        replace(
            PAPER, name="etp-paper-base", force=forces.Exponential(base=1.01),
            source="etp-paper with one λ for all layers, as in eq. 8",
        ),
    )
} | CLAIM  # fmt: skip
"""Controls: what the force of ``etp`` brings apart from its choice; and ETP with the λ of eq. 8 and of the code."""

QUESTIONS = (
    Question(
        title="Who is pushed, and how hard",
        variants=_named(
            fixed=FIXED,
            auto_on_all=replace(ETP, acts_on="units"),
            fixed_refreshed=replace(FIXED, refresh_every=10),
        ),
    ),
    Question(
        title="Who goes",
        variants=_named(need=replace(ETP, chosen_by="need"), taylor=replace(ETP, chosen_by="taylor")),
    ),
    Question(
        title="The force",
        variants=_named(
            uniform=replace(ETP, force=forces.Uniform()),
            rate_2=replace(ETP, force=forces.Exponential(rate=2.0)),
            rate_3=replace(ETP, force=forces.Exponential(rate=3.0)),
            rate_8=replace(ETP, force=forces.Exponential(rate=8.0)),
            linear=replace(ETP, force=forces.Linear()),
        ),
    ),
    Question(
        title="The order",
        variants=_named(
            index=replace(ETP, order="index"),
            random=replace(ETP, order="random"),
            fixed_index=replace(FIXED, order="index"),
        ),
    ),
    Question(
        title="How the force is applied",
        variants=_named(
            gradient=replace(FIXED, mode="gradient"),
            loss=replace(FIXED, mode="loss"),
            heaviside=replace(FIXED, force=forces.Heaviside()),
            growing=replace(FIXED, force=forces.Growing(), mode="gradient", kappa="one"),
        ),
    ),
    Question(
        title="What is compared",
        variants=_named(
            kappa_sqrt=replace(ETP, kappa="sqrt"),
            kappa_one=replace(ETP, kappa="one"),
            per_score=replace(ETP, rank="score"),
            per_mac=replace(ETP, rank="score_per_mac"),
            local=replace(ETP, scope="local"),
            fixed_norm=replace(FIXED, criterion="magnitude"),
            fixed_taylor=replace(FIXED, criterion="taylor"),
        ),
    ),
    Question(
        title="The way to the budget",
        variants=_named(
            end_50=replace(ETP, strength=schedules.Cubic(end=0.5)),
            end_80=replace(ETP, strength=schedules.Cubic(end=0.8)),
            end_100=replace(ETP, strength=schedules.Cubic(end=1.0)),
            at_once=replace(ETP, strength=schedules.Cubic(end=0.1)),
        ),
    ),
    Question(
        title="Without a force",
        variants=_named(
            hard=CONTROLS["etp-hard"],
            hard_end_50=replace(CONTROLS["etp-hard"], strength=schedules.Cubic(end=0.5)),
            hard_at_once=replace(CONTROLS["etp-hard"], strength=schedules.Cubic(end=0.1)),
            hard_local=replace(CONTROLS["etp-hard"], scope="local"),
        ),
    ),
)  # fmt: skip

STUDY: Mapping[str, Method] = {
    name: replace(method, name=name) for question in QUESTIONS for name, method in question.variants.items()
}
