"""Registries, checks of settings, and what registration refuses."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import etp_graph as etp
from etp_graph import collect, criteria, forces, methods, schedules
from etp_graph._config import Registry, require_choice, require_count, require_number
from etp_graph.errors import EtpError, ForceError, ScoreError, SettingError


def zeros(model: Any, plan: Any) -> Tensor:
    return torch.zeros(plan.n_units)


@dataclass(frozen=True, slots=True, kw_only=True)
class Square(forces.Force):
    def __call__(self, distance: Tensor, *, size: Any = None, importance: Any = None) -> Tensor:
        return distance**2


def test_names_are_unique_and_unknown_ones_list_the_known() -> None:
    table: Registry[int] = Registry("number", error=ScoreError, remedy="Count on.")
    assert table.register("one", 1) == table.register("one", 1) == 1
    with pytest.raises(ScoreError, match="another number named 'one'"):
        table.register("one", 2)
    assert (dict(table), len(table)) == ({"one": 1}, 1)
    for name in ("two", 3, None, ["one"]):
        with pytest.raises(ScoreError, match=r"no number .*known are one\. Count on\."):
            table.find(name)
    with pytest.raises(ScoreError, match="has a name"):
        table.register("", 0)


def test_a_definition_that_runs_again_replaces_itself() -> None:
    table: Registry[object] = Registry("thing")
    table.register("x", first := object(), path="__main__:x")
    table.register("x", second := object(), path="__main__:x")
    assert table["x"] is second
    for path in ("__main__:y", "", "__main__:f.<locals>.x"):
        with pytest.raises(SettingError, match="another thing"):
            table.register("x", first, path=path)


def test_a_block_undoes_what_it_registers() -> None:
    with contextlib.suppress(RuntimeError), forces.FORCES.temporary(), criteria.temporary():
        forces.register(Square)
        criteria.register(zeros, name="zeros", observes="gradients")
        assert "zeros" in criteria.CRITERIA
        assert "zeros" in criteria.COLLECTED
        raise RuntimeError
    assert Square not in forces.FORCES.values()
    assert "zeros" not in {**criteria.CRITERIA, **criteria.COLLECTED, **collect.OBSERVED}


def test_all_tables_are_mappings_of_the_library_s_own_names() -> None:
    assert criteria.CRITERIA["hrank"] is criteria.hrank
    assert set(criteria.COLLECTED) == {
        "activation",
        "f_statistic",
        "fisher",
        "flap",
        "hrank",
        "kron_obs",
        "obs",
        "reap",
        "taylor",
        "wanda",
    }
    assert criteria.COLLECTED["taylor"] == "gradients"
    assert forces.FORCES["linear"] is forces.Linear
    assert schedules.SCHEDULES["cubic"] is schedules.Cubic
    for table in (criteria.CRITERIA, criteria.COLLECTED, forces.FORCES, schedules.SCHEDULES, methods.METHODS):
        assert "nothing" not in table
        with pytest.raises(KeyError):
            table["nothing"]


def test_a_criterion_that_no_longer_needs_data_is_not_recorded() -> None:
    criteria.register(zeros, name="zeros", observes="gradients")
    criteria.register(zeros, name="zeros")
    assert "zeros" not in criteria.COLLECTED
    assert "zeros" not in collect.OBSERVED


def needs_more(model: Any, plan: Any, *, data: Any) -> Tensor:
    raise AssertionError


def one_argument(model: Any) -> Tensor:
    raise AssertionError


@pytest.mark.parametrize(
    ("register", "words"),
    [
        (lambda: criteria.register(lambda model, plan: model), "pass name="),
        (lambda: criteria.register(partial(zeros)), "pass name="),
        (lambda: criteria.register(needs_more), "needs data"),
        (lambda: criteria.register(one_argument), "model, plan"),
        (lambda: criteria.register(3), "no criterion|pass name="),  # type: ignore[type-var]
        (lambda: criteria.register(zeros, name="a:b"), "colon"),
        (lambda: criteria.register(zeros, name="magnitude"), "another criterion named 'magnitude'"),
        (lambda: criteria.register(zeros, observes="weights"), "observes='weights'"),  # type: ignore[arg-type]
        (lambda: forces.register(forces.Force), "derives from Force|lacks"),  # type: ignore[type-abstract]
        (lambda: forces.register(schedules.Cubic), "derives from Force"),  # type: ignore[type-var]
        (lambda: forces.register(type("Half", (Square,), {"name": "linear"})), "another force named 'linear'"),
        (lambda: schedules.register(schedules.Schedule), "derives from Schedule|lacks"),  # type: ignore[type-abstract]
        (lambda: methods.register(methods.Method(name="etp")), "another method named 'etp'"),
    ],
)
def test_what_cannot_be_registered_is_refused(register: Callable[[], object], words: str) -> None:
    before = [*criteria.CRITERIA, *criteria.COLLECTED, *forces.FORCES, *schedules.SCHEDULES, *methods.METHODS]
    with pytest.raises((ScoreError, ForceError), match=words):
        register()
    assert before == [*criteria.CRITERIA, *criteria.COLLECTED, *forces.FORCES, *schedules.SCHEDULES, *methods.METHODS]


def test_decorators_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ForceError, match="above @dataclass"):

        @dataclass(frozen=True, slots=True, kw_only=True)
        @forces.register
        class Backwards(forces.Force):
            def __call__(self, distance: Tensor, *, size: Any = None, importance: Any = None) -> Tensor:
                return distance


def test_a_class_inside_of_a_function_needs_a_name() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Local(Square):
        pass

    with pytest.raises(ForceError, match="give the class a name"):
        forces.register(Local)
    local: type[forces.Force] = type("Local", (Square,), {"name": "local"})
    assert forces.from_json(forces.register(local)().to_json()) == local()


def test_a_method_passes_a_criterion_the_options_that_it_takes() -> None:
    given: dict[str, Any] = {}

    def score(model: Any, plan: Any, p: float = 0, *, seed: int, record: Any = 1, observations: Any = 1) -> Tensor:
        given.update(p=p, seed=seed, record=record, observations=observations)
        return torch.zeros(plan.n_units)

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    plan = etp.trace(model, torch.randn(1, 3))
    methods.Method(name="x", criterion=score, p=3, seed=7).scores(model, plan)
    assert given == {"p": 3, "seed": 7, "record": None, "observations": None}


def test_the_old_name_of_a_record_warns() -> None:
    with pytest.warns(DeprecationWarning, match="Observations"):
        assert collect.Record is collect.Observations
    with pytest.raises(AttributeError, match="Recorder"):
        _ = collect.Recorder


def test_checks_name_the_setting_its_value_and_the_range() -> None:
    for value in (-1, 2.5, float("nan"), float("inf"), "1", True, None, 0):
        with pytest.raises(ScoreError, match=r"size=.*; it must lie in \(0, 2\], for a test"):
            require_number("size", value, 0, 2, ScoreError, excluded=(0,), why="for a test")
    require_number("size", 2, 0, 2, excluded=(0,))
    for bad in (1.0, True, 0, "2"):
        with pytest.raises(ForceError, match="integer of at least 1"):
            require_count("steps", bad, 1)
    for choice in ("c", 1, None, ["a"]):
        with pytest.raises(EtpError, match="choose one of 'a', 'b'"):
            require_choice("kind", choice, ("a", "b"), SettingError)
    require_choice("kind", "a", ("a", "b"))


def test_old_except_clauses_catch_every_error_of_a_setting() -> None:
    """SettingError is above ForceError, and what raised ForceError before still does."""
    assert issubclass(ForceError, SettingError)
    for make in (lambda: methods.get("magic"), lambda: schedules.from_json("[]"), lambda: forces.from_json("{}")):
        with pytest.raises(ForceError):
            make()


def test_the_regularizer_shows_and_checks_one_list_of_settings() -> None:
    shown = inspect.signature(etp.Regularizer).parameters
    settings = etp.regularizer.RegularizerSettings()
    own = {name: p.default for name, p in shown.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert own == {name: getattr(settings, name) for name in own}
    assert set(own) == set(settings.describe()) | {"need_force"}  # which is not written while it is None
    assert set(settings.shared()) - {"need_force"} < set(methods.get("etp").to_dict())


def test_a_regularizer_takes_settings_whole_and_changed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    plan = etp.trace(model, torch.randn(1, 3))
    settings = etp.regularizer.RegularizerSettings(beta=0.5, order="random")
    assert etp.Regularizer(model, plan, settings).settings is settings
    changed = etp.Regularizer(model, plan, settings, beta=0.25).settings
    assert (changed.beta, changed.order) == (0.25, "random")
    with pytest.raises(ForceError, match=r"no setting 'bta'.*known are force, beta, order"):
        etp.Regularizer(model, plan, bta=0.5)
    with pytest.raises(ForceError, match="beta=-1"):
        etp.Regularizer(model, plan, settings, beta=-1)
