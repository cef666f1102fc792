"""Checksums of files, computed once for every state of a file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from leantrain import paths

__all__ = ["cached_sha256", "sha256_of", "stamp_file"]

_CHUNK = 1 << 20


def stamp_file() -> Path:
    """Where the checksums that were computed are kept."""
    return paths.BUILD / "data-verified.json"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, as 64 lower-case hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def cached_sha256(path: Path, *, fresh: bool = False) -> str:
    """SHA-256 of a file, from the stamp file if the file's size and time of change are those of the last time.

    Args:
        path: The file.
        fresh: Compute it anyway, and renew the stamp.
    """
    key = str(path.resolve())
    state = path.stat()
    stamps = _read()
    known = stamps.get(key)
    if not fresh and isinstance(known, list) and known[:2] == [state.st_size, state.st_mtime_ns] and len(known) == 3:
        return str(known[2])
    digest = sha256_of(path)
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) == (state.st_size, state.st_mtime_ns):
        _write(_read() | {key: [state.st_size, state.st_mtime_ns, digest]})
    return digest


def _read() -> dict[str, object]:
    try:
        stamps = json.loads(stamp_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def _write(stamps: dict[str, object]) -> None:
    try:
        paths.write_atomically(stamp_file(), json.dumps(stamps, indent=1, sort_keys=True))
    except OSError:
        # The stamps only save time: without them every use hashes the files again.
        return
