"""Rows of the papers' tables, as printed, and what stands for each here.

``published_rows.jsonl`` holds one line for each row of tables 1 to 5, figure 4 and the text on it of the paper on ETP
(Modi et al. 2025, arXiv 2506.22015), of its figures 1 and 3, and of table 1 of the paper on Torque (Gupta et al. 2024).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.common.contestant_names import FRESH, UNPRUNED

ROWS = Path(__file__).with_name("published_rows.jsonl")

SOURCES = {
    "ETP": "Modi et al. 2025, Exponential Torque Pruning, arXiv 2506.22015",
    "Torque": "Gupta et al. 2024, Torque-based structured pruning",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A network and its data in a paper.

    Attributes:
        task: the task of this benchmark that stands for it; ``None``: there is none.
        why: why there is none, or what the task's largest scale lacks of the paper's size.
        full_scales: scales at which the task has the network and the data of the paper; the first is run on a CPU.
        speed_up: where the paper names none, the one that stands for it.
    """

    task: str | None
    why: str = ""
    full_scales: tuple[str, ...] = ()
    speed_up: float = 1.0


SETTINGS: Mapping[tuple[str, str], Setting] = {
    ("CIFAR-10", "ResNet-56"): Setting(task="cifar10-resnet56", full_scales=("full", "paper")),
    ("CIFAR-100", "VGG-19"): Setting(task="cifar100", full_scales=("paper",)),
    ("ImageNet", "ResNet-50"): Setting(task=None, why="ImageNet is not at hand"),
    ("ETTh1 96->48, univariate", "Informer"): Setting(task="ett", full_scales=("full", "paper")),
    ("ETTh1 96->48", "Informer"): Setting(task="ett", full_scales=("full", "paper")),
    ("SST-2", "BERT"): Setting(task="sst2", why="the BERT at hand has 6 layers of 384, the paper's 12 of 768"),
    ("MRPC", "BERT"): Setting(task="mrpc", why="the BERT at hand has 6 layers of 384, the paper's 12 of 768"),
    ("SST-2", "RoBERTa"): Setting(task=None, why="no weights of RoBERTa are at hand"),
    ("MRPC", "RoBERTa"): Setting(task=None, why="no weights of RoBERTa are at hand"),
    ("PPI", "GAT"): Setting(
        task="ppi", full_scales=("full", "paper"),
        why="the graphs of PPI are not at hand; the tasks tolokers and cora run the same network",
    ),
    ("Flickr8k captions, -20 % of the decoder's parameters", "BLIP"): Setting(
        task="flickr8k", why="a BLIP of 2 layers is trained on 250 photos; no weights of BLIP are at hand",
        speed_up=1.25,
    ),
}  # fmt: skip
"""(task, model) of a row -> what stands for it."""

METHODS: Mapping[str, tuple[str, ...]] = {
    "ETP": ("etp", "etp-global"), "DepGraph": ("tp-groupnorm", "depgraph"),
    "Torque": ("torque-published", "torque"), "Torque (p)": ("torque-published", "torque"),
    "Torque (r)": ("torque-published" + FRESH,),
    "GReg-1": ("greg1-published", "greg1"), "GReg-2": ("greg2-published", "greg2"),
    "GReg": ("greg2-published", "greg1-published"), "HRank": ("hrank",), "SFP": ("sfp",),
    "FPGM": ("fpgm",), "WHC": ("whc",), "L1": ("l1", "l1-uniform"), "TaylorFO": ("taylor",), "Base": (UNPRUNED,),
}  # fmt: skip
"""Method of a row -> contestants that stand for it, the best match first."""

