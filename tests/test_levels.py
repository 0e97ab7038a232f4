"""The house has levels: a package imports only packages on lower levels, and no files import each other in a circle."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.support.import_graph import imports, modules

PACKAGE = "etp_graph"
LEVELS = (
    "errors _text _json", "_config model", "forces schedules standins plan", "units surgery latency",
    "collect budget verification distributed checkpoint", "criteria regularizer graph export recovery depth",
    "methods fsdp", "compression", "integrations report __init__ record depgraph adapters", "demo", "cli", "__main__",
)  # fmt: skip
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names.split()}


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def violations(root: Path) -> list[str]:
    known = modules(root)
    arrows = {name: imports(name, file, known) for name, file in known.items()}
    bad = [
        f"{a} -> {b}" for a, to in arrows.items() for b in to
        if package_of(a) != package_of(b) and LEVEL[package_of(b)] >= LEVEL[package_of(a)]
    ]  # fmt: skip
    try:
        TopologicalSorter({a: {b for b in to if not a.startswith(f"{b}.")} for a, to in arrows.items()}).prepare()
    except CycleError as error:
        bad.append("circle: " + " -> ".join(error.args[1]))
    return bad


def test_every_import_goes_down() -> None:
    assert not violations(Path(__file__).parents[1] / PACKAGE)


def test_the_root_shows_the_packages() -> None:
    assert len(list((Path(__file__).parents[1] / PACKAGE).glob("*.py"))) <= 10
