"""A hash of the code that decides a run's numbers.

Snakemake does not notice edits of imported modules, and a fresh clone has none of its metadata; so every manifest
carries this hash, it is a parameter of every training rule, and drawing and judging compare it again. It covers the
modules that the agent and the protocol import, transitively, as syntax trees without docstrings: comments, formatting
and the rest of the package do not count. The lock of the environment is hashed beside it.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

from dynarep.configs import PartConfig

PACKAGE = "dynarep"


def _source(module: str) -> Path | None:
    """Return the file of a module of this package without importing it; None if it is not a module."""
    base = Path(__file__).parent.joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def _tree(module: str) -> tuple[str, frozenset[str]]:
    """Return a module's syntax without docstrings, and the modules of this package that it imports."""
    path = _source(module)
    assert path is not None, module
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
        body = getattr(node, "body", None)
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            assert isinstance(body, list)
            node.body = body[1:]
    ours = {name for name in imported if name.split(".")[0] == PACKAGE and _source(name)}
    return ast.dump(tree), frozenset(ours)


def modules(*entries: str, without: str = "") -> list[str]:
    """Return the modules of this package that `entries` import, transitively, themselves included, sorted.

    Args:
        without: a part of this package that is left out, with what it alone imports.
    """
    found: set[str] = set()
    todo = list(entries)
    while todo:
        module = todo.pop()
        if module not in found and not (without and f"{module}.".startswith(f"{without}.")):
            found.add(module)
            todo += _tree(module)[1]
    return sorted(found - {PACKAGE})


def of_modules(names: list[str]) -> str:
    """Return the SHA-256 of the modules' syntax."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{_tree(name)[0]}\0".encode())
    return digest.hexdigest()


def of_parts(*parts: PartConfig) -> str:
    """Return the fingerprint of the code behind an agent and a protocol."""
    return _of_entries(*(part.implementation.split(":")[0] for part in parts))


@cache
def _of_entries(*entries: str) -> str:
    return of_modules(modules(*entries))


@cache
def of_lock(root: Path) -> str:
    """Return the SHA-256 of requirements.lock and requirements-torch.txt; empty where there is no lock."""
    files = [root / name for name in ("requirements.lock", "requirements-torch.txt")]
    if not all(file.is_file() for file in files):
        return ""
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
