"""The report: everything is there, nothing from a folder is markup, and the file needs nothing else."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import etp_graph as etp
from etp_graph.compression import JOURNAL_FILE
from etp_graph.errors import CheckpointError
from etp_graph.report import _html as report_parts
from etp_graph.report import _story as report_data
from etp_graph.report import page, write_report
from etp_graph.report._story import MeasuredStage, NormHistogram, ReportData, Width, read_report_data
from etp_graph.units import Units
from tests.support.command_line import invoke
from tests.support.faults.journals import copy_steps, read_body, write_body
from tests.support.training_loops import Loop, run, toy

VOID = {"meta"}
HOSTILE = "</title><script>alert('1')</script>\"&<img src=x onerror=y>"


class Reader(HTMLParser):
    """Tags with attributes, text by tag, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def of(self, tag: str, cls: str | None = None) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag and cls in (None, found.get("class"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("report") / "run"
    run(toy(), checkpoint=home, rounds=2, speed_up=3)
    return home


def test_report_of_a_run_shows_what_compress_returned(folder: Path, tmp_path: Path) -> None:
    code, out, err = invoke("report", str(folder), "--out", str(tmp_path / "r.html"))
    assert code == 0, err
    assert "r.html" in out
    found = Reader((tmp_path / "r.html").read_text(encoding="utf8"))
    again = run(toy(), checkpoint=folder, rounds=2, speed_up=3)  # read back, nothing trains
    rows = ["dense", "sparse 1", "pruned 1", "finetuned 1", "sparse 2", "pruned 2", "finetuned 2"]
    assert [text for text in found.texts["th"] if text in rows] == rows
    cells = found.texts["td"]
    assert f"{again.metric_dense:#.4g}" == cells[0]
    assert f"{again.speed_up:.2f}x" in cells
    assert found.texts["h2"] == ["Before and after", "The network", "Norm against distance"]
    kept = {name: int(keep.sum()) for name, keep in again.selections[-1].keep.items()}
    assert found.texts["b"] == ["conv1", "conv2", "linear"]
    assert found.texts["i"][0] == f"{kept['conv1']} of 8 channels"
    assert found.texts["i"][2] == "5 of 5 neurons, locked"


def test_bars_are_as_wide_as_their_units(folder: Path) -> None:
    story = read_report_data(folder)
    found = Reader(page(story))
    tracks = [each["width"] for each in found.of("rect", "track")]
    marks = [float(str(each["width"]).rstrip("%")) for each in found.of("rect", "mark")]
    assert tracks == ["100.00%", "75.00%", "62.50%"]
    assert marks == pytest.approx([100 * width.after / 8 for width in story.widths], abs=0.01)


def test_norms_are_those_of_the_units_after_sparse_training(folder: Path) -> None:
    loop, norms = Loop(), []
    plan = etp.trace(toy(), loop.x[:1])

    def train(network: torch.nn.Module, phase: etp.Phase) -> None:
        loop.train(network, phase)
        if phase.name == "sparse" and not norms:
            norms.append(Units(network, plan).square_norms(network).detach().sqrt())

    run(toy(), loop, train=train, rounds=2, speed_up=3)
    first = read_report_data(folder).norms[1]
    assert [each.name for each in first] == ["conv1", "conv2"]
    for shown, want in zip(first, (norms[0][:8], norms[0][8:14]), strict=True):
        torch.testing.assert_close(torch.tensor(shown.norm).sort()[0], want.sort()[0], rtol=1e-5, atol=1e-6)
        assert list(shown.distance) == sorted(shown.distance)
        assert (shown.distance[0], shown.distance[-1]) == (0, 1)
    selection = run(toy(), checkpoint=folder, rounds=2, speed_up=3).selections[0]
    assert [sum(shown.kept) for shown in first] == [int(selection.keep[shown.name].sum()) for shown in first]


def test_a_run_that_goes_on_is_shown_as_far_as_it_came(folder: Path, tmp_path: Path) -> None:
    body = read_body(folder)
    whole = [step["step"] for step in body["steps"]]
    for length in range(len(whole) + 1):
        copy_steps(folder, tmp_path, whole[:length])
        write_body(tmp_path, {**body, "steps": body["steps"][:length]})
        story = read_report_data(tmp_path)
        assert story.unfinished == (length < len(whole))
        assert len(story.stages) <= length
        assert ("not finished" in page(story)) == story.unfinished
        Reader(page(story))


def test_a_folder_of_before_has_no_plan_and_no_dense_cost(folder: Path, tmp_path: Path) -> None:
    body = read_body(folder)
    del body["steps"][0]["cost"]
    first, *others = [step["step"] for step in body["steps"]]
    copy_steps(folder, tmp_path, others)
    shutil.copytree(tmp_path / others[0], tmp_path / first)  # tensors without a plan
    write_body(tmp_path, body, files=False)
    story = read_report_data(tmp_path)
    assert (story.stages[0].macs, story.stages[-1].macs is None) == (None, False)
    assert list(story.norms) == [2]
    Reader(page(story))


def test_report_of_a_saved_model(tmp_path: Path) -> None:
    model = toy()
    plan = etp.trace(model, Loop().x[:1])
    selection = etp.allocate(model, plan, etp.criteria.magnitude(model, plan), budget=etp.Budget(speed_up=2))
    etp.prune_(model, plan, selection)
    etp.save(model, tmp_path / "saved")
    found = Reader(write_report(tmp_path / "saved", tmp_path / "r.html").read_text())
    assert found.texts["h2"] == ["The network"]
    assert found.texts["h1"] == ["Saved model saved"]
    assert "in the order of the plan" in "".join(found.texts["p"])


def hostile() -> ReportData:
    """Every text of a story is an attack."""
    return ReportData(
        title=HOSTILE,
        facts={HOSTILE: HOSTILE},
        stages=[
            MeasuredStage(name=HOSTILE, metric=1.0, amounts={"macs": 10, "params": 10}, seconds=1.0),
            MeasuredStage(name="x", metric=1.0, amounts={"macs": 5}),
        ],
        widths=[Width(name=HOSTILE, before=4, after=2, kind=HOSTILE, locked=HOSTILE)],
        norms={1: [NormHistogram(name=HOSTILE, distance=[0.0, 1.0], norm=[0.0, 0.0], kept=[True, False], units=9)]},
    )


def test_names_are_text_wherever_they_stand() -> None:
    text = page(hostile())
    found = Reader(text)
    assert not {"script", "img"} & {tag for tag, _ in found.tags}
    assert found.texts["h1"] == [HOSTILE]
    assert found.of("i")[0]["title"] == HOSTILE
    assert text.count("<script") == text.count("<img") == 0


@pytest.mark.parametrize("which", ["run", "hostile"])
def test_the_file_needs_nothing_else(folder: Path, which: str) -> None:
    text = page(read_report_data(folder) if which == "run" else hostile())
    found = Reader(text)
    assert not re.search(r"https?:|@import|url\(", text)
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & {tag for tag, _ in found.tags}
    assert not {"src", "href", "xlink:href", "style"} & {name for _, given in found.tags for name in given}
    assert all(not name.startswith("on") for _, given in found.tags for name in given)


def test_drawings_have_names_and_the_page_fits_a_phone(folder: Path) -> None:
    found = Reader(page(read_report_data(folder)))
    drawings = found.of("svg")
    assert all(each["role"] == "img" for each in drawings)
    assert len(found.texts["title"]) == 1 + len(drawings)
    assert found.of("meta")[1] == {"name": "viewport", "content": "width=device-width, initial-scale=1"}
    assert found.of("html")[0]["lang"] == "en"
    assert "prefers-color-scheme:dark" in found.texts["style"][0]
    assert all(number.isascii() for each in found.of("circle") for number in map(str, each.values()))
    assert not re.search(r'="(nan|-?inf)', page(read_report_data(folder)))


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours", [report_parts.LIGHT, report_parts.DARK], ids=["light", "dark"])
def test_contrast(colours: dict[str, str]) -> None:
    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(colours[a]), luminance(colours[b])))
        return (high + 0.05) / (low + 0.05)

    assert all(contrast(name, "paper") >= 4.5 for name in ("ink", "soft"))
    assert all(contrast(name, "paper") >= 3 for name in ("mark", "gone", "rule"))
    assert contrast("mark", "track") >= 3