_SEARCHES = "a search for the widths; one by optuna runs without training only (results/oneshot.md)"
_KRONECKER = "second-order, with Kronecker factors; here it runs without training only (results/oneshot.md)"
_OTHERS = {
    "AMC": _SEARCHES, "ABCPruner": _SEARCHES, "RL-MCTS": _SEARCHES,
    "LFPC": "learns a criterion for each layer, which this library does not do",
    "CP": "chooses channels by lasso regression on feature maps; only its reconstruction is here (`compensate_`)",
    "ThiNet": "chooses channels by their share of the next layer's output; only its reconstruction is here "
    "(`compensate_`)",
    "CNN-FCF": "learns factors of filters under constraints, which this library does not do",
    "Kron-OBD": _KRONECKER, "Kron-OBS": _KRONECKER, "EigenDamage": _KRONECKER,
    "best other": "the paper does not say which method",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRow:
    """One row of a paper, as printed.

    Attributes:
        number: its line in the file, from 1.
        paper, table: where it stands.
        data, model, method: what was pruned, and how.
        metric: name of the metric; ``None`` where the paper gives a change only.
        base, pruned: the metric before and after; ``None``: not printed.
        drop: the change as printed: ETP writes pruned - base, Torque base - pruned.
        speed_up: dense over pruned multiply-adds; ``None``: not printed.
        others: further columns.
    """

    number: int
    paper: str
    table: str
    data: str
    model: str
    method: str
    metric: str | None
    base: float | None
    pruned: float | tuple[float, ...] | None
    drop: float | None
    speed_up: float | None
    others: Mapping[str, Any]

    @property
    def setting(self) -> Setting:
        """What stands for its network and data here."""
        return SETTINGS[self.data, self.model]

    @property
    def contestants(self) -> tuple[str, ...]:
        """The contestants that stand for its method, the best match first; empty if there is none.

        At 1x nothing is cut, so all methods are the unpruned network there.
        """
        return (UNPRUNED,) if self.speed_up == 1 else METHODS.get(self.method, ())

    @property
    def obstacle(self) -> str:
        """Why it cannot be run here; empty if it can."""
        if self.setting.task is None:
            return self.setting.why
        return "" if self.contestants else f"{self.method}: {_OTHERS[self.method]}"

    @property
    def printed(self) -> str:
        """Base, pruned and change, as text."""
        if isinstance(self.pruned, tuple):
            return " / ".join(f"{value:.2f}" for value in self.pruned)
        values = [f"{value:g}" for value in (self.base, self.pruned) if value is not None]
        change = "" if self.drop is None else f" ({self.drop:+g})"
        mae = f"; MAE {self.others['mae_base']:g} to {self.others['mae']:g}" if "mae" in self.others else ""
        return (" to ".join(values) + change + mae).strip() or "not printed"


_NAMED = ("paper", "table", "task", "model", "metric", "method", "base", "pruned", "drop", "speed_up")


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """Every row of the papers, in the order of the file."""
    lines = [json.loads(line) for line in ROWS.read_text(encoding="utf8").splitlines()]
    return tuple(_read(number, line) for number, line in enumerate(lines, start=1))


def _read(number: int, line: Mapping[str, Any]) -> PublishedRow:
    pruned = line.get("pruned")
    return PublishedRow(
        number=number, paper=line["paper"], table=str(line["table"]), data=line["task"], model=line["model"],
        method=line["method"], metric=line.get("metric"), base=line.get("base"),
        pruned=tuple(pruned) if isinstance(pruned, list) else pruned, drop=line.get("drop"),
        speed_up=line.get("speed_up"),
        others={key: value for key, value in line.items() if key not in _NAMED},
    )  # fmt: skip


TABLES: Mapping[str, tuple[str, Sequence[tuple[str, str]]]] = {
    "table1": ("ETP, table 1: images", (("ETP", "1"),)),
    "table2": ("ETP, table 2: time series", (("ETP", "2"),)),
    "table3": ("ETP, table 3: language", (("ETP", "3"),)),
    "table4": ("ETP, table 4: graphs", (("ETP", "4"),)),
    "table5": ("ETP, table 5: captions", (("ETP", "5"),)),
    "etp-figures": ("ETP, figures 1, 3 and 4, and the text on them",
                    (("ETP", "figure 4 and text"), ("ETP", "figures 1 and 3"))),
    "torque-table1": ("Torque, table 1: images", (("Torque", "1a"), ("Torque", "1b"), ("Torque", "1c"))),
}  # fmt: skip
"""Name on the command line -> title, and (paper, table) of its rows."""


def rows_of(name: str) -> list[PublishedRow]:
    """The rows of one of :data:`TABLES`."""
    return [row for row in published_rows() if (row.paper, row.table) in TABLES[name][1]]


ERRATA = (
    "ETP quotes GReg-2 on ResNet-50 at 1.49x; GReg-2's own table says 2.31x.",
    "Torque's difference of -6.12 for 73.03 to 63.91 is -9.12.",
    "ETP's VGG-19 at 23x loses 3.87 points in section 4.3 and 4.5 in the introduction.",
    "Torque (p) on ResNet-50 at 2.34x has 74.67 in ETP's table and 74.58 in Torque's.",
    "SFP on ResNet-50 has 74.51 in ETP's table and 74.61 in Torque's.",
    "DepGraph's page says +0.38 for ResNet-56 from 93.53 to 93.77 at 2.13x; that is +0.24. Its log of the run at 2.57x "
    "ends at 93.57 (best epoch), the page says 93.64.",
    "BLIP's base BLEU-3 is below its BLEU-4, which cumulative BLEU cannot be.",
    "The README of ETP's code says that MAE rises by 6.15 at 25x; its table 2 has .319 and .3812, a rise of .0622.",
)
"""Errors in the published figures that are not copied."""
