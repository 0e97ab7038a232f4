"""Arguments and options that the commands of ``etp-graph`` share; the names in them come from the registries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer

from etp_graph import budget
from etp_graph._config import require
from etp_graph.criteria import COLLECTED, CRITERIA
from etp_graph.errors import BudgetError
from etp_graph.plan import KINDS, Target, known_targets

F = TypeVar("F", bound=Callable[..., None])

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:resnet50, timm:NAME, hf:DIR (a folder of transformers), or package.module:callable.",
        show_default=False,
    ),
]

Shapes = Annotated[
    list[str] | None,
    typer.Option("--input-shape", help="Like 1,3,224,224 (integers: 1,128:long); one per input.", metavar="SHAPE"),
]

Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", help="Name or pattern of modules whose units all stay; may be repeated.", metavar="NAME"),
]

Kinds = Annotated[
    list[str] | None,
    typer.Option("--kind", help=f"Units to prune, or all; may be repeated: {', '.join(KINDS)}.", metavar="KIND"),
]

Data = Annotated[
    Path | None,
    typer.Option("--data", help="Text file that scores the units of a language model and measures its perplexity."),
]

Uniform = Annotated[
    bool,
    typer.Option(
        "--uniform",
        help="Keep layers equally wide, so that one configuration describes them; hf: writes a plain folder.",
    ),
]

RemoveBlocks = Annotated[
    int,
    typer.Option(
        "--remove-blocks",
        min=0,
        help="First remove this many residual blocks (layers), those with the least influence on --data.",
    ),
]

Compensate = Annotated[
    bool,
    typer.Option(
        "--compensate/--no-compensate",
        help="With --data: change the weights that read removed units, by least squares on the texts.",
    ),
]

RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Prune the random weights that a model is built with.")
]

Outputs = Annotated[
    list[str] | None,
    typer.Option(
        "--outputs",
        help="Name or pattern of an output that has to stay as it is, like logits, 0 or '*'; may be repeated. Default: "
        "all but caches and by-products.",
        metavar="NAME",
    ),
]

Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        help="Module or .py file to import first, so that what it registers is known; may be repeated.",
        metavar="MODULE",
    ),
]

Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads that PyTorch uses.")]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def criterion_names(*, data: bool = False) -> list[str]:
    """Return the names of the criteria that need only the weights; ``l1`` and ``l2`` are magnitudes.

    With ``data`` return also those that need texts.
    """
    texts = TEXT_CRITERIA if data else ()
    return ["l1", "l2", *texts, *(name for name in CRITERIA if name not in COLLECTED and name != "magnitude")]


TEXT_CRITERIA = ("fisher", "taylor", "activation")
"""Criteria that score units while a model reads texts."""

# --help shows the built-in names. Values are checked by the command, because --import may register more.
Criterion = Annotated[
    str | None,
    typer.Option(
        help=f"Criterion that ranks the units: {', '.join(criterion_names())} (default: l2); with --data also "
        f"{', '.join(TEXT_CRITERIA)} (then the default: fisher).",
        metavar="NAME",
    ),
]

Scope = Annotated[
    str, typer.Option(help=f"Across what scores are compared: {', '.join(get_args(budget.Scope))}.", metavar="NAME")
]

RoundTo = Annotated[
    list[str] | None,
    typer.Option(
        "--round-to", help="Kept widths are multiples of this; KIND=NUMBER for one kind of units.", metavar="NUMBER"
    ),
]

MinUnits = Annotated[
    list[str] | None,
    typer.Option(
        "--min-units", help="Every group keeps this many units; KIND=NUMBER for one kind of units.", metavar="NUMBER"
    ),
]

KvTokens = Annotated[
    int | None,
    typer.Option("--kv-tokens", help="With --memory-mb: tokens whose keys and values the cache holds."),
]

TargetValues = Annotated[
    list[str] | None,
    typer.Option("--target", help="Target of a quantity that --import registers.", metavar="NAME=VALUE"),
]


def with_targets(command: F) -> F:
    """Give a command with ``**targets`` one option for each registered target, after ``out``."""
    found = signature(command, eval_str=True)
    own = [p for p in found.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    place = [p.name for p in own].index("out") + 1
    options = [_option(target) for _, target in known_targets().values()]
    command.__signature__ = found.replace(parameters=[*own[:place], *options, *own[place:]])  # type: ignore[attr-defined]
    return command


def _option(target: Target) -> Parameter:
    how: Any = {"metavar": "NUMBER", "parser": _parse_number} if target.whole else {}
    option = typer.Option("--" + target.keyword.replace("_", "-"), help=target.help, **how)
    annotation: Any = Annotated[float | None, option]
    return Parameter(target.keyword, Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)


def _parse_number(text: str) -> float:
    """Return an integer as an int, which is an amount, and any other number as a float, which may be a share."""
    return int(text) if text.lstrip("-").isdecimal() else float(text)


def parse_by_kind(name: str, texts: Sequence[str]) -> int | dict[str, int] | None:
    """Return the value of an option that is one number or ``KIND=NUMBER`` several times; ``None`` if it is not given.

    Raises:
        BudgetError: a text has another form, or one number stands beside others.
    """
    wrong = f"{name} {' '.join(texts)}: give one number, or KIND=NUMBER for each kind, like neurons=64."
    found: dict[str, int] = {}
    for text in texts:
        kind, given, number = text.rpartition("=")
        require(number.isdecimal() and kind not in found and (bool(given) or len(texts) == 1), wrong, BudgetError)
        found[kind] = int(number)
    return found.get("", found) if found else None


def parse_targets(texts: Sequence[str]) -> dict[str, float]:
    """Return the targets of ``NAME=VALUE`` options, by keyword.

    Raises:
        BudgetError: a text has another form, or there are two for one keyword.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        require(name not in found, f"--target {text}: {name} has a value already.", BudgetError)
        try:
            found[name] = _parse_number(value)
        except ValueError as error:
            raise BudgetError(f"--target {text}: write NAME=VALUE with a number, like params=1000000.") from error
    return found


class DemoData(StrEnum):
    """Data sets of the demo."""

    DIGITS = "digits"
    CIFAR10 = "cifar10"
