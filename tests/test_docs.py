"""README and docs: every snippet runs and prints what its page says, commands parse, and links lead somewhere."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import etp_graph
from benchmarks import __main__ as benchmarks
from etp_graph.cli import app
from etp_graph.collect import OBSERVED
from etp_graph.criteria._registry import _criteria
from etp_graph.forces import FORCES
from etp_graph.methods import METHODS
from etp_graph.schedules import SCHEDULES

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
MADE = ("coverage.md", "speed.md")  # by benchmarks, as everything in results/
IN_ORDER = ("serving.md",)  # tutorials whose commands run, too, between the snippets
HAND_WRITTEN = [page for page in PAGES if page.name not in MADE and page.parent.name != "results"]
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
PLACE = re.compile(r"(\.md:)\d+")  # where the code of a snippet stands, which every edit of a page changes
ERROR = re.compile(r"\d\.\de[-+]\d\d")  # a measured rounding error differs from machine to machine
NUMBERS = re.compile(r"[\d\s.,+-]+|\b[kMGe]\b")  # so do times, and what a training ends in


@dataclass(frozen=True)
class Fence:
    """A fenced block; ``follows``: nothing but blank lines between it and the block before."""

    language: str
    text: str
    line: int
    follows: bool


def fences(page: Path) -> list[Fence]:
    text, found, end = page.read_text(encoding="utf8"), [], 0
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Fence(match[1], match[2], line, bool(found) and not text[end : match.start()].strip()))
        end = match.end()
    return found


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf8"))


def same(text: str) -> list[str]:
    """Lines without measured errors, numbers of lines of a page and trailing spaces."""
    text = PLACE.sub(r"\1#", ERROR.sub("#", text.strip("\n")))
    return [line.rstrip() for line in text.splitlines()]


def commands(page: Path) -> list[list[str]]:
    """Every command line in a console block or between backticks, as words."""
    lines = [line for f in fences(page) if f.language in ("console", "bash") for line in f.text.splitlines()]
    lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    lines += re.findall(r"`((?:etp-graph|python -m) [^`\n]*)`", prose(page))
    parts = [part for line in lines for part in line.split("&&")]
    return [shlex.split(part, comments=True) for part in parts]


def ids(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).with_suffix("").as_posix() for page in pages]


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=ids(HAND_WRITTEN))
def test_snippets_run_and_print_what_the_page_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:  # what a page registers is for that page
        for registry in (FORCES, SCHEDULES, METHODS, OBSERVED, _criteria):
            stack.enter_context(registry.temporary())
        run_snippets(page)


def run_snippets(page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}  # a module that exists: dataclasses look theirs up
    printed: str | None = None
    for fence in fences(page):
        if fence.language == "python":
            stdout = io.StringIO()
            source = "\n" * fence.line + fence.text  # so that a traceback names the line of the page
            with contextlib.redirect_stdout(stdout):
                code = compile(source, str(page), "exec", dont_inherit=True)  # without the __future__ of this file
                exec(code, namespace)
            printed = stdout.getvalue()
        elif fence.language == "text" and fence.follows and printed is not None:
            assert same(fence.text) == same(printed), f"{page.name}, line {fence.line}: the output is\n{printed}"
            printed = None
        elif fence.language == "console" and page.name in IN_ORDER and page.parent.name == "tutorials":
            run_commands(page, fence)


def run_commands(page: Path, fence: Fence) -> None:
    """Run the command of a block, and compare the words that it prints with those below it, if there are any."""
    first, *shown = fence.text.splitlines()
    result = CliRunner().invoke(app, shlex.split(first.removeprefix("$ "))[1:])
    assert result.exit_code == 0, result.output
    text, printed = (NUMBERS.sub(" ", part).split() for part in ("\n".join(shown), result.stdout))
    assert not shown or text == printed, f"{page.name}, line {fence.line}: the output is\n{result.stdout}"


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=ids(HAND_WRITTEN))
def test_console_blocks_show_the_actual_output(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for fence in fences(page):
        first, *shown = fence.text.splitlines()
        if fence.language != "console" or not shown or shown[0].startswith("$ ") or page.name in IN_ORDER:
            continue
        words = shlex.split(first.removeprefix("$ "))
        if words[:2] not in (["etp-graph", "inspect"], ["etp-graph", "verify"]):
            continue  # what trains takes minutes
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, result.output
        assert same("\n".join(shown)) == same(result.stdout), f"{page.name}, line {fence.line}: {result.stdout}"


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_command_lines_parse(page: Path) -> None:
    root = typer.main.get_command(app)
    for words in commands(page):
        if words[0] == "etp-graph":
            with root.make_context("etp-graph", words[1:2]) as context:
                name, sub, _ = root.resolve_command(context, words[1:2])  # type: ignore[attr-defined]
                if "--help" not in words and (words[2:] or name == "demo"):  # a command may be named without arguments
                    sub.make_context(name, words[2:], parent=context).close()
        elif words[:3] == ["python", "-m", "benchmarks"]:
            assert_benchmark_parses(words[3:], page.name)
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), f"{page.name}: no module {words[2]}"


def assert_benchmark_parses(words: list[str], page: str) -> None:
    """Parse the options of a benchmark without running it; in a pattern such as ``study TASK`` only the command."""

    class Parsed(Exception):
        pass

    def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
        _, unknown = parser.parse_known_args(arguments)
        assert not unknown, f"{page}: {words[0]} knows no {unknown}"
        raise Parsed

    assert not words or words[0] in benchmarks.COMMANDS, f"{page}: no benchmark {words[0]}"
    if len(words) > 1 and not any(word.isupper() for word in words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse)
            with pytest.raises(Parsed):
                benchmarks.main(words)


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_and_images_exist(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert file.is_relative_to(ROOT) or file.resolve().is_relative_to(ROOT)
        assert not anchor or anchor in headings(file), f"{page.name} links to {target}"


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_reachable_from_the_readme() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop().resolve()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            targets = (target.partition("#")[0] for target in LINK.findall(prose(page)))
            linked = [page.parent / target for target in targets if target and "://" not in target]
            todo += [file for file in linked if file.exists()]
    assert {page.resolve() for page in PAGES} <= seen


@pytest.mark.parametrize("name", etp_graph.__all__)
def test_every_public_name_is_mentioned(name: str) -> None:
    text = "\n".join(page.read_text(encoding="utf8") for page in HAND_WRITTEN)
    assert re.search(rf"(?<![\w]){name}(?![\w])", text)


@pytest.mark.parametrize("name", etp_graph.__all__)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    pages = (ROOT / "docs" / "reference").glob("*.rst")
    entry = rf"^\.\. auto\w+:: (?:etp_graph\.)?{name}(?:\(\))?$"
    assert any(re.search(entry, page.read_text(encoding="utf8"), re.MULTILINE) for page in pages)


@pytest.mark.parametrize("kind", ["forces.FORCES", "schedules.SCHEDULES", "criteria.CRITERIA"])
def test_every_technique_is_mentioned(kind: str) -> None:
    module, table = kind.split(".")
    text = "\n".join(page.read_text(encoding="utf8") for page in HAND_WRITTEN)
    for name in getattr(getattr(etp_graph, module), table):
        assert f"`{module}.{name}" in text, f"{name} is in no table"


@pytest.mark.parametrize("name", etp_graph.methods.METHODS)
def test_every_method_is_mentioned(name: str) -> None:
    assert f'| `"{name}"` |' in (ROOT / "docs" / "compress.md").read_text(encoding="utf8")
