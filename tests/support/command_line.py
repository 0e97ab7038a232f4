"""Run ``etp-graph`` in this process, on the toy model."""

from __future__ import annotations

from typer.testing import CliRunner

from etp_graph.cli import app

SHAPE = ["--input-shape", "1,3,8,8"]

TOY = "tests.support.models.toy:Toy"


def invoke(*args: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of a command; raise what it does not catch."""
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr
