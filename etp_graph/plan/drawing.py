"""Drawings of a plan: the layers of every group, as text and as a graph for graphviz."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from etp_graph.errors import EtpError

from ._groups import Group, Slice
from ._plan import Plan

SECONDS = 120
"""Time limit of graphviz for one picture, in seconds."""

_MAKES = ("out", "num_heads", "embedding_dim", "nf", "hidden_size")

_READS = ("in_", "nx", "input_size")


class Role(StrEnum):
    """Relation of a layer to the units of a group: it makes them, passes them on, or reads them."""

    MAKES = "made by"
    PASSES = "through"
    READS = "read by"


@dataclass(frozen=True, slots=True)
class LayerOfGroup:
    """The tensors of one module that hold units of a group."""

    name: str
    role: Role
    slices: tuple[Slice, ...]


def layers_of(plan: Plan, group: Group) -> Iterator[LayerOfGroup]:
    """Yield the layers of a group by role: first those that make its units, each role in the order of the model.

    A plan does not store the direction of the data flow, so roles are inferred. The module that gives the group its
    name makes the units. Another module passes them on if its attributes count them as both input and output, or if
    all its slices are in vectors. Else it makes them if an attribute counts them as output, and reads them if one
    counts them as input. Without such attributes it makes them if a slice is in a vector (its bias), or if it has no
    bias and only first axes are sliced; otherwise it reads them.
    """
    order = {name: number for number, name in enumerate(plan.tensors)}
    held: dict[str, list[Slice]] = {}
    for piece in sorted(group.slices, key=lambda piece: order[piece.tensor]):
        held.setdefault(piece.tensor.rpartition(".")[0], []).append(piece)
    found = [
        LayerOfGroup(name, _role_of_layer(plan, group, name, slices), tuple(slices)) for name, slices in held.items()
    ]
    for role in Role:
        yield from (layer for layer in found if layer.role is role)


def _role_of_layer(plan: Plan, group: Group, module: str, slices: Sequence[Slice]) -> Role:
    if module == group.name:
        return Role.MAKES
    counted = [a.name for a in group.attributes if a.module == module]
    out = any(name.startswith(_MAKES) for name in counted)
    into = any(name.startswith(_READS) for name in counted)
    vectors = [piece for piece in slices if len(plan.tensors[piece.tensor]) == 1]
    if len(vectors) == len(slices) or (out and into):
        return Role.PASSES
    if out or into or vectors:
        return Role.MAKES if out or not into else Role.READS
    biased = any(len(shape) == 1 and name.rpartition(".")[0] == module for name, shape in plan.tensors.items())
    return Role.READS if biased or any(piece.axis for piece in slices) else Role.MAKES


def layers_text(plan: Plan) -> str:
    """Return every group with its layers as text. ``<8>`` marks an axis of a tensor along which units lie."""
    return "\n\n".join("\n".join(_group_lines(plan, group)) for group in plan.groups)


def heading(group: Group) -> str:
    """Describe a group in one line: ``conv1: 8 channels, multiple of 4``."""
    parts = [f"{group.name}: {group.n_units} {group.kind}", group.constraint, f"locked: {group.locked}"]
    return ", ".join(part for part in parts[: 3 if group.locked else 2] if part)


def _group_lines(plan: Plan, group: Group) -> Iterator[str]:
    yield heading(group)
    found = list(layers_of(plan, group))
    width = max((len(layer.name) for layer in found), default=0)
    for layer in found:
        by_tensor: dict[str, list[Slice]] = {}
        for piece in layer.slices:
            by_tensor.setdefault(piece.tensor, []).append(piece)
        tensors = ", ".join(
            f"{name.rpartition('.')[2]} {_marked_shape(plan.tensors[name], held)}" for name, held in by_tensor.items()
        )
        yield f"  {layer.role.value}  {layer.name:{width}}  {tensors}"


def _marked_shape(shape: Sequence[int], slices: Sequence[Slice]) -> str:
    """Format the shape, with sliced axes in angle brackets; partly sliced ones as ``<4 of 8>``."""
    covered: dict[int, int] = {}
    for piece in slices:
        covered[piece.axis] = covered.get(piece.axis, 0) + len(piece)
    sizes = [
        f"<{size}>"
        if covered.get(axis, 0) >= size
        else f"<{covered[axis]} of {size}>"
        if axis in covered
        else f"{size}"
        for axis, size in enumerate(shape)
    ]
    return f"[{', '.join(sizes)}]"


def dot(plan: Plan) -> str:
    """Return the plan as a graph in graphviz's language. Boxes are layers, ellipses are groups, dashed if locked."""
    nodes: dict[str, str] = {}
    edges: list[str] = []
    for number, group in enumerate(plan.groups):
        text = "\n".join(filter(None, (group.name, f"{group.n_units} {group.kind}", group.constraint)))
        style = 'style="dashed", color="#6b7280"' if group.locked else 'style="filled", fillcolor="#dbeafe"'
        tip = group.locked or text
        nodes[f"g{number}"] = f"g{number} [shape=ellipse, {style}, label={_quote_dot(text)}, tooltip={_quote_dot(tip)}]"
        for layer in layers_of(plan, group):
            name = _quote_dot(f"layer {layer.name}")
            nodes.setdefault(name, f"{name} [shape=box, label={_quote_dot(layer.name or '(model)')}]")
            ends = (name, f"g{number}") if layer.role is not Role.READS else (f"g{number}", name)
            arrow = ' [dir="both", color="#9ca3af"]' if layer.role is Role.PASSES else ""
            edges.append(f"{' -> '.join(ends)}{arrow}")
    head = ['rankdir="LR"', 'bgcolor="white"', 'node [fontname="Helvetica", fontsize=11]']
    return "digraph plan {\n" + "".join(f"  {line};\n" for line in [*head, *nodes.values(), *edges]) + "}\n"


def _quote_dot(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def svg(plan: Plan) -> str:
    """Return the drawing of :func:`dot` as SVG.

    Raises:
        EtpError: the program ``dot`` of graphviz is missing or fails.
    """
    program = shutil.which("dot")
    if program is None:
        raise EtpError(
            "a drawing needs the program 'dot' of graphviz, which is not on the PATH: install graphviz (apt install "
            "graphviz, brew install graphviz, or https://graphviz.org/download), or use --layers for text."
        )
    try:
        done = subprocess.run(  # noqa: S603 - the program is found on the user's PATH
            [program, "-Tsvg"], input=dot(plan), capture_output=True, text=True, check=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise EtpError(
            f"{program} found no layout of {len(plan.groups)} groups in {SECONDS} s: use --layers for text, or fewer "
            "kinds of units (--kind)."
        ) from error
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        raise EtpError(f"{program} failed ({detail}): check the installation of graphviz.") from error
    return done.stdout
