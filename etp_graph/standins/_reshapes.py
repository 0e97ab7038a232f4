"""Stand-ins for attention modules that compute the width of their heads from the width of their input.

``x.reshape(B, N, C)`` and ``qkv.reshape(B, N, 3, self.num_heads, C // self.num_heads)`` are correct for square
projections only. In a ``reshape`` or ``view`` without a -1, any one size can be replaced by -1 without changing the
result. This module replaces the size that is computed from the channels of the input, or the number of heads if it is
read from another object (``self.config.n_head``), which surgery does not change. It does so in the forward of every
class, from any library, whose number of heads is an attribute of the module or of such an object.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from functools import update_wrapper
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn

from ._registry import ROWS, Row, class_name, register_fallback
from ._source import subclass

HEADS = ("num_heads", "n_heads", "heads", "num_attention_heads", "n_head", "nhead", "num_head")

_WIDTHS = re.compile(r"^(C|D|E|c|d|dim|channels|embed_dim|hidden_size|hidden_dim|n_embd|d_model|inner_dim)$")


def reshape_standin(module: nn.Module) -> type[nn.Module] | None:
    """Return a subclass of the module's class with -1 for the width in reshapes; ``None`` if none is needed."""
    has_row = class_name(type(module)) in ROWS
    if has_row or not (any(isinstance(getattr(module, name, None), int) for name in HEADS) or _holds_heads(module)):
        return None
    return with_open_reshapes(type(module))


def _holds_heads(module: nn.Module) -> bool:
    """Return True if an object that the module holds, such as its configuration, has a number of heads."""
    objects = [value for value in vars(module).values() if not isinstance(value, _PLAIN)]
    return any(isinstance(inspect.getattr_static(value, name, None), int) for value in objects for name in HEADS)


_PLAIN = (int, float, str, type(None), dict, list, tuple, set, torch.Tensor, nn.Module)
"""Types of attributes that are not looked into."""


_known: dict[type, type[nn.Module] | None] = {}


def with_open_reshapes(cls: type[nn.Module]) -> type[nn.Module] | None:
    """Return a subclass with -1 for the width in reshapes; ``None`` if it cannot be made or is not needed."""
    if cls not in _known:
        _known[cls] = _rewritten(cls)
    return _known[cls]


def _rewritten(cls: type[nn.Module]) -> type[nn.Module] | None:
    outer = cls.__dict__.get("forward")
    function = inspect.unwrap(outer) if inspect.isfunction(outer) else None
    if not inspect.isfunction(function) or function.__closure__:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # source not available
        return None
    freed = _Free()
    tree = ast.fix_missing_locations(freed.visit(tree))
    if not freed.changed:
        return None
    body: dict[str, Any] = {}
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)  # lock reasons name lines of the class's own file
    code = compile(tree, function.__code__.co_filename, "exec")
    exec(code, function.__globals__, body)  # noqa: S102 - the class's own source with sizes written as -1
    forward = _decorated_alike(outer, body["forward"])
    return None if forward is None else subclass(cls, {"forward": forward})


