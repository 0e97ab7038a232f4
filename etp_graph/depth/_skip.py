"""Run a model as if some of its blocks were not there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from etp_graph.model import removing_hooks

from ._find import first_tensor


@contextmanager
def skipped(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let each of the named blocks return its input inside this context. It still runs; what it adds is dropped."""
    with removing_hooks() as hooks:
        blocks = map(model.get_submodule, names)
        hooks.extend(block.register_forward_hook(_return_input, with_kwargs=True) for block in blocks)
        yield


def _return_input(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    given = first_tensor((args, kwargs))
    if isinstance(output, Tensor):
        return given
    return type(output)((given, *output[1:]))
