"""Whatever JSON says, reading it gives an object that can be used, or one documented error with a short message."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import etp_graph as etp
from etp_graph import forces, methods, schedules
from etp_graph.checkpoint import MANIFEST_FILE, load, save, sealed
from etp_graph.compression import JOURNAL_FILE, read_journal
from etp_graph.errors import MESSAGE_LENGTH, CheckpointError, EtpError
from etp_graph.latency import Latency
from etp_graph.plan import MAX_UNITS, Cost, LatencyFit, Plan, Selection
from etp_graph.regularizer import RegularizerSettings
from etp_graph.report import page
from etp_graph.report._story import read_report_data
from tests.support.faults.damage import mutated
from tests.support.faults.interrupted import Loop, Power, run, seed, toy
from tests.support.faults.journals import read_body, write_body
from tests.support.models.toy import Toy
from tests.support.pruned_toy import state, trained_toy

Tell = Callable[[str], None]
DATA = Path(__file__).parents[1] / "data" / "0.1.0"
PLAN = (DATA / "cnn.plan.json").read_text()
FIT = LatencyFit(
    target_ms=1.0, predicted_ms=1.0, measured_ms=1.0, dense_ms=2.0, iterations=1, round_to=1, layers={"a": (1.0, 2.0)}
)
LATENCY = Latency(
    p50_ms=1.0, p90_ms=2.0, throughput=3.0, peak_memory=None, threads=1, repetitions=3, device="cpu"
)  # fmt: skip
READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "plan": (PLAN, Plan.from_json),
    "selection": ((DATA / "cnn.selection.json").read_text(), Selection.from_json),
    "cost": (Plan.from_json(PLAN).dense.to_json(), Cost.from_json),
    "result": ((DATA / "result.json").read_text(), etp.CompressResult.from_json),
    "budget": ((DATA / "budget.json").read_text(), etp.Budget.from_json),
    "method": ((DATA / "method.json").read_text(), methods.Method.from_json),
    "method with schedules": ((DATA / "greg2.json").read_text(), methods.Method.from_json),
    "latency": (LATENCY.to_json(), Latency.from_json),
    "force": (forces.Exponential().to_json(), forces.from_json),
    "schedule": (schedules.Cubic().to_json(), schedules.from_json),
    "settings": (RegularizerSettings(beta=0.1).to_json(), RegularizerSettings.from_json),
}


@pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_from_json(name: str, count: int, tell: Tell) -> None:
    text, read = READERS[name]
    chance = random.Random(name)
    accepted = 0
    for number in range(count):
        changed = mutated(text, chance)
        message = ""
        try:
            found = read(changed)
        except EtpError as error:
            message = str(error)
        else:
            accepted += 1
            assert read(found.to_json()).to_json() == found.to_json(), f"change {number}"
            str(found)
        assert len(message) <= MESSAGE_LENGTH
    tell(f"{count} texts, {count - accepted} refused, {accepted} read")
    assert 0 < accepted < count


@pytest.mark.parametrize("name", READERS)
def test_every_reader_reads_what_was_written(name: str) -> None:
    text, read = READERS[name]
    assert read(text).to_json() == read(read(text).to_json()).to_json()
    for junk in (None, 3, b"\xff", "", "[]", "null", "NaN", "[" * 100_000, '{"a": 1, "a": 1}', '"\\ud800"'):
        with pytest.raises(EtpError):
            read(junk)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fits_of_a_latency(count: int, tell: Tell) -> None:
    chance = random.Random(0)
    for _ in range(count):
        try:
            body = json.loads(mutated(json.dumps(FIT.to_dict()), chance))
        except (ValueError, RecursionError):
            continue
        try:
            found = LatencyFit.from_dict(body)
        except EtpError:
            continue
        assert found.speed_up >= 0
        assert str(found)
    tell(f"{count} texts")


def test_sizes_are_bound_before_anything_is_allocated() -> None:
    """Each of these few bytes asked for gigabytes, or for a check that does not end."""
    huge = {f"conv{i}": [MAX_UNITS, []] for i in range(8)}
    with pytest.raises(EtpError, match="units"):
        Selection.from_json(json.dumps(huge))
    body = json.loads(PLAN)
    body["groups"][0]["n_units"] = 2**31
    with pytest.raises(EtpError, match="n_units"):
        Plan.from_json(json.dumps(body))
    result = json.loads((DATA / "result.json").read_text())
    result["rounds"] = [{**result["rounds"][0], "selection": {"conv1": [MAX_UNITS, []]}}] * 5
    with pytest.raises(EtpError, match="units in all rounds"):
        etp.CompressResult.from_json(json.dumps(result))
    method = json.loads((DATA / "method.json").read_text())
    with pytest.raises(EtpError, match="rounds"):
        methods.Method.from_json({**method, "rounds": 10**8})


def manifest_reader(folder: Path) -> Callable[[], None]:
    def read() -> None:
        model = Toy()
        before = state(model)
        try:
            load(folder, build=model)
        except CheckpointError:
            assert state(model) == before
            raise

    return read


def refused_or_read(read: Callable[[], object]) -> bool:
    """Return whether a function returns; its only errors are documented ones with short messages."""
    try:
        read()
    except EtpError as error:
        message = str(error)
    else:
        return True
    assert 0 < len(message) <= MESSAGE_LENGTH
    return False


@pytest.mark.parametrize("count", [30, pytest.param(10_000, marks=pytest.mark.slow)])
def test_manifests_with_a_valid_digest(count: int, tmp_path: Path, tell: Tell) -> None:
    folder = save(trained_toy(1), tmp_path / "m")
    body = json.loads((folder / MANIFEST_FILE).read_text())
    del body["digest"]
    chance = random.Random(1)
    read = manifest_reader(folder)
    outcomes = []
    for _ in range(count):
        text = mutated(json.dumps(body), chance)
        with suppress(ValueError, TypeError, RecursionError):  # no object: nothing to seal
            text = json.dumps(sealed(json.loads(text)))
        (folder / MANIFEST_FILE).write_text(text, encoding="utf8", errors="surrogatepass")
        outcomes.append(refused_or_read(read))
        refused_or_read(lambda: page(read_report_data(folder)))
    tell(f"{count} manifests, {outcomes.count(False)} refused, {outcomes.count(True)} loaded")
    assert False in outcomes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    seed()
    run(toy(), Loop(), folder)
    return folder


@pytest.mark.parametrize("files", [True, False], ids=["sealed", "of 0.1.0"])
@pytest.mark.parametrize("count", [6, pytest.param(2_000, marks=pytest.mark.slow)])
def test_journals(count: int, files: bool, finished: Path, tmp_path: Path, tell: Tell) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    body, chance = read_body(folder), random.Random(2)
    write_body(folder, body, files=files)
    text = json.dumps(read_body(folder))
    want = run(toy(), Loop(), folder).to_json()

    def read() -> None:
        model = toy()
        found = run(model, Loop(fail_at=0), folder)
        assert found.rounds
        assert len(found.to_json()) > len(want) / 2

    for number in range(count):
        changed = mutated(text, chance)
        if files:
            with suppress(ValueError, TypeError, RecursionError):  # no object: nothing to seal
                changed = json.dumps(sealed(json.loads(changed)))
        (folder / JOURNAL_FILE).write_text(changed, encoding="utf8", errors="surrogatepass")
        if refused_or_read(lambda: read_journal(folder / JOURNAL_FILE)) or number % 100 == 0:
            with suppress(Power):  # the journal lacks steps, and the run goes on
                refused_or_read(read)
        refused_or_read(lambda: page(read_report_data(folder)).encode())
    tell(f"{count} journals, each also as a report")
