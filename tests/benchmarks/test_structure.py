"""The benchmarks have one command, no circles, and import public modules of the library alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from tests.support.import_graph import imports, modules

ROOT = Path(command.__file__).parent
KNOWN = modules(ROOT)
ARROWS = {name: imports(name, file, KNOWN) for name, file in KNOWN.items()}


def folder_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {a: {b for b in to if not a.startswith(f"{b}.")} for a, to in ARROWS.items()}
    assert sum(map(len, graph.values())) > 100
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_folders_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for a, to in ARROWS.items():
        graph.setdefault(folder_of(a), set()).update(folder_of(b) for b in to)
    TopologicalSorter({a: to - {a, "benchmarks"} for a, to in graph.items()}).prepare()


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_no_private_name_of_the_library_is_imported(name: str) -> None:
    nodes = list(ast.walk(ast.parse(KNOWN[name].read_text(encoding="utf8"))))
    found = [f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) and n.module for a in n.names]
    found += [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    own = [path for path in found if path.split(".")[0] == "etp_graph"]
    assert not [path for path in own if any(part.startswith("_") for part in path.split("."))]


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_describes_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, sentence = command.COMMANDS[name]
    assert sentence.endswith(".")
    assert callable(import_module(f"benchmarks.{module}").main)
    with pytest.raises(SystemExit) as stopped:
        command.main([name, "--help"])
    assert not stopped.value.code
    assert capsys.readouterr().out.startswith(f"usage: python -m benchmarks {name} ")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_without_a_command_all_are_listed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command.main(words)
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and sentence in text for name, (_, sentence) in command.COMMANDS.items())


def test_an_unknown_command_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["contests"])
    assert "no command 'contests'; choose from contest, " in capsys.readouterr().err


def test_the_package_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks"], check=True, capture_output=True, text=True, cwd=ROOT.parent
    )
    assert done.stdout == command.describe_commands()
