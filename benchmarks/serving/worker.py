"""Run exported folders in one engine, in a process that cannot import this library: JSON in, JSON out.

``python -I worker.py`` reads a :class:`Task` as JSON from standard input. All prompts have eight tokens, and are
continued as one batch, greedily, in float32, on one thread. Of several folders the last one is tested; before it the
others take turns with it, so that other work on the machine slows all of them alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WINDOW = 2048

PROMPT = 8
"""Tokens of a prompt."""

Continue = Callable[[list[list[int]], int], list[list[int]]]
"""Function of the tokens of some prompts and a number: so many tokens after each."""

Run = Callable[[list[Any]], list[Any]]
"""Function from the tokens and the keys and values of all layers so far to the logits and the new keys and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a process does.

    Attributes:
        engine: name of the engine.
        folders: folders of models; the last one is tested, and timed in turns with the others.
        text: file of the text that gives the prompts and the perplexity.
        prompts, tokens: number of prompts, and of the tokens after each.
        rounds, timed: number of timed turns, and of the tokens after each prompt in a turn.
        sites: folders of ``pip install --target``, where engines may be.
        llama_cpp: folder of the sources of llama.cpp, which hold its converter.
    """

    engine: str
    folders: list[str]
    text: str
    prompts: int
    tokens: int
    rounds: int
    timed: int
    sites: list[str]
    llama_cpp: str = ""


def prompts_of(tokenizer: Any, text: str, number: int) -> list[list[int]]:
    """The first eight tokens of the first long lines."""
    lines = [line for line in text.splitlines() if len(line.split()) >= PROMPT]
    return [tokenizer(line)["input_ids"][:PROMPT] for line in lines[:number]]


def perplexity(model: Any, tokens: Any) -> float:
    """exp of the mean loss of the first tokens of the text, in one window."""
    import torch

    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss.exp())


def continue_greedily(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """The tokens that a model of transformers writes after each prompt, with the cache of keys and values."""
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


def load_transformers(folder: Path, task: Task) -> Continue:
    """The stock class in eager mode."""
    model, _ = load_stock(folder)
    return lambda prompts, tokens: continue_greedily(model, prompts, tokens)


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


def decoder(run: Run, folder: Path) -> Continue:
    """Continue prompts greedily with an engine that runs the ONNX file."""
    import numpy as np
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id

    def continued(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        given, past, found = np.array(prompts), empty_cache(config, n_prompts=len(prompts)), []
        for _ in range(tokens):
            logits, *past = run([given, *past])
            last = np.array(logits[:, -1])
            last[:, ends] = -np.inf  # as with min_new_tokens
            given = last.argmax(1)[:, None]
            found.append(given)
        return [[int(token) for token in row] for row in np.concatenate(found, 1)]

    return continued


def load_onnxruntime(folder: Path, task: Task) -> Continue:
    """The ONNX file that ``torch.onnx`` writes, in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(as_onnx(folder)), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return decoder(lambda values: session.run(None, dict(zip(names, values))), folder)


