"""Table of criteria: each says what data it needs when it registers, and its signature says which options it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import TypeVar

from torch import Tensor

from etp_graph._config import Registry, import_path, importable, require
from etp_graph.collect import OBSERVED, Observed, Statistic
from etp_graph.errors import ScoreError

Score = Callable[..., Tensor]
"""Function of a model and its plan that returns the scores, float [plan.n_units]."""

S = TypeVar("S", bound=Score)

V = TypeVar("V")

OPTIONS = ("p", "normalize", "seed", "record", "observations", "regularizer")
"""Arguments that a method passes to a criterion if its signature has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """One criterion with what a method must know to call it.

    Attributes:
        name: its name in JSON; a function that is not registered has its own name.
        score: the function.
        observes: what data it needs: a statistic of activations, ``"gradients"``, or ``None``.
        options: those of :data:`OPTIONS` that the function takes.
        registered: True if JSON can name it.
    """

    name: str
    score: Score
    observes: Observed | None = None
    options: frozenset[str] = frozenset()
    registered: bool = True

    @property
    def reference(self) -> str | Score:
        """Return what stands for it in a method: its explicit name, or else the function."""
        return self.name if self.registered and ":" not in self.name else self.score

    def json_name(self) -> str:
        """Return its name in JSON.

        Raises:
            ScoreError: it is not registered, so that nothing could read the JSON.
        """
        require(
            self.registered,
            f"criterion {self.name} is not registered, so it cannot be read back from JSON. Register it where it is "
            f"defined: etp_graph.criteria.register({self.name}).",
            ScoreError,
        )
        return self.name


_criteria: Registry[Criterion] = Registry(
    "criterion",
    error=ScoreError,
    remedy="One of your own is a function of (model, plan), or is known once the module that registers it is imported.",
)


class _View(Mapping[str, V]):
    """Mapping of one field of the registered criteria, without those for which it is ``None``."""

    def __init__(self, read: Callable[[Criterion], V | None]) -> None:
        self._read = read

    def __getitem__(self, name: str) -> V:
        found = self._read(_criteria[name])
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return (name for name, criterion in _criteria.items() if self._read(criterion) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"{{{', '.join(self)}}}"


CRITERIA: Mapping[str, Score] = _View(lambda criterion: criterion.score)
"""Every registered criterion: name -> function."""

COLLECTED: Mapping[str, Observed] = _View(lambda criterion: criterion.observes)
"""The criteria that need batches of data, which :func:`etp_graph.collect.watch` records: name -> what they observe."""


def register(score: S, *, name: str | None = None, observes: Observed | None = None) -> S:
    """Add a criterion to :data:`CRITERIA`, so that JSON, the command line and every method know its name.

    Args:
        score: function of a model and a plan that returns float [plan.n_units]; units of low score are removed first.
            It may also take the keyword arguments ``p``, ``normalize``, ``seed``, ``regularizer`` and ``record`` (or
            ``observations``), which a method then passes.
        name: its name; default: its import path ``module:qualname``.
        observes: what data it needs. A subclass of :class:`etp_graph.collect.Statistic`, or ``"gradients"`` for
            the effect on the loss; ``record.read(name, plan)`` returns what was recorded.

    Returns:
        The function.

    Raises:
        ScoreError: this is no such function, it has no import path and no name, or another criterion has the name.
    """
    path = import_path(score)
    _check_name(name, path, score)
    _check_observed(observes)
    found = Criterion(name=name or path, score=score, observes=observes, options=_options(score))
    _criteria.register(found.name, found, path=path)
    OBSERVED.discard(found.name)
    if observes is not None:
        OBSERVED.register(found.name, observes)
    return score


def register_criterion(name: str | None = None, *, observes: Observed | None = None) -> Callable[[S], S]:
    """Return a decorator that registers a function as a criterion; the arguments are those of :func:`register`."""
    return lambda score: register(score, name=name, observes=observes)


@contextmanager
def temporary() -> Iterator[None]:
    """Remove the criteria that are registered inside of the block when it ends, for tests and examples."""
    with _criteria.temporary(), OBSERVED.temporary():
        yield


def find_criterion(criterion: object) -> Criterion:
    """Return the criterion of a name or of a function, which need not be registered.

    Raises:
        ScoreError: the name is unknown, or a method cannot call the function.
    """
    if isinstance(criterion, str) or not callable(criterion):
        return _criteria.find(criterion)
    known = next((found for found in _criteria.values() if found.score == criterion), None)
    name = getattr(criterion, "__qualname__", type(criterion).__name__)
    return known or Criterion(name=name, score=criterion, options=_options(criterion), registered=False)


def _options(score: Score) -> frozenset[str]:
    """Return the options that a function takes.

    Raises:
        ScoreError: it does not take a model and a plan, or needs an argument that no method has.
    """
    require(callable(score), f"{score!r} is no criterion: pass a function of (model, plan).", ScoreError)
    parameters = signature(score).parameters.values()
    positional = [p for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    given = {p.name for p in positional[:2]}
    variadic = [p.kind for p in parameters if p.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    others = [p for p in parameters if p.name not in given and p.kind not in variadic]
    needed = [p.name for p in others if p.default is Parameter.empty and p.name not in OPTIONS]
    takes_two = len(positional) >= 2 or Parameter.VAR_POSITIONAL in variadic
    require(takes_two, f"{score!r} is no criterion: it has to take (model, plan).", ScoreError)
    require(not needed, f"{score!r} needs {', '.join(needed)}, which no method has: give a default.", ScoreError)
    return frozenset(p.name for p in others if p.name in OPTIONS)


def _check_name(name: str | None, path: str, score: object) -> None:
    require(
        name is not None or importable(path),
        f"{score!r} has no import path, since it is no function of a module: pass name=.",
        ScoreError,
    )
    require(":" not in (name or ""), f"name={name!r}: a colon stands in import paths only.", ScoreError)


def _check_observed(observes: object) -> None:
    sound = observes in (None, "gradients") or (isinstance(observes, type) and issubclass(observes, Statistic))
    require(sound, f"observes={observes!r}; pass a subclass of collect.Statistic, 'gradients' or None.", ScoreError)
