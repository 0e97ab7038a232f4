"""Settings of all tests: one thread, so that small tensors do not wait for others, and a seed for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.support.registries import temporary_entries

# Tests run in several processes at once (`pytest -n`); on CPU more threads than cores only slow all of them down.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test begins with the same random state and leaves the outer one as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """No test sees what another one registered, such as the example pages of the docs."""
    with temporary_entries():
        yield


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
