"""SST-2 and MRPC: a pretrained 6-layer BERT (all-MiniLM-L6-v2), fine-tuned first.

GLUE keeps the labels of its test sets; the published test sets of the treebank and of the paraphrase corpus are used
here, and the validation examples are carved from the training sets.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.minilm import minilm_folder
from benchmarks.tasks.base import Metric, Part, Recipe, Scale, Task, require
from etp_graph.demo.zoo.data import data_root

Rows = tuple[list[str] | list[tuple[str, str]], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Examples of each part (``None``: all that are left), tokens of an example, layers of the encoder.

    ``bucket``: examples are sorted by length within so many batches; 0: not at all.
    """

    train: int | None
    val: int
    test: int | None
    length: int
    layers: int = 6
    bucket: int = 0


_SIZES = {
    ("sst2", "smoke"): Sizes(train=16, val=8, test=8, length=12, layers=2),
    ("sst2", "cpu"): Sizes(train=20_000, val=500, test=1_000, length=24),
    ("sst2", "full"): Sizes(train=None, val=2_000, test=None, length=128, bucket=100),
    ("mrpc", "smoke"): Sizes(train=16, val=8, test=8, length=16, layers=2),
    ("mrpc", "cpu"): Sizes(train=None, val=300, test=600, length=48),
    ("mrpc", "full"): Sizes(train=None, val=400, test=None, length=128, bucket=100),
}
_ADAM: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.01, "clip": 1.0}
_SMOKE = Recipe(
    dense_steps=1, sparse_steps=2, finetune_steps=1, scratch_steps=1, dense_rate=5e-5, sparse_rate=5e-5,
    finetune_rate=5e-5, batch_size=4, tune_share=0.5, pushes=(1.0,), **_ADAM,
)  # fmt: skip
_CPU = {
    "sst2": Recipe(
        dense_steps=600, sparse_steps=80, finetune_steps=80, scratch_steps=200, dense_rate=1e-4, sparse_rate=1e-4,
        finetune_rate=1e-4, batch_size=16, tune_share=0.2, **_ADAM,
    ),
    "mrpc": Recipe(
        dense_steps=500, sparse_steps=60, finetune_steps=60, scratch_steps=160, dense_rate=1e-4, sparse_rate=1e-4,
        finetune_rate=1e-4, batch_size=12, tune_share=0.2, **_ADAM,
    ),
}  # fmt: skip
_FULL = {  # rates: `python -m benchmarks contest recipe sst2`
    name: Recipe(
        dense_steps=epoch * 3, sparse_steps=epoch * sparse, finetune_steps=epoch * after, scratch_steps=epoch * 6,
        dense_rate=5e-5, sparse_rate=5e-5, finetune_rate=5e-5, batch_size=32, tune_share=1.0,
        pushes=(0.2, 0.6, 2.0, 6.0), extensions=2, precision="bf16", **_ADAM,
    )
    for name, epoch, sparse, after in (("sst2", 2_042, 1, 2), ("mrpc", 102, 2, 4))
}  # fmt: skip


