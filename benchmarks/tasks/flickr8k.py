"""Flickr8k: captions of 250 photos by a small BLIP of transformers' own classes, trained from scratch; BLEU-4.

So few photos teach a small network little: the figures compare pruning methods and say nothing about captioning.
"""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.tasks.base import Metric, Part, Recipe, Scale, Task, require
from etp_graph.demo.zoo.data import data_root

PAD, BEGIN, END, UNKNOWN = range(4)
LENGTH, PIXELS = 16, 64
_RECIPES = {
    "smoke": Recipe(
        dense_steps=2, sparse_steps=2, finetune_steps=2, scratch_steps=2, dense_rate=1e-3, sparse_rate=5e-4,
        finetune_rate=5e-4, batch_size=4, optimizer="adamw", weight_decay=0.01, tune_share=0.5, pushes=(1.0,), clip=1.0,
    ),
    "cpu": Recipe(
        dense_steps=900, sparse_steps=200, finetune_steps=200, scratch_steps=800, dense_rate=1e-3, sparse_rate=5e-4,
        finetune_rate=5e-4, batch_size=32, optimizer="adamw", weight_decay=0.01, tune_share=0.25, clip=1.0,
    ),
    "full": Recipe(
        dense_steps=5_000, sparse_steps=2_000, finetune_steps=2_000, scratch_steps=8_000, dense_rate=1e-3,
        sparse_rate=2e-4, finetune_rate=2e-4, batch_size=64, optimizer="adamw", weight_decay=0.05, tune_share=1.0,
        pushes=(0.2, 0.6, 2.0, 6.0), extensions=2, clip=1.0,
    ),
}  # fmt: skip
_PHOTOS = {"smoke": (12, 4, 4), "cpu": (170, 40, 40), "full": (170, 40, 40)}
_WIDTH = {"smoke": 16, "cpu": 96, "full": 384}


class Flickr8k(Task):
    """Only the decoder may shrink, as in the paper: the encoder and the stream stay, so 1.6x is all there is."""

    name = "flickr8k"
    metric = Metric(name="BLEU-4")
    speed_ups = (1.25, 1.5)
    prune = ("heads", "neurons")
    ignore = ("vision_model",)

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        require(scale != "paper", "the papers' 8,000 photos and pretrained BLIP are not at hand: --scale full")
        for library in ("transformers", "sacrebleu"):
            require(find_spec(library) is not None, f"{library} is missing: pip install {library}")
        path = data_root() / "flickr8k" / "flickr8k_250.zip"
        require(path.is_file(), f"{path} is missing")
        self.recipe, self.width = _RECIPES[scale], _WIDTH[scale]
        self.title = f"BLIP (2 layers of {self.width}) on 250 photos of Flickr8k"
        with zipfile.ZipFile(path) as archive:
            rows = [line.split("\t") for line in archive.read("captions.tsv").decode().splitlines()[1:]]
            captions: dict[str, list[str]] = {}
            for name, caption in rows:
                captions.setdefault(name, []).append(caption.lower().strip(" ."))
            names = list(captions)
            order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
            ends = torch.tensor(_PHOTOS[scale]).cumsum(0).tolist()
            photos = dict(
                zip(("train", "val", "test"), (order[: ends[0]], *map(lambda a, b: order[a:b], ends, ends[1:])))
            )
            self.photos = {part: torch.stack([_photo(archive, names[i]) for i in own]) for part, own in photos.items()}
        self.captions = {part: [captions[names[i]] for i in own] for part, own in photos.items()}
        words = Counter(word for five in self.captions["train"] for text in five for word in text.split())
        kept = [word for word, count in words.most_common() if count > 1]
        self.vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *kept]
        ids = {word: number for number, word in enumerate(self.vocabulary)}
        pairs = [(i, text) for i, five in enumerate(self.captions["train"]) for text in five]
        self.owner = torch.tensor([i for i, _ in pairs])
        self.tokens = torch.tensor([_encode(text, ids) for _, text in pairs])

    @property
    def n_train(self) -> int:
        return len(self.owner)

    def build(self) -> nn.Module:
        from transformers import BlipConfig, BlipForConditionalGeneration

        sizes: dict[str, Any] = {
            "hidden_size": self.width, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 4 * self.width, "projection_dim": self.width,
        }  # fmt: skip
        text = {
            **sizes, "vocab_size": len(self.vocabulary), "max_position_embeddings": LENGTH, "pad_token_id": PAD,
            "bos_token_id": BEGIN, "eos_token_id": END, "sep_token_id": END, "encoder_hidden_size": self.width,
            "is_decoder": True,
        }  # fmt: skip
        vision = {**sizes, "image_size": PIXELS, "patch_size": 16}
        config = BlipConfig(
            text_config=text, vision_config=vision, projection_dim=self.width, image_text_hidden_size=self.width
        )
        model: nn.Module = BlipForConditionalGeneration(config)
        return model

    def example(self) -> dict[str, Tensor]:
        return {"pixel_values": self.photos["train"][:1], "input_ids": self.tokens[:1, :-1]}

    def latency_inputs(self) -> dict[str, Tensor]:
        return {"pixel_values": self.photos["train"][:4], "input_ids": self.tokens[:4, :-1]}

    def inputs(self, chosen: Tensor) -> dict[str, Tensor]:
        return {
            "pixel_values": self.photos["train"][self.owner[chosen]], "input_ids": self.tokens[chosen, :-1]
        }  # fmt: skip

    def loss(self, model: nn.Module, chosen: Tensor, generator: torch.Generator) -> Tensor:
        logits = model(**self.inputs(chosen)).logits
        return F.cross_entropy(logits.flatten(0, 1), self.tokens[chosen, 1:].flatten(), ignore_index=PAD)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: Part) -> float:
        from sacrebleu import corpus_bleu

        said = [self._text(row) for row in self._write(model.eval(), self.photos[part]).tolist()]
        # Smoothing, since a short text without any right run of four words would count as nothing at all.
        return float(corpus_bleu(said, list(map(list, zip(*self.captions[part]))), smooth_method="exp").score)

    def _write(self, model: nn.Module, photos: Tensor) -> Tensor:
        """Greedy captions, token by token, [n, LENGTH - 1]."""
        tokens = torch.full((len(photos), 1), BEGIN, device=photos.device)
        for _ in range(LENGTH - 2):
            following = model(pixel_values=photos, input_ids=tokens).logits[:, -1].argmax(1, keepdim=True)
            tokens = torch.cat([tokens, following], 1)
        return tokens

    def _text(self, row: list[int]) -> str:
        end = row.index(END) if END in row else len(row)
        return " ".join(self.vocabulary[token] for token in row[1:end])


def _photo(archive: zipfile.ZipFile, name: str) -> Tensor:
    """The middle square, PIXELS x PIXELS, in [-1, 1]."""
    with Image.open(io.BytesIO(archive.read(f"images/{name}"))) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        small = image.convert("RGB").resize((PIXELS, PIXELS), box=(left, top, left + side, top + side))
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 127.5 - 1


def _encode(text: str, ids: dict[str, int]) -> list[int]:
    """Begin, words, end, padding: LENGTH numbers."""
    tokens = [BEGIN, *[ids.get(word, UNKNOWN) for word in text.split()][: LENGTH - 2], END]
    return tokens + [PAD] * (LENGTH - len(tokens))
