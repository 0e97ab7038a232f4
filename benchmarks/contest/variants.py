"""Variants of ``etp`` for the study: one thing is different in each.

A name says what: ``etp[rate-2]`` is ``etp`` with another rate. Where the strength is fixed, it is tuned as in every
other method. ``etp-global`` compares scores across groups, as ``etp`` did when the study on short schedules was run. It
has the same variants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_args

from benchmarks.contest.claim import CLAIM
from etp_graph import forces, methods, schedules
from etp_graph.budget import Rank, Scope
from etp_graph.methods import Method

ETP = methods.get("etp")
GLOBAL = replace(
    ETP,
    name="etp-global",
    scope="global",
    source="etp with scores that are compared across groups, for what units cost",
)
PAPER = methods.get("etp-paper")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is varied: a title, and the variants by name; the method that is varied belongs to each."""

    title: str
    variants: Mapping[str, Method]


CONTROLS: Mapping[str, Method] = {
    method.name: method
    for method in (
        GLOBAL,
        *(
            replace(
                base, name=f"{base.name}-hard", mode="mask",
                source=f"control: the units of {base.name} at its times, zeroed at once",
            )
            for base in (ETP, GLOBAL)
        ),
        *(
            replace(
                base, name=f"{base.name}-uniform-force", force=forces.Uniform(), need_force=base.force,
                source=f"control: the units of {base.name} at its times, pushed by a uniform force",
            )
            for base in (ETP, GLOBAL)
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


def questions(base: Method) -> tuple[Question, ...]:
    """What the study asks of a method, ``etp`` or ``etp-global``."""
    fixed = replace(base, beta=3e-4, acts_on="units", strength=None, kappa="sqrt")  # the same force on all units
    hard = replace(base, mode="mask")
    scopes = {scope: replace(base, scope=scope) for scope in get_args(Scope) if scope != base.scope}

    # Where every group loses the same share, no rank is compared.
    compared: dict[str, Rank] = {"per_score": "score", "per_mac": "score_per_mac"} if base.scope == "global" else {}
    ranks = {name: replace(base, rank=rank) for name, rank in compared.items()}

    def variants(**changed: Method) -> dict[str, Method]:
        names = {part: f"{base.name}[{part.replace('_', '-')}]" for part in changed}
        return {names[part]: replace(method, name=names[part]) for part, method in changed.items()}

    return (
        Question(
            title="Who is pushed, and how hard",
            variants=variants(
                fixed=fixed,
                auto_on_all=replace(base, acts_on="units"),
                fixed_refreshed=replace(fixed, refresh_every=10),
            ),
        ),
        Question(
            title="Who goes",
            variants=variants(need=replace(base, chosen_by="need"), taylor=replace(base, chosen_by="taylor")),
        ),
        Question(
            title="The force",
            variants=variants(
                uniform=replace(base, force=forces.Uniform()),
                rate_2=replace(base, force=forces.Exponential(rate=2.0)),
                rate_3=replace(base, force=forces.Exponential(rate=3.0)),
                rate_8=replace(base, force=forces.Exponential(rate=8.0)),
                linear=replace(base, force=forces.Linear()),
            ),
        ),
        Question(
            title="The order",
            variants=variants(
                index=replace(base, order="index"),
                random=replace(base, order="random"),
                fixed_index=replace(fixed, order="index"),
            ),
        ),
        Question(
            title="How the force is applied",
            variants=variants(
                gradient=replace(fixed, mode="gradient"),
                loss=replace(fixed, mode="loss"),
                heaviside=replace(fixed, force=forces.Heaviside()),
                growing=replace(fixed, force=forces.Growing(), mode="gradient", kappa="one"),
            ),
        ),
        Question(
            title="What is compared",
            variants=variants(
                **scopes,
                kappa_sqrt=replace(base, kappa="sqrt"),
                kappa_one=replace(base, kappa="one"),
                **ranks,
                fixed_norm=replace(fixed, criterion="magnitude"),
                fixed_taylor=replace(fixed, criterion="taylor"),
            ),
        ),
        Question(
            title="The way to the budget",
            variants=variants(
                end_50=replace(base, strength=schedules.Cubic(end=0.5)),
                end_80=replace(base, strength=schedules.Cubic(end=0.8)),
                end_100=replace(base, strength=schedules.Cubic(end=1.0)),
                at_once=replace(base, strength=schedules.Cubic(end=0.1)),
            ),
        ),
        Question(
            title="Without a force",
            variants=variants(
                hard=hard,
                hard_end_50=replace(hard, strength=schedules.Cubic(end=0.5)),
                hard_at_once=replace(hard, strength=schedules.Cubic(end=0.1)),
            ),
        ),
    )


STUDY: Mapping[str, Method] = {
    name: method for base in (ETP, GLOBAL) for question in questions(base) for name, method in question.variants.items()
}
