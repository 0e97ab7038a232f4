"""Reasons of locks name the line of the model's code."""

from __future__ import annotations

import inspect
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from tests.support.models.constructs import CASES, OUTPUT, Net, image

Operation = Callable[[Any, Tensor], Tensor]


def net(operation: Operation, **parts: nn.Module | nn.Parameter) -> Net:
    """A layer whose units an operation meets, and a block of two layers beside it that can be pruned."""

    def run(n: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        met = operation(n, n.a(x))
        return n.b(met), n.d(n.c(x).relu())

    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 3), "c": nn.Linear(6, 7), "d": nn.Linear(7, 3)}
    return Net(run, **layers | parts)


def reason(model: nn.Module, x: Any = None, group: str = "a") -> str:
    """The reason of one locked group."""
    plan = etp.trace(model, torch.randn(2, 6) if x is None else x, check=False)
    return str(plan[group].locked)


def line_of(function: Callable[..., Any], text: str = "") -> str:
    """The first line of a function's source that has the text, as reasons name it."""
    lines, first = inspect.getsourcelines(function)
    at = next(number for number, line in enumerate(lines) if text in line)
    return f"({Path(inspect.getsourcefile(function) or '').name}:{first + at})"


def mixed(n: Any, y: Tensor) -> Tensor:
    y = y + 1
    return y.cumsum(-1)


def used_later(n: Any, y: Tensor) -> Tensor:
    first = y[:, 0]
    y = y.relu()
    return y + first[:, None]


def scaled(n: Any, y: Tensor) -> Tensor:
    width = y.shape[-1]
    rows = int(width * 0.5)  # becomes a size again
    scale = width**-0.5
    return y * scale + rows * 0


def outside(n: Any, y: Tensor) -> Tensor:
    total = n.a.weight.cumsum(0).sum()
    return y + total


def several_axes(n: Any, y: Tensor) -> Tensor:
    row = n.wide[0, :8]
    return y + row


def fixed_positions(n: Any, y: Tensor) -> Tensor:
    taken = n.vector[:8]
    return y + taken


def compared(n: Any, y: Tensor) -> Tensor:
    assert y.shape[-1] == 8
    return y


@pytest.mark.parametrize(
    ("operation", "words", "text"),
    [
        (mixed, "is mixed by aten.cumsum", "cumsum"),
        (used_later, "is taken by fixed positions (select)", "first = "),
        (scaled, "is used as a value", "scale = "),
        (outside, "is also used outside its layer", "total = "),
        (several_axes, "meets several axes", "return"),
        (fixed_positions, "is taken by fixed positions", "taken = "),
        (compared, "is compared with a fixed one", "assert"),
    ],
)
def test_the_line_is_the_one_that_locks(operation: Operation, words: str, text: str) -> None:
    tables = {"table": nn.Parameter(torch.randn(8, 8)), "vector": nn.Parameter(torch.randn(12))}
    tables["wide"] = nn.Parameter(torch.randn(3, 12))
    found = reason(net(operation, **tables))
    assert words in found
    assert found.endswith(line_of(operation, text))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.units])
def test_every_reason_that_an_operator_gives_has_a_line(name: str) -> None:
    case = CASES[name]
    for group in etp.trace(case.net(), case.inputs or (image(),), check=False).groups:
        if group.locked not in (None, OUTPUT) and not str(group.locked).startswith("kind "):
            assert "(constructs.py:" in str(group.locked)