def test_charts_stand_equal_and_extreme_values() -> None:
    for values in ([1.0, 1.0], [0.0, 0.0], [-3e12, 4e9], [1e-9, 2e-9]):
        for zero in (False, True):
            figure = report_parts.line_chart(["a", "b"], values, caption="x", zero=zero)
            ys = [float(str(each["cy"])) for each in Reader(figure).of("circle")]
            assert all(0 <= y <= 170 for y in ys)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (None, "Name the folder"),
        ("nonsense", "not a journal"),
        ('{"format": 1, "arguments": {}, "steps": []}', "fields of a Method"),
        ('{"format": 1, "arguments": {}, "steps": [{"step": "../../x", "weights": true}]}', "not a journal"),
    ],
)
def test_a_folder_that_holds_something_else_is_one_message(tmp_path: Path, content: str | None, hint: str) -> None:
    if content is not None:
        (tmp_path / JOURNAL_FILE).write_text(content)
    code, _, err = invoke("report", str(tmp_path), "--out", str(tmp_path / "r.html"))
    assert code == 1
    assert hint in err
    assert "Traceback" not in err
    assert not (tmp_path / "r.html").exists()


def test_a_step_that_lacks_its_metric_is_named(folder: Path, tmp_path: Path) -> None:
    body = read_body(folder)
    del body["steps"][0]["metric"]
    copy_steps(folder, tmp_path, [step["step"] for step in body["steps"]])
    write_body(tmp_path, body)
    with pytest.raises(CheckpointError, match="metric"):
        read_report_data(tmp_path)


def test_a_file_that_cannot_be_written_is_an_error(folder: Path) -> None:
    code, _, err = invoke("report", str(folder), "--out", "/nowhere/r.html")
    assert code == 1
    assert "/nowhere/r.html" in err


def test_wide_groups_are_thinned_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_data, "POINTS", 3)
    text = page(read_report_data(folder))
    assert "conv1, 3 of 8 units" in text


def test_stages_without_costs_show_dashes() -> None:
    story = replace(
        hostile(), stages=[MeasuredStage(name="dense", metric=2.0), MeasuredStage(name="pruned", metric=1.0)]
    )
    assert Reader(page(story)).texts["td"].count("-") == 10
