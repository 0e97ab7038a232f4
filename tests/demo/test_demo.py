from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import etp_graph as etp
from etp_graph.demo import DemoConfig, DemoResult, run_demo
from etp_graph.demo import _contest as contest
from etp_graph.demo import _run as run
from etp_graph.demo._contest import Contest, count_macs
from etp_graph.demo._report import rows
from etp_graph.demo._results import LABELS, METHODS, Recipe
from etp_graph.demo.zoo import data
from etp_graph.demo.zoo import torch_pruning as baselines
from etp_graph.demo.zoo.models import SmallResNet, resnet20

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

RECIPE = Recipe(
    dense_epochs=1, sparse_epochs=2, finetune_epochs=1, curve=(2.0, 4.0), curve_epochs=1,
    strengths={"depgraph": 5e-4, "torque": 1e-3},
)  # fmt: skip
CONFIG = DemoConfig(speed_up=4, seeds=1, recipe=RECIPE, train_limit=120, test_limit=60, latency_rounds=2)
PLOTS = {"accuracy-against-speed-up.png", "norms-against-distance.png"}


@pytest.fixture(scope="module")
def small() -> Iterator[pytest.MonkeyPatch]:
    """A narrower network, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SmallResNet", lambda: SmallResNet(widths=(8, 16, 16), blocks=1))
        yield patch


@pytest.fixture(scope="module")
def done(small: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, Path, str]:
    out = tmp_path_factory.mktemp("demo")
    console = Console(file=io.StringIO(), width=100)
    result = run_demo(CONFIG, out, console=console)
    return result, out, console.file.getvalue()


def test_every_method_is_in_the_table_and_in_the_report(done: tuple[DemoResult, Path, str]) -> None:
    result, out, printed = done
    report = (out / "report.md").read_text()
    for method, row in zip(("checkpoint", *METHODS), rows(result), strict=True):
        assert method == "checkpoint" or row[0] == LABELS[method]
        assert "| " + " | ".join(row) + " |" in report
        assert row[0] in printed
        assert row[3] in printed
    assert CONFIG.command in report
    assert torch.__version__ in report


def test_cut_networks_meet_the_budget_and_the_control_is_whole(done: tuple[DemoResult, Path, str]) -> None:
    result = done[0]
    for outcome in result.outcomes:
        assert outcome.speed_up == result.macs / outcome.macs
        assert outcome.speed_up == 1 if outcome.method == "dense" else outcome.speed_up >= 4
    for method in ("random", "torque", "etp"):
        assert result.of(method)[0].macs >= 0.9 * result.macs / 4


def test_surgery_of_etp_changes_nothing(done: tuple[DemoResult, Path, str]) -> None:
    outcome = done[0].of("etp")[0]
    assert outcome.pruned == outcome.sparse


def test_all_methods_begin_with_the_same_checkpoint(done: tuple[DemoResult, Path, str]) -> None:
    assert len({outcome.dense for outcome in done[0].outcomes}) == 1


def test_models_are_saved_and_are_what_was_measured(done: tuple[DemoResult, Path, str]) -> None:
    result, out, _ = done
    x = torch.randn(1, 1, 8, 8)
    for outcome in result.outcomes:
        folder = out / f"{outcome.method}-seed0"
        assert {file.name for file in folder.iterdir()} == {"model.safetensors", "manifest.json"}
        if outcome.method == "depgraph":
            continue  # cut by another library: loads into the same widths only
        model = etp.load(folder, build=lambda: SmallResNet(widths=(8, 16, 16), blocks=1))
        assert count_macs(model, x) == outcome.macs
        assert sum(p.numel() for p in model.parameters()) == outcome.params


def test_results_hold_every_number_and_the_plots_exist(done: tuple[DemoResult, Path, str]) -> None:
    result, out, _ = done
    body = json.loads((out / "results.json").read_text())
    assert [o["method"] for o in body["outcomes"]] == list(METHODS)
    assert body["config"]["recipe"]["strengths"] == RECIPE.strengths
    for name in PLOTS:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert name in (out / "report.md").read_text()
    etp_run = result.of("etp")[0]
    assert [point.speed_up for point in etp_run.curve] == [2.0, 4.0]
    assert [norms.epoch for norms in etp_run.norms] == [0, 1, 2]
    assert 0 in etp_run.norms[-1].norm


def test_etp_ranks_by_importance_so_norms_fall_with_distance_at_the_start(done: tuple[DemoResult, Path, str]) -> None:
    start = done[0].of("etp")[0].norms[0]
    by_distance = [norm for _, norm in sorted(zip(start.distance, start.norm, strict=True))]
    assert by_distance == sorted(by_distance, reverse=True)
    assert min(start.distance) == 0
    assert max(start.distance) == 1


def test_a_run_repeats_itself(small: pytest.MonkeyPatch, done: tuple[DemoResult, Path, str], tmp_path: Path) -> None:
    again = run_demo(replace(CONFIG, methods=("depgraph", "etp")), tmp_path)
    for outcome in again.outcomes:
        first = done[0].of(outcome.method)[0]
        assert replace(outcome, seconds=0, latency_ratio=0) == replace(first, seconds=0, latency_ratio=0)


def test_validation_leaves_the_test_images_alone(
    small: pytest.MonkeyPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, methods=("random",), validation=True, recipe=replace(RECIPE, sparse_epochs=1))
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(contest, "accuracy", lambda model, x, y: seen.append(x) or 0.5)
    run_demo(config, tmp_path)
    split = data.digits()
    assert seen and all(torch.equal(x, split.val_x) for x in seen)
    report = (tmp_path / "report.md").read_text()
    assert "Validation accuracy in percent" in report and " --validation`" in report


def test_a_second_run_replaces_the_models_of_the_first(small: pytest.MonkeyPatch, tmp_path: Path) -> None:
    short = replace(CONFIG, methods=("random",), recipe=replace(RECIPE, dense_epochs=0, sparse_epochs=1))
    for speed_up in (2.0, 4.0):
        result = run_demo(replace(short, speed_up=speed_up), tmp_path)
    model = etp.load(tmp_path / "random-seed0", build=lambda: SmallResNet(widths=(8, 16, 16), blocks=1))
    assert count_macs(model, torch.randn(1, 1, 8, 8)) == result.outcomes[0].macs
    assert not (tmp_path / "accuracy-against-speed-up.png").exists()


@pytest.mark.parametrize("build", [SmallResNet, resnet20])
def test_the_neutral_count_agrees_with_the_plan(build: type[nn.Module]) -> None:
    model = build()
    x = torch.randn(1, *((1, 8, 8) if build is SmallResNet else (3, 32, 32)))
    assert count_macs(model, x) == etp.cost(model, etp.trace(model, x, check=False)).macs


def test_presets_exist_for_every_data_set_and_length() -> None:
    for name in ("digits", "cifar10"):
        for quick in (False, True):
            config = DemoConfig.preset(name, quick=quick)
            assert config.seeds == (1 if quick else 3)
            assert set(config.recipe.strengths) == {"depgraph", "torque"}
            assert name in config.command
            assert ("--quick" in config.command) == quick


def test_missing_data_is_told_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path / "nothing"))
    with pytest.raises(data.DataError, match="resnet20_cifar10"):
        run_demo(DemoConfig.preset("cifar10", quick=True), tmp_path / "out")


def test_depgraph_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise etp.EtpError("pip install torch-pruning")

    monkeypatch.setattr(baselines, "_torch_pruning", missing)
    split = replace(data.digits(), train_x=torch.randn(4, 1, 8, 8), train_y=torch.arange(4))
    build = lambda: SmallResNet(widths=(8, 8, 8), blocks=1)  # noqa: E731
    contest = Contest(build, split, replace(RECIPE, dense_epochs=0), speed_up=2, seed=0)
    with pytest.raises(etp.EtpError, match="pip install"):
        contest.run("depgraph")


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(etp.EtpError, match="--out"):
        run_demo(CONFIG, tmp_path / "file" / "out")


def test_progress_off_a_terminal_is_a_line_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with run._progress(Console(file=io.StringIO()), 4) as tick:
        for what in ("first", "first", "second", "second"):
            tick(what, 1)
    assert capsys.readouterr().err.splitlines() == ["  0 % first", " 50 % second"]
    with run._progress(None, 4) as tick:
        tick("first", 1)
    assert capsys.readouterr().err == ""
