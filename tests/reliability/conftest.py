"""Print what the tests of reliability counted at the end of a run, for the page of guarantees."""

from __future__ import annotations

from collections.abc import Callable

import pytest

_COUNTED = pytest.StashKey[list[str]]()


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that adds a line to the end of the run."""

    def add(text: str) -> None:
        request.config.stash.setdefault(_COUNTED, []).append(f"{request.node.name}: {text}")

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the lines."""
    counted = config.stash.get(_COUNTED, [])
    if counted:
        terminalreporter.section("counted")
        for line in counted:
            terminalreporter.line(line)
