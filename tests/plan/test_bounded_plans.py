"""A plan from a small text asks for little memory, and all that a selection says of a time is read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import etp_graph as etp
from etp_graph.plan import LatencyFit
from tests.support.models.toy import toy_plan

HUGE = {"range": [0, 2**25]}


def repeated_slices(body: dict[str, Any]) -> None:
    body["tensors"]["conv1.weight"][0] = 2**25
    body["groups"][0]["slices"] += [["conv1.weight", 0, {"range": [0, 1]}, {"range": [0, 1]}, False]] * 40


def long_axes(body: dict[str, Any]) -> None:
    for number in range(9):
        body["tensors"][f"t{number}"] = [2**40]
        body["groups"][0]["slices"].append([f"t{number}", 0, {"range": [0, 1]}, {"range": [0, 1]}, False])


def long_attributes(body: dict[str, Any]) -> None:
    body["groups"].append({**body["groups"][0], "name": "more", "n_units": 2**25, "blocks": 1, "slices": []})
    body["groups"][-1]["attributes"] = [["conv1", f"size{n}", None, HUGE, HUGE] for n in range(9)]


def long_activations(body: dict[str, Any]) -> None:
    body["activations"]["a"] = 2**40
    body["groups"][0]["attributes"].append(["~", "a", None, {"range": [0, 1]}, {"range": [0, 1]}])


@pytest.mark.parametrize("change", [repeated_slices, long_axes, long_attributes, long_activations])
def test_a_plan_that_asks_for_much_memory_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    body = json.loads(toy_plan().to_json())
    change(body)
    with pytest.raises(etp.PlanError, match="positions"):
        etp.Plan.from_json(json.dumps(body))


@pytest.mark.parametrize("round_to", [8, {"neurons": 64, "heads": 2}])
def test_the_fit_of_a_time_is_read_back(round_to: Any) -> None:
    fit = LatencyFit(target_ms=2.0, predicted_ms=1.9, measured_ms=2.1, dense_ms=4.0, iterations=2, round_to=round_to)
    assert LatencyFit.from_dict(json.loads(json.dumps(fit.to_dict()))) == fit
    with pytest.raises(etp.PlanError, match="round_to"):
        LatencyFit.from_dict({**fit.to_dict(), "round_to": {"neurons": "many"}})
