"""Run an exported folder in one engine, in a process that cannot import this library. Prints JSON.

``python -I worker.py FOLDER ENGINE TEXT PROMPTS TOKENS [SITE]``: the file TEXT gives the prompts and the perplexity,
and the engine may be installed in the folder SITE. All prompts have eight tokens, and are continued as one batch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WINDOW = 2048

Run = Callable[[list[Any]], list[Any]]
"""Function from the tokens and the keys and values of all layers so far to the logits and the new keys and values."""


def prompts_of(tokenizer: Any, text: str, number: int) -> list[list[int]]:
    """The first eight tokens of the first long lines."""
    lines = [line for line in text.splitlines() if len(line.split()) >= 8]
    return [tokenizer(line)["input_ids"][:8] for line in lines[:number]]


def perplexity(model: Any, tokens: Any) -> float:
    """exp of the mean loss of the first tokens of the text, in one window."""
    import torch

    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss.exp())


def continue_greedily(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """The tokens that follow each prompt, with the cache of keys and values."""
    import torch

    with torch.no_grad():
        found = model.generate(
            torch.tensor(prompts), attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.long),
            do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip
    return [[int(token) for token in row[len(prompts[0]) :]] for row in found]


def load_stock(folder: Path) -> tuple[Any, Any]:
    """The model by the stock class, and its tokenizer."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def run_transformers(folder: Path, text: str, prompts: int, tokens: int) -> dict[str, Any]:
    """Load the folder with the stock class: perplexity, greedy tokens, and how fast they come."""
    import transformers

    model, tokenizer = load_stock(folder)
    starts = prompts_of(tokenizer, text, prompts)
    continue_greedily(model, starts, 2)
    begin = time.perf_counter()
    found = continue_greedily(model, starts, tokens)
    seconds = time.perf_counter() - begin
    window = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :WINDOW]
    return {
        "class": type(model).__name__, "parameters": model.num_parameters(), "tokens": found,
        "tokens_per_second": prompts * tokens / seconds, "perplexity": perplexity(model, window),
        "version": transformers.__version__,
    }  # fmt: skip


def as_onnx(folder: Path) -> Path:
    """The folder as an ONNX file beside it, with keys and values as inputs and outputs; written once."""
    import torch
    import transformers

    file = folder.parent / "model.onnx"
    if file.exists():
        return file
    model, _ = load_stock(folder)

    class WithCache(torch.nn.Module):
        """The model as a function of tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Any, past: list[Any]) -> tuple[Any, ...]:
            cache = transformers.DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            start = past[0].shape[2]
            places = torch.arange(start, start + tokens.shape[1])[None]
            out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, position_ids=places)
            layers = out.past_key_values.layers
            return (out.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))

    past = empty_cache(model.config, n_prompts=2, length=7)
    batch, length, before = torch.export.Dim("batch"), torch.export.Dim("length"), torch.export.Dim("before")
    program = torch.onnx.export(
        WithCache(), (torch.zeros(2, 5, dtype=torch.long), [torch.from_numpy(one) for one in past]), dynamo=True,
        verbose=False, dynamic_shapes=({0: batch, 1: length}, [{0: batch, 2: before}] * len(past)),
    )  # fmt: skip
    program.save(file, external_data=True)
    return file


def empty_cache(config: Any, *, n_prompts: int, length: int = 0) -> list[Any]:
    """Keys and values of all layers for so many prompts of one length, as zeros."""
    import numpy as np

    shape = (n_prompts, config.num_key_value_heads, length, config.head_dim)
    return [np.zeros(shape, dtype=np.float32) for _ in range(2 * config.num_hidden_layers)]


def decode(run: Run, folder: Path, text: str, prompts: int, tokens: int) -> dict[str, Any]:
    """Continue the prompts greedily with an engine that runs the ONNX file."""
    import numpy as np
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    starts = prompts_of(transformers.AutoTokenizer.from_pretrained(folder), text, prompts)
    for n_tokens in (2, tokens):  # the first round warms up
        given, past = np.array(starts), empty_cache(config, n_prompts=len(starts))
        found: list[Any] = []
        begin = time.perf_counter()
        for _ in range(n_tokens):
            logits, *past = run([given, *past])
            last = np.array(logits[:, -1])
            last[:, ends] = -np.inf  # as with min_new_tokens
            given = last.argmax(1)[:, None]
            found.append(given)
        seconds = time.perf_counter() - begin
    rows = [[int(token) for token in row] for row in np.concatenate(found, 1)]
    return {"tokens": rows, "tokens_per_second": len(starts) * tokens / seconds}


def run_onnxruntime(folder: Path, text: str, prompts: int, tokens: int) -> dict[str, Any]:
    """Run the ONNX file in ONNX Runtime, in float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(as_onnx(folder)), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    found = decode(lambda values: session.run(None, dict(zip(names, values))), folder, text, prompts, tokens)
    return {**found, "version": onnxruntime.__version__}


def run_openvino(folder: Path, text: str, prompts: int, tokens: int) -> dict[str, Any]:
    """Run the ONNX file in OpenVINO, in float32."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(as_onnx(folder)), "CPU", settings)

    def run(values: list[Any]) -> list[Any]:
        out = compiled(values)
        return [out[i] for i in range(len(compiled.outputs))]

    return {**decode(run, folder, text, prompts, tokens), "version": openvino.__version__.split("-")[0]}


ENGINES = {"transformers": run_transformers, "onnxruntime": run_onnxruntime, "openvino": run_openvino}


def main() -> None:
    """The command line."""
    sys.modules["etp_graph"] = None  # type: ignore[assignment]  # every import of it raises from here on
    folder, engine, text, prompts, tokens, *sites = sys.argv[1:]
    sys.path.extend(sites)
    import torch

    torch.set_num_threads(1)
    found = ENGINES[engine](Path(folder), Path(text).read_text(encoding="utf8")[:60_000], int(prompts), int(tokens))
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
