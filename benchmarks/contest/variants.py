"""Variants of ``etp`` for the study: one thing is different in each.

A name says what: ``etp[rate-2]`` is ``etp`` with another rate. Where the strength is fixed, it is tuned as in every
other method. ``etp-global`` compares scores across groups, as ``etp`` did when the study on short schedules was run. It
has the same variants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from benchmarks.contest.claim import CLAIM
from etp_graph import forces, methods, schedules
from etp_graph.budget import Scope
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


_FIXED: Mapping[str, Any] = {"beta": 3e-4, "acts_on": "units", "strength": None, "kappa": "sqrt"}
"""The same force at a fixed strength, on all units."""

_CHANGES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "Who is pushed, and how hard": {
        "fixed": _FIXED, "auto-on-all": {"acts_on": "units"}, "fixed-refreshed": {**_FIXED, "refresh_every": 10},
    },
    "Who goes": {"need": {"chosen_by": "need"}, "taylor": {"chosen_by": "taylor"}},
    "The force": {
        "uniform": {"force": forces.Uniform()}, "linear": {"force": forces.Linear()},
        **{f"rate-{rate}": {"force": forces.Exponential(rate=float(rate))} for rate in (2, 3, 8)},
    },
    "The order": {
        "index": {"order": "index"}, "random": {"order": "random"}, "fixed-index": {**_FIXED, "order": "index"},
    },
    "How the force is applied": {
        "gradient": {**_FIXED, "mode": "gradient"}, "loss": {**_FIXED, "mode": "loss"},
        "heaviside": {**_FIXED, "force": forces.Heaviside()},
        "growing": {**_FIXED, "force": forces.Growing(), "mode": "gradient", "kappa": "one"},
    },
    "What is compared": {
        **{scope: {"scope": scope} for scope in get_args(Scope)},
        "kappa-sqrt": {"kappa": "sqrt"}, "kappa-one": {"kappa": "one"},
        "per-score": {"rank": "score"}, "per-mac": {"rank": "score_per_mac"},
        "fixed-norm": {**_FIXED, "criterion": "magnitude"}, "fixed-taylor": {**_FIXED, "criterion": "taylor"},
    },
    "The way to the budget": {
        **{f"end-{end}": {"strength": schedules.Cubic(end=end / 100)} for end in (50, 80, 100)},
        "at-once": {"strength": schedules.Cubic(end=0.1)},
    },
    "Without a force": {
        "hard": {"mode": "mask"}, "hard-end-50": {"mode": "mask", "strength": schedules.Cubic(end=0.5)},
        "hard-at-once": {"mode": "mask", "strength": schedules.Cubic(end=0.1)},
    },
}  # fmt: skip
"""Question -> part of the name of a variant -> the settings that differ."""


def questions(base: Method) -> tuple[Question, ...]:
    """What the study asks of a method, ``etp`` or ``etp-global``."""

    def differs(changes: Mapping[str, Any]) -> bool:
        alike = all(getattr(base, name) == value for name, value in changes.items())
        return not alike and not (changes.keys() == {"rank"} and base.scope == "local")  # no rank is compared there

    return tuple(
        Question(
            title=title,
            variants={
                f"{base.name}[{part}]": replace(base, name=f"{base.name}[{part}]", **changes)
                for part, changes in variants.items() if differs(changes)
            },
        )
        for title, variants in _CHANGES.items()
    )  # fmt: skip


STUDY: Mapping[str, Method] = {
    name: method for base in (ETP, GLOBAL) for question in questions(base) for name, method in question.variants.items()
}
