"""The page on locks explains every reason that the code gives."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import etp_graph
from etp_graph.errors import PlanError
from tests.support.models.remedies import REMEDIES

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


def rows() -> dict[str, str]:
    """Reason -> remedy, of every row of the page."""
    lines = [line for line in PAGE.read_text(encoding="utf8").splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {first: last for first, _, last in cells}


def test_the_page_is_sorted_by_reason() -> None:
    found = [reason.strip("`").lower() for reason in rows()]
    assert found == sorted(found)


def quoted(reason: str) -> str:
    """A reason of the page without marks and figures, as the remedies name it."""
    return re.sub(r" \(64\)$", "", reason.strip("`"))


def test_every_remedy_is_tried() -> None:
    stay = {reason for reason, remedy in rows().items() if remedy.startswith(("They stay", "Report it"))}
    assert {quoted(reason) for reason in rows().keys() - stay} == REMEDIES.keys()


@pytest.mark.parametrize("reason", REMEDIES)
@pytest.mark.filterwarnings("ignore")
def test_what_the_page_advises_opens_the_units(reason: str) -> None:
    remedy = REMEDIES[reason]
    pieces = [each.strip(" ()'") for each in re.split(r"NAME|MODULE|OPERATOR|CLASS|PATTERN|\.\.\.|\b\d+\b", reason)]
    try:
        plan = etp_graph.trace(remedy.closed().eval(), remedy.x, check=False, **remedy.before)
        locked = [group.locked or "" for group in plan.groups]
    except PlanError as error:
        locked = [str(error)]
    assert any(all(piece in each for piece in pieces) for each in locked)
    model = remedy.opened().eval()
    plan = etp_graph.trace(model, remedy.x, check=False, **remedy.options)
    assert remedy.group in [group.name for group in plan.prunable]
    assert etp_graph.verify(model, plan, remedy.x).error < 1e-9