def load_openvino(folder: Path, task: Task) -> Continue:
    """The ONNX file that ``torch.onnx`` writes, in OpenVINO."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(as_onnx(folder)), "CPU", settings)

    def run(values: list[Any]) -> list[Any]:
        out = compiled(values)
        return [out[i] for i in range(len(compiled.outputs))]

    return decoder(run, folder)


def load_onnxruntime_genai(folder: Path, task: Task) -> Continue:
    """The folder by the model builder of ONNX Runtime GenAI, in its own loop of generation."""
    import numpy as np
    import onnxruntime_genai as genai

    out = folder.parent / "genai"
    if not (out / "genai_config.json").is_file():
        words = ["-m", str(folder), "-o", str(out), "-p", "fp32", "-e", "cpu", "-c", str(out / "cache")]
        _run_python(["-m", "onnxruntime_genai.models.builder", *words], task.sites)
        body = json.loads((out / "genai_config.json").read_text(encoding="utf8"))
        body["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
        (out / "genai_config.json").write_text(json.dumps(body), encoding="utf8")
    model = genai.Model(str(out))

    def continued(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        length = len(prompts[0]) + tokens
        settings = genai.GeneratorParams(model)
        settings.set_search_options(max_length=length, min_length=length, batch_size=len(prompts), do_sample=False)
        generator = genai.Generator(model, settings)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [[int(token) for token in generator.get_sequence(i)][-tokens:] for i in range(len(prompts))]

    return continued


def load_llama_cpp(folder: Path, task: Task) -> Continue:
    """The folder by llama.cpp's own converter, in its server (package ``xllamacpp``)."""
    from concurrent.futures import ThreadPoolExecutor

    import xllamacpp

    file = folder.parent / "model.gguf"
    if not file.exists():
        script = Path(task.llama_cpp) / "convert_hf_to_gguf.py"
        if not task.llama_cpp or not script.is_file():
            raise FileNotFoundError("convert_hf_to_gguf.py: give the sources of llama.cpp with --llama-cpp")
        words = [str(script), str(folder), "--outtype", "f32", "--outfile", str(file)]
        _run_python(words, [str(script.parent / "gguf-py"), *task.sites])
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_parallel, settings.n_ctx = task.prompts, task.prompts * 2 * (PROMPT + task.tokens)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.warmup = False
    server = xllamacpp.Server(settings)

    def one(prompt: list[int], tokens: int) -> list[int]:
        answer = server.handle_completions({
            "prompt": prompt, "n_predict": tokens, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True,
            "cache_prompt": False, "return_tokens": True, "verbose": True,
        })  # fmt: skip
        return [int(token) for token in answer["__verbose"]["tokens"]]

    def continued(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        with ThreadPoolExecutor(len(prompts)) as threads:  # the server joins requests that arrive together
            return list(threads.map(one, prompts, [tokens] * len(prompts)))

    return continued


def load_vllm(folder: Path, task: Task) -> Continue:
    """The folder in vLLM on the CPU."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1",
                      VLLM_NO_USAGE_STATS="1")  # fmt: skip
    from vllm import LLM, SamplingParams

    model = LLM(
        model=str(folder), dtype="float32", enforce_eager=True, max_model_len=2 * (PROMPT + task.tokens),
        max_num_seqs=task.prompts,
    )  # fmt: skip

    def continued(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        settings = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, detokenize=False)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [[int(token) for token in one.outputs[0].token_ids] for one in model.generate(given, settings)]

    return continued


def _run_python(words: list[str], sites: list[str]) -> None:
    """Run a converter of an engine in a process of its own."""
    paths = os.pathsep.join(sites)
    subprocess.run(  # noqa: S603  # the converters that are named here
        [sys.executable, *words], env={**os.environ, "PYTHONPATH": paths}, check=True, capture_output=True
    )


ENGINES: dict[str, tuple[Callable[[Path, Task], Continue], str]] = {
    "transformers": (load_transformers, "transformers"),
    "onnxruntime": (load_onnxruntime, "onnxruntime"),
    "openvino": (load_openvino, "openvino"),
    "onnxruntime-genai": (load_onnxruntime_genai, "onnxruntime-genai"),
    "llama.cpp": (load_llama_cpp, "xllamacpp"),
    "vllm": (load_vllm, "vllm-cpu"),
}
"""What loads a folder, and the package whose version counts."""


def run_task(task: Task) -> dict[str, Any]:
    """Load the folders, continue the prompts, take turns; the perplexity with transformers."""
    from importlib.metadata import version

    import transformers

    load, package = ENGINES[task.engine]
    folders = [Path(folder) for folder in task.folders]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[-1])
    text = Path(task.text).read_text(encoding="utf8")[:60_000]
    starts = prompts_of(tokenizer, text, task.prompts)
    models = [load(folder, task) for folder in folders]
    found: dict[str, Any] = {"version": version(package), "tokens": models[-1](starts, task.tokens)}
    short = [len(tokens) for tokens in found["tokens"] if len(tokens) != task.tokens]
    if short or len(found["tokens"]) != len(starts):
        raise RuntimeError(f"{len(found['tokens'])} prompts were continued, {len(short)} of them by {short[:1]} tokens")
    if len(models) > 1:
        for model in models[:-1]:
            model(starts, 2)  # warms up
        found["seconds"] = [[_seconds(model, starts, task.timed) for model in models] for _ in range(task.rounds)]
    if task.engine == "transformers":
        model, _ = load_stock(folders[-1])
        window = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :WINDOW]
        found["class"], found["parameters"] = type(model).__name__, model.num_parameters()
        found["perplexity"] = perplexity(model, window)
    return found


def _seconds(model: Continue, starts: list[list[int]], tokens: int) -> float:
    begin = time.perf_counter()
    model(starts, tokens)
    return time.perf_counter() - begin


def main() -> None:
    """Read the task, and print what was found as the last line."""
    sys.modules["etp_graph"] = None  # type: ignore[assignment]  # every import of it raises from here on
    task = Task(**json.load(sys.stdin))
    sys.path.extend(task.sites)
    import torch

    torch.set_num_threads(1)
    sys.stdout.write("\n" + json.dumps(run_task(task)) + "\n")
    sys.stdout.flush()
    os._exit(0)  # engines leave threads behind, which may crash as Python ends


if __name__ == "__main__":
    main()
