"""Prune SmolLM2-135M-Instruct without training, and write each model as a plain folder of transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import etp_graph as etp
from benchmarks.llm.methods import RIDGE
from benchmarks.llm.run import CALIBRATION
from benchmarks.llm.texts import drawn_windows
from benchmarks.models.smollm2 import load_smollm2
from benchmarks.serving import worker

LAYER_BATCHES = 2
"""Number of batches of two windows that score layers, which are scored anew after each removal."""

WAYS = ("width", "depth", "both")

DENSE = "dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is removed.

    Attributes:
        share: of the parameters that stay, embeddings included.
        way: one of ``WAYS``, or ``dense``.
    """

    share: float
    way: str

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.way if self.way == DENSE else f"{self.way}-{self.share:g}"


def settings(shares: Sequence[float], ways: Sequence[str]) -> Iterator[Setting]:
    """The dense model, then each share in each way."""
    yield Setting(share=1.0, way=DENSE)
    for share in shares:
        for way in ways:
            yield Setting(share=share, way=way)


class Folders:
    """Folders of pruned models; one that is there is not made again.

    Args:
        place: the folder that holds them.
        text: the test text, which gives the prompts.
        prompts, tokens: number of prompts, and of the tokens after each.
        round_to: neurons are a multiple of this.
    """

    def __init__(self, place: Path, text: str, *, prompts: int, tokens: int, round_to: int) -> None:
        self._place, self._text, self._prompts, self._tokens, self._round_to = place, text, prompts, tokens, round_to
        self._model: Any = None
        self._tokenizer: Any = None
        self._batches: list[dict[str, Any]] = []
        self._plan: Any = None
        self._moments: Any = None

    def make(self, setting: Setting) -> Path:
        """The folder of a setting. ``tokens.json`` beside it holds what the model in this process writes."""
        place = self._place / setting.name
        if (place / "tokens.json").is_file():
            return place / "model"
        if self._model is None:
            self._model, self._tokenizer = load_smollm2()
            windows = drawn_windows(self._tokenizer, CALIBRATION, seed=0)
            self._batches = [{"input_ids": some, "use_cache": False} for some in windows.split(2)]
        model = self._model if setting.way == DENSE else self.prune(setting)
        starts = worker.prompts_of(self._tokenizer, self._text, self._prompts)
        tokens = worker.continue_greedily(model, starts, self._tokens)
        place.mkdir(parents=True, exist_ok=True)
        etp.export.huggingface(model, place / "model", self._tokenizer, overwrite=True)
        (place / "tokens.json").write_text(json.dumps({"prompts": starts, "tokens": tokens}), encoding="utf8")
        return place / "model"

    def prune(self, setting: Setting) -> Any:
        """A pruned copy with at most this share of the parameters."""
        model, n_parameters = copy.deepcopy(self._model), self._model.num_parameters()
        layer = sum(p.numel() for p in model.model.layers[0].parameters())
        saved = n_parameters - int(setting.share * n_parameters)
        if setting.way == "depth":
            etp.depth.shorten_(model, self._batches[:LAYER_BATCHES], n_blocks=max(1, -int(-saved // layer)))
            return model
        budget = etp.Budget(params=n_parameters - saved, uniform=True, round_to={"neurons": self._round_to})
        how: dict[str, Any] = {"criterion": "fisher", "ridge": RIDGE, "progress": False}
        if setting.way == "both":  # half of the saving by depth
            etp.oneshot_(model, self._batches, budget=budget, blocks=max(1, saved // 2 // layer), **how)
            return model
        if self._moments is None:
            self._plan = etp.trace(self._model, self._batches[0], check=False)
            self._moments = etp.recovery.input_moments(self._model, self._plan, self._batches)
        etp.oneshot_(model, self._batches, budget=budget, plan=self._plan, compensate=self._moments, **how)
        return model


def differences(folder: Path, tokens: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Where an engine's tokens leave those of this library's process, and how close the choice was.

    Args:
        folder: the folder of the model; ``tokens.json`` is beside it.
        tokens: what the engine wrote after each prompt.

    Returns:
        For each prompt that differs: its number, the place of the first other token, the two tokens, the difference of
        their logits in float64, and the largest difference of a logit between float32 and float64 at this place.
    """
    held = json.loads((folder.parent / "tokens.json").read_text(encoding="utf8"))
    model: Any = None
    found = []
    for number, (start, ours, theirs) in enumerate(zip(held["prompts"], held["tokens"], tokens, strict=True)):
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
        if place is None:
            continue
        if model is None:
            model, _ = worker.load_stock(folder)
        given = torch.tensor([[*start, *ours[:place]]])
        with torch.no_grad():
            single = model.float()(given).logits[0, -1]
            double = model.double()(given).logits[0, -1]
        found.append({
            "prompt": number, "place": place, "tokens": [ours[place], theirs[place]],
            "gap": float(double[ours[place]] - double[theirs[place]]),
            "rounding": float((single.double() - double).abs().max()),
        })  # fmt: skip
    return found
