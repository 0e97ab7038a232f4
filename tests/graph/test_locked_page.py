"""The page on locks explains every reason that the code gives."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import etp_graph
from etp_graph.errors import PlanError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "locked.md"
PACKAGE = Path(etp_graph.__file__).parent
FILES = [
    *sorted((PACKAGE / "graph").rglob("*.py")),
    PACKAGE / "plan" / "_kinds.py",
    PACKAGE / "verification/_verify.py",
]
GIVES = {"lock", "lock_all", "unite", "pin_axes", "fold_axis", "add"}
"""Functions whose last text is the reason of a lock."""
HOLDS = {"reason", "why", "full", "FEEDS_OUTPUT"}
"""Names that hold one."""


def literal(node: ast.expr | None) -> str | None:
    """The longest piece of a text that is written in the code."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.IfExp):
        return literal(node.body) or literal(node.orelse)
    if isinstance(node, ast.BoolOp):
        return literal(node.values[-1])
    if isinstance(node, ast.JoinedStr):
        pieces = [str(p.value) for p in node.values if isinstance(p, ast.Constant)]
        return max(pieces, key=len, default=None)
    return None


def texts(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in GIVES:
            yield from node.args[-1:]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {t.id for t in targets if isinstance(t, ast.Name)}
            held = [t for t in targets if isinstance(t, ast.Subscript) and getattr(t.value, "attr", None) == "pinned"]
            if names & HOLDS or held:
                yield node.value


def reasons() -> list[str]:
    """Pieces of the reasons in the code, without spaces at their ends."""
    found = {
        piece.strip(" ('")
        for file in FILES
        for each in texts(ast.parse(file.read_text(encoding="utf8")))
        if (piece := literal(each)) is not None and len(piece.strip()) >= 6
    }
    return sorted(found)


def test_the_code_has_reasons() -> None:
    assert "feeds the model's output" in reasons()
    assert any(reason.startswith("is split into pieces") for reason in reasons())
    assert len(reasons()) > 30


@pytest.mark.parametrize("reason", reasons())
def test_every_reason_stands_on_the_page(reason: str) -> None:
    assert " ".join(reason.split()) in " ".join(PAGE.read_text(encoding="utf8").split())


class Between(nn.Module):
    """Two linear layers, and an operator between them."""

    stored: Tensor

    def __init__(self, operator: Callable[[Between, Tensor], Tensor], out: int) -> None:
        super().__init__()
        self.first, self.last, self.operator = nn.Linear(5, 32), nn.Linear(out, 3), operator
        self.width, self.parts, self.scale, self.plain = 16, 2, 0.25, torch.ones(32)
        self.register_buffer("stored", torch.randn(32, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.operator(self, self.first(x)))
        return out


Case = tuple[str, int, Callable[[Between, Tensor], Tensor], Callable[[Between, Tensor], Tensor]]
OPENED: list[Case] = [
    ("is split into pieces of fixed widths", 16, lambda m, h: torch.mul(*h.split([16, 16], -1)),
     lambda m, h: torch.mul(*h.split([m.width, m.width], -1))),
    ("is split into pieces of fixed widths", 16, lambda m, h: torch.mul(*h.split([16, 16], -1)),
     lambda m, h: torch.mul(*h.chunk(2, -1))),
    ("is taken by fixed positions (slice)", 16, lambda m, h: h[..., :16].relu(), lambda m, h: h[..., : m.width].relu()),
    ("is taken from the end", 16, lambda m, h: h[..., -16:].relu(), lambda m, h: h[..., : m.width].relu()),
    ("their number is used as a value", 32, lambda m, h: h / h.shape[-1] ** 0.5, lambda m, h: h * m.scale),
    ("is combined with a tensor of fixed width", 32, lambda m, h: h * m.plain, lambda m, h: h * m.stored),
    ("writes their number (16)", 32, lambda m, h: h.view(2, 7, 2, 16).transpose(2, 3).flatten(2),
     lambda m, h: h.view(2, 7, m.parts, -1).transpose(2, 3).flatten(2)),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "out", "closed", "opened"), OPENED)
def test_what_the_page_advises_opens_the_units(
    reason: str, out: int, closed: Callable[..., Tensor], opened: Callable[..., Tensor]
) -> None:
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    assert reason in " ".join(PAGE.read_text(encoding="utf8").split()).replace("(64)", "(16)")
    try:
        locked = [group.locked or "" for group in etp_graph.trace(Between(closed, out).eval(), x).groups]
    except PlanError as error:
        locked = [str(error)]
    assert any(reason in each for each in locked)
    model = Between(opened, out).eval()
    plan = etp_graph.trace(model, x)
    assert any(group.name.startswith("first") for group in plan.prunable)
    assert etp_graph.verify(model, plan, x).error < 1e-9
