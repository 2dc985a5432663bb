"""The package's own source, as a flat set of files that needs the package no more.

    smore_cli.nn.tree  ->  smore_nn_tree.py          from smore_cli.nn.tree import X  ->  from .smore_nn_tree import X

The files are copies, not a second implementation: what an export computes is what the adapter computed. Imports that
serve types alone go. Transformers' loader of remote code finds sibling files by their relative imports.
"""

from __future__ import annotations

import ast
from pathlib import Path

__all__ = ["flat_name", "flat_sources"]

_PACKAGE = "smore_cli"
_ROOT = Path(__file__).resolve().parents[1]


def flat_name(module: str) -> str:
    """Returns the name of a module's copy, without `.py`."""
    return module.replace(f"{_PACKAGE}.", "smore_").replace(".", "_")


def flat_sources(modules: list[str]) -> dict[str, str]:
    """Returns the text of the modules and of all of the package that they import, by file name.

    Args:
        modules: full names, as in `smore_cli.nn.attach`.
    """
    found: dict[str, str] = {}
    left = list(modules)
    while left:
        module = left.pop()
        name = f"{flat_name(module)}.py"
        if name not in found:
            found[name], imported = _flattened(module)
            left += imported
    return dict(sorted(found.items()))


def _flattened(module: str) -> tuple[str, list[str]]:
    """Returns a module's text with its imports rewritten, and what it imports of the package."""
    path = _path(module)
    if path is None:
        raise ModuleNotFoundError(module)
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    imported: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            end = node.end_lineno or node.lineno
            lines[node.lineno - 1 : end] = [""] * (end - node.lineno + 1)
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == _PACKAGE:
            target = str(node.module)
            names = [f"{target}.{alias.name}" for alias in node.names]
            if any(_path(name) is not None for name in names):
                raise ValueError(f"{module}: `from {target} import a module` cannot be made flat")
            at = node.lineno - 1
            lines[at] = lines[at].replace(f"from {target} import", f"from .{flat_name(target)} import")
            imported.append(target)
    return "\n".join(lines) + "\n", imported


def _path(module: str) -> Path | None:
    """Returns the file of a module of the package; None: there is none."""
    base = _ROOT.joinpath(*module.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
