"""Drawings of a plan: every layer of every group is there, under its role, and names are text."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

import etp_graph as etp
from benchmarks.models import registry
from etp_graph.errors import EtpError
from etp_graph.plan import Plan
from etp_graph.plan.drawing import Role, dot, layers_of, layers_text, svg
from tests.support.command_line import SHAPE, TOY, invoke
from tests.support.models.toy import toy_plan

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")


def hostile() -> Plan:
    plan = toy_plan()
    first, *others = plan.groups
    return replace(plan, groups=(replace(first, name='"];\n<script>&\\', kind="a\\N"), *others))


def test_layers_of_the_toy() -> None:
    assert layers_text(toy_plan()).splitlines()[:5] == [
        "conv1: 8 channels",
        "  made by  conv1  weight [<8>, 3, 3, 3]",
        "  through  norm   weight [<8>], bias [<8>], running_mean [<8>], running_var [<8>]",
        "  read by  conv2  weight [6, <8>, 3, 3]",
        "",
    ]
    assert "linear: 5 neurons, locked: feeds the model's output" in layers_text(toy_plan())


@pytest.mark.parametrize(
    ("name", "group", "makes", "reads"),
    [
        ("hf:gpt2", "transformer.h.0.attn.c_attn", {"c_attn"}, {"c_proj"}),  # its weights are transposed
        ("hf:bert", "bert.encoder.layer.0.intermediate.dense", {"dense"}, {"dense"}),
        ("rnn:lstm_lm", "embedding", {"embedding"}, {"rnn"}),
        ("pyg:gcn2", "convs.0.lin", {"lin"}, {"lin"}),
    ],
)
def test_roles_in_real_networks(name: str, group: str, makes: set[str], reads: set[str]) -> None:
    entry = registry()[name]
    plan = etp.trace(entry.build(), entry.inputs(), check=False)
    found = list(layers_of(plan, plan[group]))
    assert {layer.name.split(".")[-1] for layer in found if layer.role is Role.MAKES} == makes
    assert {layer.name.split(".")[-1] for layer in found if layer.role is Role.READS} == reads
    assert sorted(id(p) for layer in found for p in layer.slices) == sorted(map(id, plan[group].slices))


def test_inspect_lists_layers() -> None:
    code, out, _ = invoke("inspect", TOY, *SHAPE, "--layers")
    assert code == 0
    assert "  read by  conv2  weight [6, <8>, 3, 3]" in out


def test_names_cannot_leave_their_quotes() -> None:
    text = dot(hostile())
    assert 'label="\\"];\\n<script>&\\\\\\n8 a\\\\N"' in text
    assert all(line.endswith(("{", "}", ";")) for line in text.splitlines())


@needs_dot
def test_svg_has_a_shape_for_every_group_and_layer(tmp_path: Path) -> None:
    file = tmp_path / "plan.svg"
    code, _, err = invoke("inspect", TOY, *SHAPE, "--svg", str(file))
    assert code == 0, err
    titles = [each.text for each in ET.parse(file).iter("{http://www.w3.org/2000/svg}title")]
    assert {"g0", "g1", "g2", "layer conv1", "layer norm", "layer conv2", "layer linear"} <= set(titles)
    texts = [each.text for each in ET.fromstring(svg(hostile())).iter("{http://www.w3.org/2000/svg}text")]
    assert "<script>&\\" in texts
    assert "8 a\\N" in texts


def test_without_graphviz_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = invoke("inspect", TOY, *SHAPE, "--svg", str(tmp_path / "plan.svg"))
    assert code == 1
    assert "install graphviz" in err
    assert not list(tmp_path.iterdir())


def test_a_dot_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "dot"
    program.write_text("#!/bin/sh\necho no layout >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(EtpError, match="no layout"):
        svg(toy_plan())
