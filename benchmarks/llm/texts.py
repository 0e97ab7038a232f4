"""Windows of tokens of two texts: the Penn Treebank, and the sentences of SST-2 as a second domain."""

from __future__ import annotations

import gzip
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tasks.base import require
from etp_graph.demo.zoo.data import data_root

LENGTH = 256
"""Tokens of a window. Windows do not overlap, and the first token of each is given, not predicted."""

_CHARACTERS = 8
"""More than the characters of a token of these texts, on average."""

Part = Literal["train", "valid", "test", "sst2"]


def read_text(part: Part) -> str:
    """A part of the Penn Treebank, or the sentences of the validation part of SST-2, one a line.

    Raises:
        TaskUnavailableError: the data is missing.
    """
    folder = data_root() / "ptb"
    if part == "sst2":
        file = data_root() / "glue" / "sst2" / "dev.tsv"
        require(file.is_file(), f"no sentences at {file}")
        return "\n".join(line.partition("\t")[2] for line in file.read_text(encoding="utf8").splitlines()[1:])
    file = folder / ("ptb.train.txt.gz" if part == "train" else f"ptb.{part}.txt")
    require(file.is_file(), f"no Penn Treebank at {file}")
    if part == "train":
        with gzip.open(file, "rt", encoding="utf8") as stream:
            return stream.read()
    return file.read_text(encoding="utf8")


def first_windows(tokenizer: Any, part: Part, count: int) -> Tensor:
    """The first windows of a part, int64 [count, LENGTH]."""
    text = read_text(part)[: count * LENGTH * _CHARACTERS]
    tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    return tokens[: count * LENGTH].view(-1, LENGTH)


def drawn_windows(tokenizer: Any, count: int, seed: int) -> Tensor:
    """Windows that begin at random places of the training text, one in each of ``count`` equal parts of it."""
    text, generator = read_text("train"), torch.Generator().manual_seed(seed)
    share, needed = len(text) // count, LENGTH * _CHARACTERS
    found = []
    for number in range(count):
        start = number * share + int(torch.randint(max(share - needed, 1), (1,), generator=generator))
        tokens = tokenizer(text[start : start + needed], return_tensors="pt", verbose=False)["input_ids"][0]
        found.append(tokens[1 : LENGTH + 1])  # the text may begin in the middle of a word
    return torch.stack(found)


@torch.no_grad()
def perplexity(model: Any, windows: Tensor, batch: int = 2) -> float:
    """exp of the mean cross-entropy of each token given those before it in its window."""
    total = 0.0
    for some in windows.split(batch):
        logits = model(input_ids=some, use_cache=False).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="sum"))
    return math.exp(min(total / windows[:, 1:].numel(), 700.0))
