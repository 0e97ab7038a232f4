"""Run an exported sentence encoder in a process that cannot import this library: JSON in, JSON out.

``python -I encoder_worker.py`` reads from standard input: folders of the dense and the pruned model, sentences, the
vectors that the pruned model gave elsewhere, and folders of ``pip install --target``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Encode = Callable[[list[str]], Any]
"""Function of sentences to vectors of length 1, float [sentences, size]."""

BATCH = 32


def encoded(tokenizer: Any, texts: list[str], form: str) -> Any:
    """Batches of token numbers and masks."""
    for start in range(0, len(texts), BATCH):
        yield tokenizer(
            texts[start : start + BATCH], padding=True, truncation=True, max_length=256, return_tensors=form
        )


def mean_vector(hidden: Any, mask: Any) -> Any:
    """The mean hidden state over the tokens of the mask, with length 1, float [sentences, size]."""
    import torch

    weights = mask[..., None].to(hidden)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)


def pooled(model: Any, tokenizer: Any, texts: list[str]) -> Any:
    """Vectors by a model of transformers."""
    import torch

    with torch.no_grad():
        parts = [mean_vector(model(**given).last_hidden_state, given["attention_mask"])
                 for given in encoded(tokenizer, texts, "pt")]  # fmt: skip
    return torch.cat(parts)


def with_sentence_transformers(folder: Path, dense: Path) -> Encode:
    """The folder as first module of sentence-transformers; the others (pooling, length 1) are those of ``dense``."""
    from sentence_transformers import SentenceTransformer, models

    original = SentenceTransformer(str(dense), device="cpu")
    own = models.Transformer(str(folder), max_seq_length=original.max_seq_length)
    made = SentenceTransformer(modules=[own, *list(original)[1:]], device="cpu")
    return lambda texts: made.encode(texts, batch_size=BATCH, show_progress_bar=False, convert_to_tensor=True)


def with_onnxruntime(folder: Path, dense: Path) -> Encode:
    """The folder as an ONNX file, in ONNX Runtime."""
    import onnxruntime
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense)
    file = Path(tempfile.mkdtemp()) / "model.onnx"

    class Hidden(torch.nn.Module):
        """The model as a function of tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Any, mask: Any) -> Any:
            return self.model(input_ids=tokens, attention_mask=mask).last_hidden_state

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=256)
    given = (torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long))
    shapes = ({0: batch, 1: length},) * 2
    torch.onnx.export(Hidden().eval(), given, dynamo=True, verbose=False, dynamic_shapes=shapes).save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def encode(texts: list[str]) -> Any:
        parts = []
        for one in encoded(tokenizer, texts, "np"):
            (hidden,) = session.run(None, dict(zip(names, (one["input_ids"], one["attention_mask"]))))
            parts.append(mean_vector(torch.from_numpy(hidden), torch.from_numpy(one["attention_mask"])))
        return torch.cat(parts)

    return encode


ENGINES = {"sentence-transformers": with_sentence_transformers, "onnxruntime": with_onnxruntime}


def nearest(vectors: Any) -> Any:
    """The number of the nearest other sentence of each, int [sentences]."""
    near = vectors @ vectors.T
    near.fill_diagonal_(-2)
    return near.argmax(1)


def main() -> None:
    """Read the task, and print what was found as the last line."""
    sys.modules["etp_graph"] = None  # type: ignore[assignment]  # every import of it raises from here on
    task = json.load(sys.stdin)
    sys.path.extend(task["sites"])
    import torch

    torch.set_num_threads(1)
    folder, dense, texts = Path(task["folder"]), Path(task["dense"]), task["texts"]
    found: dict[str, Any] = {"engines": {}}
    for name, load in ENGINES.items():
        models = [load(one, dense) for one in (dense, folder)]
        before, after = (model(texts) for model in models)
        seconds = []
        for _ in range(task["rounds"]):
            begin = time.perf_counter()
            models[0](texts)
            middle = time.perf_counter()
            models[1](texts)
            seconds.append([middle - begin, time.perf_counter() - middle])
        difference = float((after - torch.tensor(task["ours"])).abs().max())
        found["engines"][name] = {"version": version(name), "difference": difference, "seconds": seconds}
        found["cosine"] = float((before * after).sum(1).mean())
        found["neighbour"] = float((nearest(before) == nearest(after)).double().mean())
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