class Glue(Task):
    """Classification of sentences or pairs; heads and feed-forward neurons may go."""

    metric = Metric(name="accuracy", percent=True)
    speed_ups = (2.0, 6.0)
    prune = ("heads", "neurons")
    ignore = ("bert.pooler",)
    checkpoint_note = "published weights of all-MiniLM-L6-v2, fine-tuned by this benchmark with seed 0 and cached"

    def __init__(self, scale: Scale, *, name: str) -> None:
        super().__init__(scale)
        require(scale != "paper", "the papers' BERT of 12 layers is not at hand: --scale full takes the one of 6")
        self.name, self.sizes = name, _SIZES[name, scale]
        self.recipe = {"smoke": _SMOKE, "cpu": _CPU[name], "full": _FULL[name]}[scale]
        require(find_spec("transformers") is not None, "transformers is missing: pip install transformers")
        try:
            self.weights = minilm_folder()
        except RuntimeError as error:
            require(False, str(error))
        self.title = f"BERT ({self.sizes.layers} layers of 384) on {name.upper().replace('SST2', 'SST-2')}"
        folder = data_root() / "glue" / name
        require(folder.is_dir(), f"{folder} is missing")
        self.parts = self._encode(*(_sst2(folder) if name == "sst2" else _mrpc(folder)))

    def _encode(self, train: Rows, test: Rows) -> dict[str, tuple[dict[str, Tensor], Tensor]]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.weights)
        order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(0)).tolist()
        end = None if self.sizes.train is None else self.sizes.val + self.sizes.train
        chosen = {"val": order[: self.sizes.val], "train": order[self.sizes.val : end]}
        chosen["test"] = list(range(len(test[1])))[: self.sizes.test]
        parts = {}
        for part, rows in chosen.items():
            texts, labels = test if part == "test" else train
            made = tokenizer(
                [texts[i] for i in rows], padding="max_length", truncation=True, max_length=self.sizes.length,
                return_tensors="pt",
            )  # fmt: skip
            inputs = {key: made[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
            parts[part] = (inputs, labels[rows])
        return parts

    @property
    def n_train(self) -> int:
        return len(self.parts["train"][1])

    def build(self) -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig.from_pretrained(self.weights, **self._settings())
        return self._frozen(BertForSequenceClassification(config))

    def start(self) -> nn.Module:
        from transformers import BertForSequenceClassification
        from transformers.utils import logging

        quiet: Any = logging
        quiet.disable_progress_bar()
        quiet.set_verbosity_error()  # it reports that the classifier is new, which is known
        return self._frozen(BertForSequenceClassification.from_pretrained(self.weights, **self._settings()))

    def _settings(self) -> dict[str, Any]:
        # The plain attention: PyTorch's counter sees its products on every device.
        return {"num_labels": 2, "num_hidden_layers": self.sizes.layers, "attn_implementation": "eager"}

    def _frozen(self, model: Any) -> nn.Module:
        """On a CPU the 11.7 M numbers of the word embedding, which nothing prunes, do not learn."""
        if self.scale != "full":
            model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
        found: nn.Module = model
        return found

    def example(self) -> dict[str, Tensor]:
        return {key: value[:1] for key, value in self.parts["train"][0].items()}

    def latency_inputs(self) -> dict[str, Tensor]:
        return {key: value[:4] for key, value in self.parts["train"][0].items()}

    def inputs(self, chosen: Tensor) -> dict[str, Tensor]:
        return shortened(self.parts["train"][0], chosen)

    def loss(self, model: nn.Module, chosen: Tensor, generator: torch.Generator) -> Tensor:
        inputs, labels = self.parts["train"]
        loss: Tensor = model(**shortened(inputs, chosen), labels=labels[chosen]).loss
        return loss

    def order_of_pass(self, generator: torch.Generator) -> Tensor:
        """At full size batches of like lengths, which waste no padding: SST-2's phrases have 2 to 66 tokens.

        The examples are shuffled, sorted by length within every hundred batches, and the batches are shuffled again.
        """
        order = super().order_of_pass(generator)
        if self.sizes.bucket:
            size = min(self.recipe.batch_size, self.n_train)
            lengths = self.parts["train"][0]["attention_mask"].sum(1)
            order = torch.cat(
                [some[lengths[some].argsort(stable=True)] for some in order.split(size * self.sizes.bucket)]
            )
            whole = order[: self.n_train // size * size].view(-1, size)
            batches = whole[torch.randperm(len(whole), generator=generator)]
            order = torch.cat([batches.flatten(), order[whole.numel() :]])
        return order

    def labels(self, chosen: Tensor) -> Tensor:
        return self.parts["train"][1][chosen]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: Part) -> float:
        model.eval()
        inputs, labels = self.parts[part]
        right = 0
        by_length = inputs["attention_mask"].sum(1).argsort()  # batches of like lengths waste no padding
        for chosen in by_length.split(64):
            right += int((model(**shortened(inputs, chosen)).logits.argmax(1) == labels[chosen]).sum())
        return right / len(labels)


def shortened(inputs: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    """The examples, without the columns that are padding in all of them."""
    width = int(inputs["attention_mask"][chosen].sum(1).max())
    return {key: value[chosen, :width] for key, value in inputs.items()}


def _sst2(folder: Path) -> tuple[Rows, Rows]:
    """GLUE's training phrases, and the treebank's test sentences."""

    def split(lines: list[str]) -> Rows:
        rows = [line.rstrip("\n").split("\t") for line in lines[1:]]
        return [text for _, text in rows], torch.tensor([int(label) for label, _ in rows])

    with gzip.open(folder / "train.tsv.gz", "rt", encoding="utf8") as train:
        found = split(train.readlines())
    return found, split((folder / "test.tsv").open(encoding="utf8").readlines())


def _mrpc(folder: Path) -> tuple[Rows, Rows]:
    """The training pairs of GLUE, and the corpus' own test pairs."""

    def split(name: str) -> Rows:
        rows = [line.rstrip("\n").split("\t") for line in (folder / name).open(encoding="utf8")][1:]
        return [(row[3], row[4]) for row in rows], torch.tensor([int(row[0]) for row in rows])

    return split("train.tsv"), split("test.tsv")
