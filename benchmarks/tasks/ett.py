"""ETTh1: the next 48 hours of a transformer's oil temperature from the last 96, by an Informer (univariate)."""

from __future__ import annotations

import datetime as dt
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.informer import Informer, InformerConfig
from benchmarks.tasks.base import Metric, Part, Recipe, Scale, Task, require
from etp_graph.demo.zoo.data import data_root

PAST, KNOWN, AHEAD = 96, 48, 48
STARTS = {"train": (0, 8640), "val": (8640, 11520), "test": (11520, 14400)}
"""Rows of the usual split, 12 / 4 / 4 months of 30 days; the past of the first windows reaches back before it."""
_RECIPES = {
    "smoke": Recipe(
        dense_steps=2, sparse_steps=2, finetune_steps=2, scratch_steps=2, dense_rate=1e-3, sparse_rate=5e-4,
        finetune_rate=5e-4, batch_size=4, optimizer="adamw", weight_decay=0.01, tune_share=0.5, pushes=(1.0,),
    ),
    "cpu": Recipe(
        dense_steps=400, sparse_steps=200, finetune_steps=200, scratch_steps=800, dense_rate=1e-3, sparse_rate=5e-4,
        finetune_rate=5e-4, batch_size=32, optimizer="adamw", weight_decay=0.01, tune_share=0.25,
    ),
    "full": Recipe(  # 265 steps a pass: 6 passes as in the authors' code, then 1 and 2
        dense_steps=6 * 265, sparse_steps=265, finetune_steps=2 * 265, scratch_steps=9 * 265, dense_rate=1e-4,
        sparse_rate=5e-5, finetune_rate=5e-5, batch_size=32, optimizer="adamw", weight_decay=0.01, tune_share=1.0,
        pushes=(0.2, 0.6, 2.0, 6.0), extensions=2, tuned_at=6.5, precision="bf16",
    ),
    "paper": Recipe(
        dense_steps=2_000, sparse_steps=2_000, finetune_steps=2_000, scratch_steps=6_000, dense_rate=1e-4,
        sparse_rate=1e-4, finetune_rate=1e-4, batch_size=32, optimizer="adamw", weight_decay=0.01, tune_share=0.25,
        pushes=(0.2, 0.6, 2.0, 6.0, 20.0),
    ),
}  # fmt: skip
_MODEL: dict[str, dict[str, Any]] = {
    "smoke": {"d_model": 16, "n_heads": 2, "d_ff": 24},
    "cpu": {"d_model": 64, "n_heads": 8, "d_ff": 256},
    "full": {"d_model": 512, "n_heads": 8, "d_ff": 2048},
    "paper": {"d_model": 512, "n_heads": 8, "d_ff": 2048},
}
STRIDE = {"smoke": 400, "cpu": 4, "full": 1, "paper": 1}
"""Every which window of the validation and test months is forecast."""


class Ett(Task):
    """Mean squared error of the standardised temperature; the mean absolute one beside it."""

    name = "ett"
    metric = Metric(name="MSE", higher=False)
    speed_ups = (2.5, 5.0)
    classes = False
    prune = ("heads", "head_dims", "neurons", "channels", "stream")

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        path = data_root() / "ett" / "ETTh1.csv"
        require(path.is_file(), f"{path} is missing")
        self.recipe, width = _RECIPES[scale], _MODEL[scale]["d_model"]
        self.title = f"Informer (width {width}) on ETTh1, 96 to 48 hours, univariate"
        value = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1, usecols=7, dtype=np.float32))
        train = value[slice(*STARTS["train"])]
        self.value = ((value - train.mean()) / train.std(correction=0)).unsqueeze(1)
        self.calendar = _calendar([line.partition(",")[0] for line in path.open(encoding="utf8")][1:])

    @property
    def n_train(self) -> int:
        return STARTS["train"][1] - PAST - AHEAD + 1

    def build(self) -> nn.Module:
        sizes = _MODEL[self.scale]
        return Informer(
            InformerConfig(
                enc_in=1, dec_in=1, c_out=1, seq_len=PAST, label_len=KNOWN, pred_len=AHEAD, factor=5, **sizes
            )
        )

    def example(self) -> tuple[Tensor, ...]:
        return self._windows(torch.tensor([PAST]))[0]

    def latency_inputs(self) -> tuple[Tensor, ...]:
        return self._windows(PAST + torch.arange(8))[0]

    def inputs(self, chosen: Tensor) -> tuple[Tensor, ...]:
        return self._windows(chosen + PAST)[0]

    def loss(self, model: nn.Module, chosen: Tensor, generator: torch.Generator) -> Tensor:
        inputs, target = self._windows(chosen + PAST)
        return F.mse_loss(model(*inputs), target)

    def evaluate(self, model: nn.Module, part: Part) -> float:
        return self._errors(model, part)[0]

    def details(self, model: nn.Module, part: Part) -> dict[str, float]:
        return {"MAE": self._errors(model, part)[1]}

    @torch.no_grad()
    def _errors(self, model: nn.Module, part: Part) -> tuple[float, float]:
        model.eval()
        first, end = STARTS[part]
        errors = []
        for starts in torch.arange(first, end - AHEAD + 1, STRIDE[self.scale]).split(128):
            inputs, target = self._windows(starts)
            errors.append((model(*inputs) - target).flatten())
        error = torch.cat(errors)
        return float(error.square().mean()), float(error.abs().mean())

    def _windows(self, starts: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Inputs of an Informer and the truth, for forecasts that begin at the rows ``starts`` [n]."""
        past = starts.unsqueeze(1) + torch.arange(-PAST, 0)
        both = starts.unsqueeze(1) + torch.arange(-KNOWN, AHEAD)
        seen = torch.arange(KNOWN + AHEAD, device=self.value.device) < KNOWN
        known = self.value[both] * seen.unsqueeze(1)
        target = self.value[both[:, KNOWN:]]
        return (self.value[past], self.calendar[past], known, self.calendar[both]), target


def _calendar(stamps: list[str]) -> Tensor:
    """Hour, day of the week, of the month and of the year, each in [-0.5, 0.5]: [n, 4]."""
    times = [dt.datetime.fromisoformat(stamp) for stamp in stamps]
    rows = [(t.hour / 23, t.weekday() / 6, (t.day - 1) / 30, (t.timetuple().tm_yday - 1) / 365) for t in times]
    return torch.tensor(rows) - 0.5
