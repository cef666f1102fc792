"""Where the parts of the project lie, and the one way in which a file is written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = [
    "BUILD",
    "CATALOG",
    "CHAPTERS",
    "COMBINATIONS",
    "DATA",
    "LOCK",
    "NETWORK_COSTS",
    "NOTEBOOKS",
    "PROFILES",
    "ROOT",
    "write_atomically",
    "write_if_changed",
]


def _folder(variable: str, default: Path) -> Path:
    """The folder that an environment variable names, in full: a kernel does not work where the runner does."""
    named = os.environ.get(variable)
    return Path(named).expanduser().absolute() if named else default


#: The folder that holds the README; `LEANTRAIN_ROOT` moves it (the tests do).
ROOT = _folder("LEANTRAIN_ROOT", Path(__file__).resolve().parents[2])
#: Runs, and the finished parts of experiments; `LEANTRAIN_BUILD` moves it, to start from nothing, or to leave a
#: tree alone that cannot be written to.
BUILD = _folder("LEANTRAIN_BUILD", ROOT / "_build")
CATALOG = ROOT / "book" / "papers.yml"
NETWORK_COSTS = ROOT / "book" / "networks.json"
COMBINATIONS = ROOT / "book" / "combinations.json"
CHAPTERS = ROOT / "book" / "chapters"
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
DATA = ROOT / "data"
LOCK = ROOT / "requirements.lock"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    The content goes to a temporary file in the same folder, is flushed to the disk, and takes the
    file's name in one step. After an error the old file stands and no temporary file is left.

    Args:
        path: The file to write; its folder is made if it is missing.
        content: Text (written as UTF-8) or bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_if_changed(path: Path, text: str) -> Path:
    """Write a text file atomically, unless it holds the text already; returns its path."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)
    return path
