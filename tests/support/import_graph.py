"""Read from the source files which modules of a package import which others."""

from __future__ import annotations

import ast
from pathlib import Path


def modules(root: Path) -> dict[str, Path]:
    """Return the files of a package by the names of their modules."""
    names = {
        f: ".".join(f.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
        for f in root.rglob("*.py")
    }
    return {name: file for file, name in names.items()}


def imports(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """Every module of the package that a file names in an import, wherever it stands (functions, TYPE_CHECKING)."""
    here = name.split(".") if file.stem == "__init__" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            start = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found |= {f"{start}.{a.name}" if f"{start}.{a.name}" in known else start for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {m for m in found if m in known and m != name}
