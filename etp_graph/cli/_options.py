"""Arguments and options that the commands of ``etp-graph`` share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from etp_graph.plan import KINDS

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:resnet50, timm:NAME, hf:PATH (a config.json or its folder), or package.module:callable.",
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

Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads that PyTorch uses.")]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Criterion(StrEnum):
    """Criteria that need only the weights."""

    L1 = "l1"
    L2 = "l2"
    ETP = "etp"
    TORQUE = "torque"
    BN_SCALE = "bn_scale"
    FPGM = "fpgm"
    WHC = "whc"
    LAMP = "lamp"
    RANDOM = "random"


class Scope(StrEnum):
    """Ways to compare scores of different groups, see :class:`etp_graph.Budget`."""

    GLOBAL = "global"
    LOCAL = "local"
    ISOMORPHIC = "isomorphic"


class DemoData(StrEnum):
    """Data sets of the demo."""

    DIGITS = "digits"
    CIFAR10 = "cifar10"