def _decorated_alike(decorated: Any, inner: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a function with the decorators of another one; ``None`` if one of them keeps it in an unknown place."""
    wrapped = getattr(decorated, "__wrapped__", None)
    if wrapped is None:
        return inner
    new = _decorated_alike(wrapped, inner)
    cells = decorated.__closure__ or ()
    own = [_content(cell) is wrapped for cell in cells]
    if new is None or not any(own):
        return None
    closure = tuple(CellType(new) if held else cell for cell, held in zip(cells, own, strict=True))
    made = FunctionType(decorated.__code__, decorated.__globals__, decorated.__name__, decorated.__defaults__, closure)
    made.__kwdefaults__ = decorated.__kwdefaults__
    return update_wrapper(made, new)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


class _Free(ast.NodeTransformer):
    """Transformer that replaces the size that depends on the input's channels by -1, at most one in each call.

    Attributes:
        widths: names of local variables that hold the number of channels of an input, or a part of it.
        others: names of local variables that hold other sizes of an input, such as its number of tokens.
        heads: names of local variables that hold the number of heads, read from another object.
    """

    def __init__(self) -> None:
        self.changed = False
        self.widths: set[str] = set()
        self.others: set[str] = set()
        self.heads: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list = []
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        """Note names for the last size of a shape (``b, n, width = x.shape``), and for parts of it."""
        self.generic_visit(node)
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Tuple) and _is_shape(value) and len(target.elts) == 3:
            names = [size.id if isinstance(size, ast.Name) else "" for size in target.elts]
            self.widths |= set(names[-1:]) - {""}
            self.others |= set(names[:-1])
        elif isinstance(target, ast.Name) and _is_heads_of_object(value):
            self.heads.add(target.id)
        elif isinstance(target, ast.Name) and self._certainty(value):
            self.widths.add(target.id)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("reshape", "view") and not node.keywords:
            if len(node.args) == 1 and _is_shape(node.args[0]):
                node.args = [_with_open_end(node.args[0])]
                self.changed = True
                return node
            sizes = node.args
            if len(sizes) == 1 and isinstance(sizes[0], ast.Tuple):
                sizes = sizes[0].elts
            found = [self._certainty(size) for size in sizes]
            open_ = any(isinstance(size, (ast.Starred, ast.UnaryOp)) for size in sizes)
            if len(sizes) > 1 and max(found) and not open_:
                at = max(range(len(sizes)), key=lambda i: (found[i], i))
                sizes[at] = ast.UnaryOp(ast.USub(), ast.Constant(1))
                self.changed = True
        return node

    def _certainty(self, size: ast.expr) -> int:
        """Return how certainly a size is one that the shape of the tensor gives; 0: it is not.

        It is the number of heads in another object, the number of channels of an input, or an equal part of that.
        """
        if _is_heads_of_object(size) or (isinstance(size, ast.Name) and size.id in self.heads):
            return 5
        if isinstance(size, ast.Name):
            named = bool(_WIDTHS.match(size.id)) and size.id not in self.others
            return 3 if named else 2 * (size.id in self.widths)
        if isinstance(size, ast.BinOp) and isinstance(size.op, ast.FloorDiv):
            return 4 * bool(self._certainty(size.left))
        return int(_is_last_size(size))


def _is_heads_of_object(value: ast.expr) -> bool:
    """Return True for the number of heads in an object that the module holds, as in ``self.config.n_head``."""
    return isinstance(value, ast.Attribute) and value.attr in HEADS and isinstance(value.value, ast.Attribute)


def _is_shape(value: ast.expr) -> bool:
    """Return True for ``x.shape`` and ``x.size()``."""
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Attribute) and value.func.attr == "size" and not value.args
    return isinstance(value, ast.Attribute) and value.attr == "shape"


def _is_last_size(value: ast.expr) -> bool:
    """Return True for ``x.shape[-1]``, ``x.size(-1)``, and for index 2, which is the last one of batches of tokens."""
    if isinstance(value, ast.Subscript) and _is_shape(value.value):
        return _number(value.slice) in (-1, 2)
    is_size = isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "size"
    return is_size and len(value.args) == 1 and _number(value.args[0]) in (-1, 2)  # type: ignore[attr-defined]


def _number(value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:
        return None


def _with_open_end(shape: ast.expr) -> ast.expr:
    """Return ``(*shape[:-1], -1)``."""
    minus = ast.UnaryOp(ast.USub(), ast.Constant(1))
    front = ast.Subscript(shape, ast.Slice(upper=minus), ast.Load())
    return ast.Tuple([ast.Starred(front, ast.Load()), ast.UnaryOp(ast.USub(), ast.Constant(1))], ast.Load())


register_fallback(Row(reshape_standin, of_class=with_open_reshapes))
