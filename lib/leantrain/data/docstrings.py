"""The docstrings of scikit-learn: English text that is there without a download, fixed by the lock."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from leantrain.data.errors import CorruptData
from leantrain.data.registry import dataset

__all__ = ["read_docstrings"]

# Folders of tests and of code from elsewhere, and files that the build writes for each platform.
_LEFT_OUT = {"tests", "externals", "_build_utils", "__check_build"}
_GENERATED = {"_built_with_meson.py", "_distributor_init.py"}


@cache
def read_docstrings() -> tuple[str, ...]:
    """Docstrings of scikit-learn's modules, classes and functions, by file name, each once.

    Raises:
        CorruptData: If they are not those that the registry knows.
    """
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise CorruptData("scikit-learn is not installed; install the packages of requirements.lock")
    root = Path(spec.origin).parent
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py") if path.name not in _GENERATED)
    found: dict[str, None] = {}
    for name in names:
        if _LEFT_OUT.isdisjoint(name.split("/")):
            for node in ast.walk(ast.parse((root / name).read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                    found[text] = None
    texts = tuple(found)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    ((what, expected),) = dataset("docstrings").arrays.items()
    if digest != expected:
        raise CorruptData(f"{what}: SHA-256 {digest}, expected {expected}; is this another scikit-learn?")
    return texts
