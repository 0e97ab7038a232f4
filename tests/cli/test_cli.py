from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.cli._models import ResolveError, build_model, parse_shape
from tests.support.command_line import SHAPE, TOY, invoke
from tests.support.models.toy import Toy


class Lying(nn.Module):
    """Reads one channel by its number, through an operator that hides it: removing channels changes what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv2(x) * (1 + x.shape[1])


def toy_with_inputs() -> tuple[nn.Module, Tensor]:
    """A callable that brings its example inputs along."""
    return Toy(), torch.randn(1, 3, 8, 8)


def seven() -> int:
    """A callable that makes no model."""
    return 7


def failing() -> nn.Module:
    """A callable that fails."""
    raise ValueError("no such width")


def test_version() -> None:
    code, out, _ = invoke("--version")
    assert code == 0
    assert out.startswith(f"etp-graph {etp.__version__} ")


def test_inspect_prints_the_plan_and_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    code, out, _ = invoke("inspect", TOY, *SHAPE, "--json", str(file))
    plan = etp.trace(Toy(), torch.randn(1, 3, 8, 8))
    assert code == 0
    assert etp.Plan.from_json(file.read_text()) == plan
    assert out.strip() == str(plan).strip()


def test_inspect_locks_what_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert invoke("inspect", TOY, *SHAPE, "--ignore", "conv1", "--json", str(file))[0] == 0
    assert {g.name for g in etp.Plan.from_json(file.read_text()).prunable} == {"conv2"}


def test_a_callable_may_bring_its_inputs() -> None:
    code, out, _ = invoke("verify", "tests.cli.test_cli:toy_with_inputs")
    assert code == 0
    assert "pruned == masked" in out


def test_verify_refutes_a_model_whose_output_depends_on_its_width() -> None:
    code, out, err = invoke("verify", "tests.cli.test_cli:Lying", *SHAPE)
    assert code == 1
    assert "pruned == masked" not in out
    assert "conv1" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("method", ["l1", "l2", "etp", "torque", "random"])
def test_prune_saves_what_fits_the_budget(tmp_path: Path, method: str) -> None:
    torch.manual_seed(3)
    dense = Toy()
    save_file(dense.state_dict(), tmp_path / "w.safetensors")
    code, out, _ = invoke(
        "prune", TOY, *SHAPE, "--speed-up", "2", "--method", method,
        "--weights", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0
    assert "speed-up" in out
    x = torch.randn(1, 3, 8, 8)
    pruned = etp.load(tmp_path / "out", build=Toy)
    macs = [etp.cost(m, etp.trace(m, x)).macs for m in (dense, pruned)]
    assert 2 <= macs[0] / macs[1] < 2.3
    # every row of the first weight that is left is a row of the weights that were given
    rows = {tuple(row.flatten().tolist()) for row in dense.conv1.weight.detach()}
    assert {tuple(row.flatten().tolist()) for row in pruned.conv1.weight.detach()} <= rows


def test_prune_replaces_a_saved_model_only_if_asked(tmp_path: Path) -> None:
    args = ("prune", TOY, *SHAPE, "--speed-up", "2", "--out", str(tmp_path / "out"))
    assert invoke(*args)[0] == 0
    code, _, err = invoke(*args)
    assert code == 1
    assert "overwrite" in err
    assert invoke(*args, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("resnet50", "torchvision:resnet50"),
        ("torchvision:", "torchvision:resnet50"),
        ("nowhere.at.all:f", "cannot import"),
        ("tests.support.models.toy:Tox", "Toy"),
        ("tests.support.models.toy:toy_plan", "torch.nn.Module"),
        ("tests.cli.test_cli:seven", "torch.nn.Module"),
        ("tests.cli.test_cli:failing", "no such width"),
        ("tests.cli.test_cli:SHAPE", "list"),
        ("tests.support.models.toy:Toy", "--input-shape"),
        ("hf:/nowhere", "config.json"),
    ],
)
def test_a_wrong_model_string_says_what_is_wrong(model: str, hint: str) -> None:
    code, out, err = invoke("inspect", model)
    assert code == 1
    assert not out
    assert hint in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("source", "library"), [("torchvision", "torchvision"), ("timm", "timm")])
def test_an_unknown_name_suggests_a_known_one(source: str, library: str) -> None:
    pytest.importorskip(library)
    code, _, err = invoke("inspect", f"{source}:resnet5O")
    assert code == 1
    assert "resnet50" in err


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["inspect", TOY, "--input-shape", "1,x"], "1,3,224,224"),
        (["inspect", TOY, "--input-shape", "1,0,8,8"], "at least 1"),
        (["inspect", TOY, "--input-shape", "1,3:half"], "long"),
        (["inspect", TOY, "--input-shape", "1,4,8,8"], "[1, 4, 8, 8]"),
        (["inspect", TOY, *SHAPE, "--ignore", "layer9"], "layer9"),
        (["inspect", TOY, *SHAPE, "--json", "/nowhere/plan.json"], "/nowhere/plan.json"),
        (["prune", TOY, *SHAPE, "--speed-up", "0.5", "--out", "x"], "speed_up=0.5"),
        (["prune", TOY, *SHAPE, "--out", "x"], "exactly one"),
        (["prune", TOY, *SHAPE, "--speed-up", "1e9", "--out", "x"], "closest"),
        (["prune", TOY, *SHAPE, "--speed-up", "2", "--weights", "/nowhere.safetensors", "--out", "x"], "/nowhere"),
        (["prune", "tests.cli.test_cli:Lying", *SHAPE, "--method", "bn_scale", "--speed-up", "2", "--out", "x"], ""),
        (["demo", "--speed-up", "0.5"], "speed_up=0.5"),
    ],
)
def test_errors_are_one_message_and_leave_nothing(
    args: list[str], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = invoke(*args)
    assert code == 1
    assert "error:" in err
    assert hint in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    code, _, err = invoke(
        "prune",
        TOY,
        *SHAPE,
        "--speed-up",
        "2",
        "--weights",
        str(tmp_path / "w.safetensors"),
        "--out",
        str(tmp_path / "o"),
    )
    assert code == 1
    assert "do not fit Toy" in err
    assert not (tmp_path / "o").exists()


def test_debug_shows_the_error_itself() -> None:
    with pytest.raises(ResolveError):
        invoke("inspect", "resnet50", "--debug")


def test_threads_reach_pytorch() -> None:
    before = torch.get_num_threads()
    try:
        assert invoke("inspect", TOY, *SHAPE, "--threads", "1")[0] == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "shape"), [("squeezenet1_1", (1, 3, 224, 224)), ("inception_v3", (1, 3, 299, 299))])
def test_torchvision_models_come_with_their_own_input_size(name: str, shape: tuple[int, ...]) -> None:
    pytest.importorskip("torchvision")
    assert build_model(f"torchvision:{name}").inputs.shape == shape


def test_timm_models_come_with_their_own_input_size() -> None:
    pytest.importorskip("timm")
    assert build_model("timm:test_resnet").inputs.shape == (1, 3, 160, 160)


def test_hugging_face_configs_are_built_without_weights(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 50, **sizes}))
    found = build_model(f"hf:{tmp_path}")
    assert type(found.model).__name__ == "BertModel"
    assert set(found.inputs) == {"input_ids"}


def test_resolving_twice_gives_the_same_weights_and_leaves_the_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = (build_model(TOY, input_shapes=["1,3,8,8"]) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.inputs, second.inputs)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_shapes_of_integers() -> None:
    tokens = parse_shape("2,5:long")
    assert tokens.dtype == torch.int64
    assert tokens.shape == (2, 5)
    assert parse_shape("2x5").shape == (2, 5)


def test_kinds_of_units_are_chosen_by_name() -> None:
    code, out, err = invoke("inspect", "timm:vit_tiny_patch16_224", "--kind", "heads")
    assert code == 0, err
    assert "kind 'neurons' is not among" in out
    code, _, err = invoke("inspect", "timm:vit_tiny_patch16_224", "--kind", "layers")
    assert code != 0
    assert "the kinds are channels" in err


def test_the_command_line_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "etp_graph", "--help"], capture_output=True, text=True, check=True)
    assert "etp-graph" in done.stdout
    assert "inspect" in done.stdout