class Uneven(nn.Module):
    """A group norm over two layers that do not fill its groups, and an LSTM whose state is wider than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 11, 1), nn.GroupNorm(4, 16)
        self.c, self.last = nn.Conv2d(16, 5, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.a(x), self.b(x)], 1)
        both = self.norm(both)
        return self.last(self.c(both))


def test_a_norm_over_a_concatenation_names_the_line_that_calls_it() -> None:
    assert reason(Uneven(), image()).endswith(line_of(Uneven.forward, "self.norm"))


class Started(nn.Module):
    """An LSTM with an initial state of fixed size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn, self.b = nn.Linear(6, 8), nn.LSTM(8, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.ones(1, len(x), 5), torch.ones(1, len(x), 5)
        out, _ = self.rnn(self.a(x), state)
        return self.b(out)


def test_a_recurrent_layer_names_the_line_that_calls_it() -> None:
    assert reason(Started(), torch.randn(2, 4, 6), "rnn").endswith(line_of(Started.forward, "self.rnn("))


def test_layers_of_pytorch_alone_have_no_line() -> None:
    inner = nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
    assert reason(inner, group="0") == "is mixed by aten._softmax.default in '1'"
    outer = net(lambda n, y: n.inner(y), inner=nn.Sequential(nn.ReLU(), nn.Softmax(-1)))
    assert "is mixed by aten._softmax.default in 'inner.1' (test_running_lines.py:" in reason(outer)


SOURCE = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(6, 7), nn.Linear(7, 3)
    def forward(self, x):
        y = self.a(x).cumsum(-1)
        return self.b(y), self.d(self.c(x).relu())
"""


def test_code_of_scripts_packages_and_texts(tmp_path: Path) -> None:
    script, package = tmp_path / "train it.py", tmp_path / "nets" / "__init__.py"
    package.parent.mkdir()
    for file in (script, package):
        file.write_text(SOURCE)
    made: dict[str, Any] = {"__name__": "text"}
    exec(SOURCE, made)  # as notebooks make models
    assert reason(made["Net"]()).endswith("(<string>:9)")
    assert reason(runpy.run_path(str(script), run_name="__main__")["Net"]()).endswith("(train it.py:9)")
    assert reason(runpy.run_path(str(package))["Net"]()).endswith("(nets/__init__.py:9)")


@torch.jit.script
def scripted(y: Tensor) -> Tensor:
    return y.cumsum(-1)


def calls_scripted(n: Any, y: Tensor) -> Tensor:
    return scripted(y)


def test_a_scripted_function_is_named_by_the_line_that_calls_it() -> None:
    assert reason(net(calls_scripted)).endswith(line_of(calls_scripted, "scripted(y)"))


def test_a_symbolically_traced_module_is_named_by_a_line_of_its_code() -> None:
    parts = nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)
    model = torch.fx.symbolic_trace(nn.Sequential(*parts))
    assert "(GraphModule.code:" in reason(model, group="0")


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_models_of_libraries(library: str) -> None:
    pytest.importorskip(library)
    if library == "timm":
        import timm

        model = timm.models.mlp_mixer.MlpMixer(img_size=32, patch_size=8, embed_dim=16, num_blocks=1)
        plan, words = etp.trace(model, torch.randn(1, 3, 32, 32), check=False), r"lies across .* \(mlp.py:\d+\)"
    else:
        from transformers import FNetConfig, FNetModel

        config = FNetConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, intermediate_size=12)
        plan = etp.trace(FNetModel(config), torch.randint(0, 9, (1, 5)), check=False)
        words = r"is mixed by aten._fft\S+ .*\(modeling_fnet.py:\d+\)"
    assert any(re.search(words, group.locked or "") for group in plan.groups)


def moved(above: str) -> nn.Module:
    made: dict[str, Any] = {"__name__": "text"}
    exec(above + SOURCE, made)  # the same code, further down in its file
    model: nn.Module = made["Net"]()
    return model


def test_lines_do_not_count_in_plans() -> None:
    before, after = (etp.trace(moved(above), torch.randn(2, 6), check=False) for above in ("", "\n\n"))
    assert before["a"].locked != after["a"].locked
    assert before == after
    read = etp.Plan.from_json(before.to_json())
    assert read == before
    assert read["a"].locked == before["a"].locked


def test_units_that_are_locked_on_several_lines_form_one_group() -> None:
    def run(n: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = n.a(x)
        left = y[:, :4].sort(-1).values
        right = y[:, 4:].sort(-1).values
        return n.b(torch.cat([left, right], -1)), n.d(n.c(x).relu())

    model = net(mixed)
    model.run = run
    plan = etp.trace(model, torch.randn(2, 6), check=False)
    assert plan["a"].n_units == 8


def asserts(n: Any, y: Tensor) -> Tensor:
    if y.shape[1:].numel() < 8:
        raise ValueError("too narrow")
    return y


def test_a_check_that_fails_names_the_line_that_fails() -> None:
    plan = etp.trace(net(asserts), torch.randn(2, 6), check=True)
    text = repr('raise ValueError("too narrow")')
    assert str(plan["a"].locked).endswith(f"ValueError: too narrow at {text} {line_of(asserts, 'raise')}")
